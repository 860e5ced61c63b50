"""What the device, files and models that the options name must be, as far as it can be told without torch.

transformers' tokenizers do not import torch, so a prompt is tokenised as the run itself will do it. Whatever cannot be
told here for certain is left to the run, which checks all of it again.
"""

import os
import re
import runpy
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from . import toy
from .data import apply_chat_template
from .errors import UserError, first_line, no_device
from .files import read_json
from .model_files import (
    LAYOUTS,
    adapted_modules,
    check_finite,
    check_fit,
    check_judge_config,
    check_policy_config,
    check_tensors,
    eos_of_config,
    head_labels,
    head_size,
    is_classifier,
    label_names,
    no_tokenizer,
    read_adapter_header,
    tensor_shapes,
    unknown_target,
    weight_files,
)
from .sources import (
    base_of,
    check_on_hub,
    find_model,
    import_function,
    in_cache,
    is_adapter,
    is_function,
    local_folder,
)

FIRST = 1000  # so many rows are tokenised, for which a good run hardly waits; fewer are all, and may prove too few
TOKENIZER = re.compile("token|vocab|spiece|spm|bpe")  # what is in the names of a tokenizer's files
EXACT = {"TokenizersBackend", "PreTrainedTokenizer", "GPT2Tokenizer"}  # AutoTokenizer takes these as they are


def check_device(name):
    """UserError for what is neither CPU nor GPU, and for a GPU where torch was built without."""
    built = runpy.run_path(str(Path(find_spec("torch").origin).with_name("version.py")))
    kind = re.fullmatch(r"auto|(cpu|cuda)(:[0-9]+)?", name)
    if not kind or (kind[1] == "cuda" and not built["cuda"] and not built.get("hip")):
        raise no_device(name)


def check_policy(name, max_length):
    """UserError unless `name` is a language model that can read `max_length` tokens."""
    if config := check_base(name):
        check_policy_config(name, config, max_length)
    folder = folder_of(name)
    if folder and (folder / "generation_config.json").is_file():
        eos_of_config(name, read_json(folder / "generation_config.json").get("eos_token_id"))


def check_judge(name):
    """UserError unless `name` is a reward model or a function."""
    if is_function(name):
        import_function(name)
    elif config := check_base(name, judge=True):
        check_judge_config(name, config)


def check_base(name, judge=False):
    """What read_config says of a model of any kind; UserError unless it is whole and has a tokenizer."""
    if not _to_be_made(name):
        check_model(name, judge)
    _tokenizer_folder(name)
    return read_config(name)


def check_model(name, judge=False):
    """UserError unless `name` is a model whose files are whole, or one that the hub or its cache can give.

    A judge must bring its head; elsewhere train_rm.py makes a new one.
    """
    folder = Path(find_model(name))
    if not os.path.exists(folder):
        if not in_cache(name):
            check_on_hub(name)
        return
    for file in ("config.json", "adapter_config.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / file).exists():
            read_json(folder / file)
    if not weight_files(folder):
        raise UserError(f"{name}: no .safetensors in it; pickled weights could run code and are not read: convert them")
    shapes = tensor_shapes(folder)
    if is_adapter(folder):
        adapted_modules(folder)
        check_finite(name, folder, set(shapes))
        _check_base_of(folder)
        return
    config = read_json(folder / "config.json")
    if not _is_known(config.get("model_type")):
        raise UserError(f"{name}: its config.json has model_type {config.get('model_type')!r}, which transformers does "
                        "not know; code that a model brings along is not run")  # fmt: skip
    labels = len(label_names(config) or ()) if judge and is_classifier(config) else 0
    check_finite(name, folder, check_tensors(name, shapes, config, labels))


def _check_base_of(adapter):
    base = base_of_adapter(adapter)
    if _to_be_made(base):
        return
    check_model(base)
    if (folder := local_folder(base)) and not is_adapter(folder):
        check_fit(adapter, folder)


def _is_known(family):
    """Whether a model_type stands in the tables of transformers, which to import would take seconds."""
    tables = Path(find_spec("transformers").origin).parent.glob("models/auto/*.py")
    return isinstance(family, str) and any(f'"{family}"' in table.read_text(encoding="utf-8") for table in tables)


def _to_be_made(name):
    """Whether a model belongs to the embedded world, which is made when it is needed."""
    root = str(name).removesuffix("/model")
    return root in toy.MODELS and not Path(root, "model").exists()


def folder_of(name):
    """The folder of a model that is on this machine, else None."""
    return None if is_function(name) or _to_be_made(name) else local_folder(name)


def read_config(name):
    """What config.json says of a model, for an adapter of its base with the adapter's head; {} if not known here."""
    folder = folder_of(name)
    if not folder or not is_adapter(folder):
        return read_json(folder / "config.json") if folder else {}
    config = read_config(base_of_adapter(folder))
    if head := head_size(folder):
        config |= {"architectures": ["SequenceClassification"], "id2label": None, **head_labels(head)}
    return config


def base_of_adapter(adapter):
    base = read_adapter_header(adapter)[0].get("base_model_name_or_path")
    return base if isinstance(base, str) and _to_be_made(base) else base_of(adapter)


def has_sigma(judge):
    """False for a judge that gives no σ, a function or a classifier of one label."""
    if is_function(judge) or (judge == toy.REWARD_MODEL and _to_be_made(judge)):
        return False
    labels = label_names(read_config(judge))
    return not labels or len(labels) > 1  # none: odd ones, which the run itself looks at


def check_targets(name, targets):
    """UserError for a LoRA target that is no part of any tensor's name, in families whose modules are named alike."""
    folder, there, linear = folder_of(name), {"lm_head"}, set()
    if not folder or not targets or is_adapter(folder) or read_config(name).get("model_type") not in LAYOUTS:
        return
    for key, shape in tensor_shapes(folder).items():
        module = key.rpartition(".")[0].rpartition(".")[2]
        there.add(module)
        if re.search(r"\.\d+\..*\.weight$", key) and len(shape) == 2:
            linear.add(module)  # a matrix of a block
    for target in targets:
        if target not in there:
            raise unknown_target(target, linear)


def _tokenizer_folder(name):
    """The folder with a model's tokenizer, an adapter's own or its base's; None if not known. UserError without one."""
    folder = folder_of(name)
    if folder and is_adapter(folder) and not (folder / "tokenizer_config.json").is_file():
        return _tokenizer_folder(base_of_adapter(folder))
    if folder and Path(find_model(name)).exists():
        files = {path.name for path in folder.iterdir() if TOKENIZER.search(path.name)}
        if not files:
            raise no_tokenizer(name)
        if "tokenizer_config.json" in files and "tokenizer.json" not in files:
            config = read_json(folder / "tokenizer_config.json")
            if "AutoTokenizer" in (config.get("auto_map") or ()) and not _is_class(config.get("tokenizer_class")):
                raise UserError(f"{name}: its tokenizer is code that it brings along, which is not run; save a "
                                "tokenizer.json beside it")  # fmt: skip
    return folder


def _is_class(name):
    """Whether transformers has a class of that name."""
    import transformers

    return isinstance(name, str) and hasattr(transformers, name)


def quick_tokenizer(name):
    """(the tokenizer of a local model, whether it is sure to be the run's own), or (None, False) for an odd one.

    UserError for one that is not there or that the run could not read either.
    """
    folder = _tokenizer_folder(name)
    if not folder or not all((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        return None, False
    import transformers

    transformers.logging.set_verbosity_error()
    kind = str(read_json(folder / "tokenizer_config.json").get("tokenizer_class") or "").removesuffix("Fast")
    if not kind:  # AutoTokenizer goes by the model, and so do the special tokens
        return None, False
    family = str(read_config(name).get("model_type"))
    exact = kind in EXACT and not family.startswith("qwen")  # of which it makes its own
    fast = transformers.PreTrainedTokenizerFast
    cls = getattr(transformers, kind, fast) if kind.endswith("Tokenizer") else fast
    try:
        return (cls if issubclass(cls, fast) else fast).from_pretrained(folder, local_files_only=True), exact
    except Exception as error:
        read_json(folder / "tokenizer.json")  # UserError where it is cut off
        if exact:
            raise UserError(f"{name} cannot be loaded: {first_line(error)}") from None
        return None, False  # the run itself says what is wrong with it


def first_rows(files, read, *args):
    """The first rows of read(file, *args), of the files that are there."""
    return [row for file in files if Path(file).is_file() for row in islice(read(file, *args), FIRST)]


def check_template(tokenizer, conversations, **kwargs):
    """UserError where a tokenizer, if it is one, has no chat template or the template refuses a conversation."""
    for messages in conversations if tokenizer else ():
        apply_chat_template(tokenizer, messages, **kwargs)
