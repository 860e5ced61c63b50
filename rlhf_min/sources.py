"""What a name on the command line stands for: a file, a model's folder, a hub name, a reward function.

No torch here: what is not there, or broken at first sight, is refused before torch and transformers take their seconds.
"""

import importlib
import importlib.util
import math
import os
import re
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from safetensors import safe_open

from .errors import UserError, first_line
from .files import read_json

_LLAMA, _BERT = ("embed_tokens", "norm"), ("word_embeddings", "position_embeddings")
OUTSIDE = {  # modules outside of the blocks, the embedding first, by family, of those whose blocks are alike
    "gpt2": ("wte", "wpe", "ln_f"), "gpt_neox": ("embed_in", "final_layer_norm"), "bert": _BERT, "distilbert": _BERT,
    "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA,
}  # fmt: skip
SIZES = {  # numbers in a config.json of these families
    *"num_hidden_layers n_layer n_layers hidden_size n_embd dim vocab_size".split(),
    *"max_position_embeddings n_positions num_attention_heads n_head n_heads".split(),
}
HEAD_WEIGHTS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")  # of sequence classifiers
_CONFIGS = ("config.json", "adapter_config.json")
TAKEN = {*"prompt completion length ended kl eos_rate distinct_2 eta policy run".split()}  # columns of tables
PREFIX = "base_model.model."  # of every tensor's name in PEFT's files


def hub_refusal(path, timeout=1.0):
    """Why the hub will not give a file, in words, else ""; unasked, from_pretrained would retry for 8 to 47 seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        return "the hub cannot be reached"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(f"{endpoint}/{urllib.parse.quote(path)}", method="HEAD")
    answers = []

    def ask():
        try:
            urllib.request.urlopen(request, timeout=timeout)
            answers.append("")
        except urllib.error.HTTPError as error:
            answers.append(error.headers.get("X-Error-Code"))  # which the hub sends, and no proxy in between
        except (OSError, ValueError):
            return

    thread = threading.Thread(target=ask, daemon=True)  # looking up the host's name knows no timeout
    thread.start()
    thread.join(timeout)
    if not answers or answers[0] is None:
        return "the hub cannot be reached"
    from huggingface_hub import get_token

    closed = answers[0] in ("RepoNotFound", "GatedRepo") and get_token() is None
    return "the hub has nothing of that name that is open to everybody" if closed else ""


def check_source(source):
    """UserError unless `source` is a file of rows, empty, or a hub data set that can be had."""
    path = Path(source)
    name = source.partition(":")[0]
    is_hub_name = name.count("/") == 1 and not source.startswith(("/", "."))
    is_hub_name &= not path.exists() and path.suffix not in {".jsonl", ".gz", ".json", ".txt"}
    if not source or path.is_file():
        return
    if not is_hub_name:
        raise UserError(f"{source}: no such file; give a .jsonl or .jsonl.gz file or a hub data set owner/name")
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"{source} is no local file, and hub data sets need: pip install 'rlhf_min[data]'")
    if refusal := hub_refusal(f"datasets/{name}/resolve/main/README.md"):
        raise UserError(f"{source} is no local file, and {refusal}; give a .jsonl file")


def is_adapter(folder):
    """Whether a folder holds an adapter in PEFT's format, and no model."""
    return Path(folder, "adapter_config.json").is_file() and not Path(folder, "config.json").is_file()


def find_model(name):
    """The folder of a model (for a run folder its model/), or the hub name itself where there is no such folder."""
    folder = Path(name)
    for candidate in (folder / "model", folder):
        if (candidate / "config.json").is_file() or is_adapter(candidate):
            return str(candidate)
    if folder.exists():
        raise UserError(f"{name}: no config.json in it or in its model/; name a run folder or a transformers folder")
    if name.count("/") != 1 or name.startswith((".", "/", "~", "runs/")):
        raise UserError(f"{name}: no such folder; name a run folder, a transformers folder or a hub name owner/name")
    return name


def _cached(name, file):
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(name, file)
    except ValueError:  # the hub gives nobody such a name
        return None
    return path if isinstance(path, str) else None


def local_folder(name):
    """The folder with a model's files, for a hub name the one in the hub's cache; None where there is none."""
    folder = find_model(name)
    if Path(folder).exists():
        return Path(folder)
    config = _cached(name, "config.json")
    return config and Path(config).parent


def check_on_hub(name):
    """UserError unless the hub can give the model."""
    if refusal := hub_refusal(f"{name}/resolve/main/config.json"):
        raise UserError(f"{name}: no such folder, not in the hub's cache, and {refusal}")


def check_model(name, judge=False):
    """UserError unless `name` is a model whose files are whole, or one that the hub or its cache can give.

    A judge must bring its head; elsewhere train_rm.py makes a new one.
    """
    folder = Path(find_model(name))
    if not folder.exists():
        if not any(_cached(name, file) for file in _CONFIGS):
            check_on_hub(name)
        return
    for file in (*_CONFIGS, "tokenizer_config.json", "generation_config.json"):
        if (folder / file).exists():
            read_json(folder / file)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{name}: no .safetensors in it; pickled weights could run code and are not read: convert them")
    shapes = tensor_shapes(folder)
    if is_adapter(folder):
        adapted_modules(folder)
        return
    config = read_json(folder / "config.json")
    if not _is_known(config.get("model_type")):
        raise UserError(f"{name}: its config.json has model_type {config.get('model_type')!r}, which transformers does "
                        "not know; code that a model brings along is not run")  # fmt: skip
    check_tensors(name, shapes, config, judge)


def _is_known(family):
    """Whether a model_type stands in the tables of transformers, which to import would take seconds."""
    tables = Path(importlib.util.find_spec("transformers").origin).parent.glob("models/auto/*.py")
    return isinstance(family, str) and any(f'"{family}"' in table.read_text(encoding="utf-8") for table in tables)


def tensor_shapes(folder):
    """{tensor's name: shape} of a model's files; UserError for one that is not whole."""
    shapes = {}
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="np") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except Exception as error:  # SafetensorError, or what the file system raises
            raise UserError(f"{path} cannot be read: {first_line(error)}; is it a whole file?") from None
    return shapes


def check_tensors(name, shapes, config, judge=False):
    """UserError where the blocks are not alike, or too few, or what is outside of them is not there or not as wide.

    For {tensor's name: shape} and families of which that is known; transformers, which knows all tensors of all
    families, takes seconds to say so. `lacking` words what both say.
    """
    outside = OUTSIDE.get(str(config.get("model_type")), ())
    sizes = {key: value for key, value in config.items() if key in SIZES and value is not None}
    for key, value in sizes.items() if outside else ():
        if not isinstance(value, int):
            raise UserError(f"{name}: {key} in its config.json must be a whole number, not {value!r}")
    size = lambda *keys: next((sizes[key] for key in keys if key in sizes), None)
    layers, width = size("num_hidden_layers", "n_layer", "n_layers"), size("hidden_size", "n_embd", "dim")
    if not outside or None in (layers, width, size("vocab_size")):
        return
    blocks, rest = {}, {}  # {number: {name with {} for the number: shape}}, {last two parts of the name: (name, shape)}
    for key, shape in shapes.items():
        if found := re.fullmatch(r"(.*?\.)(\d+)(\..*)", key):
            blocks.setdefault(int(found[2]), {})[found[1] + "{}" + found[3]] = shape
        else:
            rest[".".join(key.split(".")[-2:])] = key, shape
    tensors = {tensor for block in blocks.values() for tensor in block.items()}
    absent = {key.format(i) for i in range(min(layers, 10_000)) for key, shape in tensors
              if blocks.get(i, {}).get(key) != shape}  # fmt: skip
    wanted = {f"{module}.weight": (width,) for module in outside}  # the last sizes of its shape
    wanted[f"{outside[0]}.weight"] = size("vocab_size"), width
    if judge and is_classifier(config) and (labels := label_names(config)):
        wanted[HEAD_WEIGHTS["bert" in config["model_type"]]] = len(labels), width
    for key, last in wanted.items():
        there, shape = rest.get(key, (key, ()))
        if shape[-len(last) :] != last:
            absent.add(there)
    if absent:
        raise lacking(name, absent)


def lacking(name, absent):
    """The UserError for tensors that are not there, or not as they should be."""
    return UserError(f"{name}: its weights lack {len(absent)} tensors, such as {min(absent)}, or have other shapes")


def read_adapter_header(folder):
    """(config, {name in the model: shape}) of a folder in PEFT's format; UserError for one that is not plain LoRA."""
    config = read_json(Path(folder, "adapter_config.json"))
    try:
        with safe_open(Path(folder, "adapter_model.safetensors"), framework="np") as file:
            shapes = {name.removeprefix(PREFIX): tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors and the file system raise several kinds
        raise UserError(f"{folder} is not an adapter in PEFT's format: {first_line(error)}") from None
    extras = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "alora_invocation_tokens")
    extras = [key for key in extras if config.get(key)]
    if str(config.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "loftq")):
        extras.append("init_lora_weights")
    if config.get("peft_type") != "LORA" or extras or config.get("bias", "none") != "none":
        found = ", ".join(extras) or f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise UserError(f"{folder}: {found} is not supported; only plain LoRA is")
    return config, shapes


def adapted_modules(folder):
    """{name: (in, out)} of the modules that an adapter changes; UserError where r, α, A and B do not go together."""
    config, shapes = read_adapter_header(folder)
    r, alpha, modules = config.get("r"), config.get("lora_alpha"), {}
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{folder}: lora_alpha must be a number, not {alpha!r}")
    adapted = {key.rpartition(".lora_")[0] for key in shapes if key.endswith((".lora_A.weight", ".lora_B.weight"))}
    for name in sorted(adapted):
        a, b = (shapes.get(f"{name}.lora_{side}.weight", ()) for side in "AB")
        if not r or (len(a), len(b)) != (2, 2) or not a[0] == b[1] == r:
            raise UserError(f"{folder}: {name} has lora_A {a} and lora_B {b}, which does not fit r {r}")
        modules[name] = a[1], b[0]
    if not modules:
        raise UserError(f"{folder}: no lora_A and lora_B in its adapter_model.safetensors")
    return modules


def check_fit(adapter, base):
    """UserError where a module of a block that an adapter changes has another shape in the files of its base."""
    shapes, family = tensor_shapes(base), read_json(base / "config.json").get("model_type")
    for name, (width_in, width_out) in adapted_modules(adapter).items():
        if not re.search(r"\.\d+\.", name):
            continue
        parts = f"{name}.weight".split(".")
        keys = {".".join(parts[i:]) for i in range(len(parts))}  # a hub's base may leave out the first part
        found = [shapes[key] for key in keys if key in shapes]
        if not found and str(family) in OUTSIDE:
            raise UserError(f"{adapter}: {name} does not fit the model in {base}, which has no such module")
        if found and sorted(found[0]) != sorted((width_in, width_out)):
            raise UserError(f"{adapter}: {name} does not fit the model in {base}: it is for {width_in} × {width_out}, "
                            f"not {' × '.join(map(str, found[0]))}")  # fmt: skip


def head_size(adapter):
    """How many logits the head has that an adapter brings with it; 0 without one."""
    return next(
        (shape[0] for name, shape in read_adapter_header(adapter)[1].items() if name in HEAD_WEIGHTS and shape), 0
    )


def base_of(adapter):
    """What an adapter's folder says that it was trained on, which may be an adapter, too."""
    chain = [str(adapter)]
    while is_adapter(chain[-1]):
        base = read_adapter_header(chain[-1])[0].get("base_model_name_or_path")
        if not isinstance(base, str):
            raise UserError(f"{chain[-1]}: its adapter_config.json names no base_model_name_or_path")
        try:
            chain.append(find_model(base))
        except UserError as error:
            raise UserError(f"{chain[-1]} is an adapter on {error}, or run where {base} is") from None
        if chain[-1] in chain[:-1]:
            raise UserError(
                f"{adapter} is an adapter on itself; mend base_model_name_or_path in its adapter_config.json"
            )
    return chain[1]


# What a config.json says, as the dictionary `config`. Of odd values nothing is said here: transformers refuses them.


def is_classifier(config):
    """Whether the model has a classification head."""
    return "SequenceClassification" in str(config.get("architectures"))


def label_names(config):
    """The names of a classifier's labels in order; what is left out is as transformers fills it in. None if odd."""
    names, count = config.get("id2label"), config.get("num_labels")
    try:
        if names is None:
            return [f"LABEL_{i}" for i in range(2 if count is None else min(count, 9))]  # or ten billion
        names = {int(i): str(label) for i, label in names.items()}
    except (TypeError, ValueError, AttributeError, OverflowError):
        return None
    return [str(names.get(i)) for i in range(len(names))] if count in (None, len(names)) else None


def head_labels(count):
    """What config.json calls the labels of a head of `count` logits: a reward has no name, ratings are "1".."10"."""
    ratings = {i: str(i + 1) for i in range(count)}
    return {"num_labels": 1} if count == 1 else {"id2label": ratings, "label2id": {v: k for k, v in ratings.items()}}


def context_length(config):
    """The longest sequence that the model has positions for."""
    lengths = [config.get(key) for key in ("max_position_embeddings", "n_positions")]  # GPT-2 has the latter
    return max((length for length in lengths if isinstance(length, int)), default=0) or 10**9


def check_policy_config(name, config, max_length):
    """UserError for what is no language model, or cannot read `max_length` tokens."""
    if is_classifier(config):
        raise UserError(f"{name} is a classifier, not a language model; name a policy")
    if max_length > context_length(config):
        raise UserError(f"{name} reads at most {context_length(config)} tokens; lower --max-length {max_length}")


def check_judge_config(name, config):
    """UserError for what is no sequence classifier, or one whose labels are neither one reward nor ratings."""
    if not is_classifier(config):
        kind = config.get("architectures")
        raise UserError(f"{name} is a {kind}, no sequence classifier; train_rm.py makes one of it")
    labels = label_names(config) or [""]
    if len(labels) > 1 and labels != [str(k + 1) for k in range(len(labels))]:
        raise UserError(f"{name}: a classifier with the labels {', '.join(labels[:3])}, ...; a reward model has one "
                        "label, or the ratings 1, 2, 3, ... in this order")  # fmt: skip


def no_device(name):
    """The UserError for a device that is not there."""
    return UserError(f"--device {name} is not to be had on this machine; try --device cpu")


def no_tokenizer(name):
    """The UserError for a model without one."""
    return UserError(f"{name}: no tokenizer in it, such as tokenizer.json; save the model's own beside it")


def unknown_target(target, linear):
    """The UserError for a name that no module has; `linear` are names of those that can have an adapter."""
    there = ", ".join(sorted(linear))
    return UserError(f"--lora-target-modules: no linear module is named {target}; there are {there}")


def named_judges(specs):
    """{name: spec} of judges `name=spec` or plain `spec`, whose name is then its last part; no name twice."""
    judges = {}
    for spec in specs:
        name, equals, rest = spec.partition("=")
        if not equals:
            name, rest = spec.rstrip("/").replace("/", ".").rpartition(".")[2], spec
        if not rest:
            raise UserError(f"--judges {spec} names no judge; write name=folder or name=package.module.function")
        if name in judges or name in TAKEN:
            raise UserError(f"--judges {spec}: the name {name} is taken; write other-name={rest}")
        judges[name] = rest
    return judges


def is_function(spec):
    """Whether a judge's name is package.module.function and no model."""
    return not Path(spec).exists() and "/" not in spec and "." in spec


def import_function(spec):
    """The function package.module.function; UserError where there is none."""
    module_name, _, function_name = spec.rpartition(".")
    sys.path.insert(0, "")  # so that a module beside the user's prompt is found, as python -m does
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except AttributeError:
        raise UserError(f"{spec}: module {module_name} has no function {function_name}") from None
    except Exception as error:  # no such module; leading dots; or whatever the module's own lines raise
        raise UserError(
            f"{spec}: {type(error).__name__}: {first_line(error)}; name a model folder or package.module.function"
        ) from None
    finally:
        sys.path.remove("")
    if not callable(function):
        raise UserError(f"{spec} is not a function")
    return function
