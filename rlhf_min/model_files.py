"""What a model's files say of it: config.json, names and shapes of its tensors, and whether small ones are finite."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy
from safetensors import safe_open

from .errors import UserError, first_line
from .files import read_json


class Layout(NamedTuple):
    """How a family of models, all of whose blocks are alike, names its tensors."""

    backbone: str  # before the names of blocks and of what is outside, but in a model without a head
    outside: list  # modules outside of the blocks, the embedding first
    head: str  # of a sequence classifier


LAYOUTS = {  # by config.json's model_type
    family: Layout(backbone, outside.split(), head)
    for backbone, outside, head, families in (
        ("model", "embed_tokens norm", "score", "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3 smollm3 "
                                                "olmo2 granite cohere starcoder2 stablelm glm4"),
        ("model", "embed_tokens final_layernorm", "score", "phi"),
        ("model", "decoder.embed_tokens", "score", "opt"),
        ("gpt_neox", "embed_in final_layer_norm", "score", "gpt_neox"),
        ("transformer", "wte wpe ln_f", "score", "gpt2 gpt_neo gpt_bigcode"),
        ("transformer", "wte ln_f", "score", "gptj codegen"),
        ("transformer", "wte norm_f", "score", "mpt"),
        ("transformer", "word_embeddings ln_f", "score", "bloom falcon"),
        ("bert", "embeddings.word_embeddings embeddings.position_embeddings", "classifier", "bert"),
        ("distilbert", "embeddings.word_embeddings embeddings.position_embeddings", "classifier", "distilbert"),
        ("roberta", "embeddings.word_embeddings embeddings.position_embeddings", "classifier.out_proj",
         "roberta xlm-roberta camembert"),
        ("electra", "embeddings.word_embeddings", "classifier.out_proj", "electra"),
        ("deberta", "embeddings.word_embeddings", "classifier", "deberta-v2"),
    )
    for family in families.split()
}  # fmt: skip
EMBEDDING_SIZE = {"opt": "word_embed_proj_dim", "electra": "embedding_size", "deberta-v2": "embedding_size"}
BLOCKS = r"(?:(?:encoder|transformer)\.layer|(?:decoder\.)?layers|h|blocks)"  # what the blocks are numbered under
OUTPUTS = ("lm_head.weight", "decoder.weight")  # may be tied to the embedding
HEAD_WEIGHTS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")  # of sequence classifiers
PREFIX = "base_model.model."  # of every tensor's name in PEFT's files


def header_shapes(path):
    """{tensor's name: shape} of a safetensors file; UserError for one that is not whole."""
    try:
        with safe_open(path, framework="np") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, or what the file system raises
        raise UserError(f"{path} cannot be read: {first_line(error)}; is it a whole file?") from None


def weight_files(folder):
    """The safetensors files in which a model's weights, or an adapter's, are looked for."""
    folder = Path(folder)
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    index = folder / "model.safetensors.index.json"
    shards = read_json(index).get("weight_map") if index.is_file() else None
    if isinstance(shards, dict):
        return [folder / str(shard) for shard in sorted(set(map(str, shards.values())))]
    return sorted(folder.glob("*.safetensors"))


def tensor_shapes(folder):
    """{tensor's name: shape} of a model's files."""
    return {key: shape for path in weight_files(folder) for key, shape in header_shapes(path).items()}


def check_tensors(name, shapes, config, labels=0):
    """UserError where the blocks are not alike, or too few, or what is outside of them is not there or not as wide.

    For {tensor's name: shape} and families of which that is known; `labels` is the size of a judge's head, or 0.
    transformers, which knows all tensors of all families, takes seconds to say so. `lacking` is the message of both.
    Returns the names of tensors that transformers reads for certain.
    """
    family = str(config.get("model_type"))
    if family not in LAYOUTS:
        return set()
    backbone, outside, head = LAYOUTS[family]

    def size(*keys):
        key = next((key for key in keys if config.get(key) is not None), None)
        if key and not isinstance(config[key], int):
            raise UserError(f"{name}: {key} in its config.json must be a whole number, not {config[key]!r}")
        return key and config[key]

    layers = size("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    width, vocabulary = size("hidden_size", "n_embd", "dim", "d_model"), size("vocab_size")
    embedding = size(EMBEDDING_SIZE.get(family, "hidden_size")) or width
    size("max_position_embeddings", "n_positions")  # a number, if there
    if None in (layers, width, vocabulary):
        return set()
    heads = size("num_attention_heads", "n_head", "n_heads")
    if heads and width % heads and family in ("gpt2", "bert", "distilbert"):
        raise UserError(f"{name}: {heads} heads cannot share a width of {width}; mend its config.json")
    numbers, blocks, rest, block = set(), {}, {}, re.compile(rf"((?:{backbone}\.)*{BLOCKS}\.)([0-9]{{1,6}})(\..*)")
    for key, shape in shapes.items():
        if not (found := block.fullmatch(key)):
            rest.setdefault(_last_parts(key), []).append((key, shape))
        elif (number := int(found[2])) < layers:  # of more than that, transformers takes no notice
            numbers.add(number)
            if key.endswith((".weight", ".bias")):  # others may be in some blocks only, such as an old file's buffers
                blocks.setdefault((found[1], found[3], shape), set()).add(number)
    absent = {f"{start}{i}{end}" for (start, end, _), there in blocks.items() if 2 * len(there) >= len(numbers)
              for i in range(min(layers, 10_000)) if i not in there}  # fmt: skip  # of what most blocks have
    if layers and not numbers:
        absent.add(f"{backbone}'s blocks")
    wanted = {f"{module}.weight": (width,) for module in outside}  # the last sizes of its shape
    wanted[f"{outside[0]}.weight"] = vocabulary, embedding
    if (vocabulary, embedding) in (shape for key in OUTPUTS for _, shape in rest.get(key, ())):
        del wanted[f"{outside[0]}.weight"]  # they may be tied, and stored under this name
    if labels:
        wanted[f"{head}.weight"] = labels, embedding if family == "opt" else width
    for key, last in wanted.items():
        found = rest.get(_last_parts(key), [(key, ())])
        if not any(shape[-len(last) :] == last for _, shape in found):
            absent.add(found[0][0])
    if absent:
        raise lacking(name, absent)
    named = {key: key.removeprefix(f"{backbone}.") for key in shapes}
    inside = {f"{start}{i}{end}" for (start, end, shape), there in blocks.items() for i in there
              if len(there) == layers and len(shape) < 3}  # fmt: skip
    twice = {plain for plain, count in Counter(named.values()).items() if count > 1}  # under both names: which is read?
    return {key for key, plain in named.items() if plain not in twice
            if (key in inside and re.match(rf"{BLOCKS}\.", plain))
            or plain in wanted or key in wanted}  # fmt: skip


def _last_parts(key):
    return ".".join(key.split(".")[-2:])


def check_finite(name, folder, keys):
    """UserError for a NaN or an infinity in the named tensors, where reading all takes a moment: below 256 MB.

    Of others, the run itself tells it once it has the model.
    """
    files = weight_files(folder)
    for path in files if sum(path.stat().st_size for path in files) < 2**28 else ():
        with safe_open(path, framework="np") as file:
            for key in sorted(keys & set(file.keys())):
                known = file.get_slice(key).get_dtype() in ("F16", "F32", "F64")  # numpy has no bfloat16
                if known and not numpy.isfinite(file.get_tensor(key)).all():
                    raise not_finite(name, key)


def not_finite(name, key):
    """The UserError for a tensor with a NaN or an infinity in it."""
    return UserError(f"{name}: {key} is not finite; save the model again")


def lacking(name, absent):
    """The UserError for tensors that are not there, or not as they should be."""
    return UserError(f"{name}: its weights lack {len(absent)} tensors, such as {min(absent)}, or have other shapes")


def read_adapter_header(folder):
    """(config, {name in the model: shape}) of a folder in PEFT's format; UserError for one that is not plain LoRA."""
    config = read_json(Path(folder, "adapter_config.json"))
    shapes = header_shapes(Path(folder, "adapter_model.safetensors"))
    extras = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "alora_invocation_tokens")
    extras = [key for key in extras if config.get(key)]
    if str(config.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "loftq")):
        extras.append("init_lora_weights")
    if config.get("peft_type") != "LORA" or extras or config.get("bias", "none") != "none":
        found = ", ".join(extras) or f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise UserError(f"{folder}: {found} is not supported; only plain LoRA is")
    return config, {name.removeprefix(PREFIX): shape for name, shape in shapes.items()}


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
        wanted = f".{name}.weight"  # of which a base may leave out the first part, or have one more in front
        found = [shape for key, shape in shapes.items() if wanted.endswith(f".{key}") or f".{key}".endswith(wanted)]
        if not found and str(family) in LAYOUTS:
            raise UserError(f"{adapter}: {name} does not fit the model in {base}, which has no such module")
        if found and sorted(found[0]) != sorted((width_in, width_out)):
            raise UserError(f"{adapter}: {name} does not fit the model in {base}: it is for {width_in} × {width_out}, "
                            f"not {' × '.join(map(str, found[0]))}")  # fmt: skip


def head_size(adapter):
    """How many logits the head has that an adapter brings with it; 0 without one."""
    shapes = read_adapter_header(adapter)[1]
    return max((shape[0] for name, shape in shapes.items() if name in HEAD_WEIGHTS and shape), default=0)


# What a config.json says, as the dictionary `config`. Of odd values nothing is said below: transformers refuses them.


def is_classifier(config):
    """Whether the model has a classification head."""
    return "SequenceClassification" in str(config.get("architectures"))


def label_names(config):
    """The names of a classifier's labels in order; what is left out is as transformers fills it in. None if odd."""
    names, count = config.get("id2label"), config.get("num_labels")
    try:
        if names is None:
            shown = 2 if count is None else min(count, 9)  # a broken count must not fill the memory
            return [f"LABEL_{i}" for i in range(shown)]
        names = {int(i): str(label) for i, label in names.items()}
    except (TypeError, ValueError, AttributeError, OverflowError):
        return None
    return [str(names.get(i)) for i in range(len(names))] if count in (None, len(names)) else None


def head_labels(count):
    """What config.json calls the labels of a head of `count` logits: a reward has no name, ratings are "1".."10"."""
    ratings = {i: str(i + 1) for i in range(count)}
    return {"num_labels": 1} if count == 1 else {"id2label": ratings, "label2id": {v: k for k, v in ratings.items()}}


def context_of_config(config):
    """The longest sequence that the model has positions for."""
    alias = "n_positions" if config.get("model_type") in ("gpt2", "gptj") else ""  # and to others it means nothing
    lengths = [config.get(key) for key in ("max_position_embeddings", alias)]
    return max((length for length in lengths if isinstance(length, int)), default=0) or 10**9


def check_policy_config(name, config, max_length):
    """UserError for what is no language model, or cannot read `max_length` tokens."""
    if is_classifier(config):
        raise UserError(f"{name} is a classifier, not a language model; name a policy")
    if max_length > context_of_config(config):
        raise UserError(f"{name} reads at most {context_of_config(config)} tokens; lower --max-length {max_length}")


def check_judge_config(name, config):
    """UserError for what is no sequence classifier, or one whose labels are neither one reward nor ratings."""
    if not is_classifier(config):
        kind = config.get("architectures")
        raise UserError(f"{name} is a {kind}, no sequence classifier; train_rm.py makes one of it")
    names = config.get("id2label")
    if names is not None and not (isinstance(names, dict) and all(re.fullmatch("[0-9]+", str(key)) for key in names)):
        raise UserError(f"{name}: id2label in its config.json must have a label for each number from 0 on")
    labels = label_names(config) or [""]
    if len(labels) > 1 and labels != [str(k + 1) for k in range(len(labels))]:
        raise UserError(f"{name}: a classifier with the labels {', '.join(labels[:3])}, ...; a reward model has one "
                        "label, or the ratings 1, 2, 3, ... in this order")  # fmt: skip


def eos_of_config(name, value):
    """The list of ids that eos_token_id of a generation_config.json stands for: none, one or several."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) for i in ids):
        raise UserError(f"{name}: eos_token_id in its generation_config.json must be a number or a list")
    return ids


def check_ends(name, tokenizer, policy=False):
    """UserError for a tokenizer without a pad and an EOS token; a policy's must have an EOS."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(f"{name}: its tokenizer has neither a pad nor an EOS token; set one in tokenizer_config.json")
    if policy and tokenizer.eos_token_id is None:
        raise UserError(f"{name}: its tokenizer has no EOS token, so no answer could end; set eos_token in its config")


def no_tokenizer(name):
    """The UserError for a model without one."""
    return UserError(f"{name}: no tokenizer in it, such as tokenizer.json; save the model's own beside it")


def unknown_target(target, linear):
    """The UserError for a name that no module has; `linear` are names of those that can have an adapter."""
    there = ", ".join(sorted(linear))
    return UserError(f"--lora-target-modules: no linear module is named {target}; there are {there}")
