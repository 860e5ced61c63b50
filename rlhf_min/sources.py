"""What a name on the command line stands for: a file, a model's folder, a hub name, a reward function.

No torch here: what is not there, or broken at first sight, is refused before torch and transformers take their seconds.
"""

import importlib
import importlib.util
import os
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

from safetensors import safe_open

from .errors import UserError, first_line
from .files import read_json

_CONFIGS = ("config.json", "adapter_config.json")


def hub_reachable(timeout=1.0):
    """Whether the hub answers in time; without this question from_pretrained retries for 23 to 47 seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        return False
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
    answers = []

    def ask():
        try:
            urllib.request.urlopen(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            if error.code >= 500:  # of a proxy that has no way to the hub; others are answers, if unfriendly ones
                return
        except (OSError, ValueError):
            return
        answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)  # looking up the host's name knows no timeout
    thread.start()
    thread.join(timeout)
    return bool(answers)


def check_source(source):
    """UserError unless `source` is a file of rows, empty, or a hub data set that can be had."""
    path = Path(source)
    is_hub_name = source.partition(":")[0].count("/") == 1 and not source.startswith(("/", "."))
    is_hub_name &= not path.exists() and path.suffix not in {".jsonl", ".gz", ".json", ".txt"}
    if not source or path.is_file():
        return
    if not is_hub_name:
        raise UserError(f"{source}: no such file; give a .jsonl or .jsonl.gz file or a hub data set owner/name")
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"{source} is no local file, and hub data sets need: pip install 'rlhf_min[data]'")
    if not hub_reachable():
        raise UserError(f"{source} is no local file, and the hub cannot be reached; give a .jsonl file")


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


def check_model(name):
    """UserError unless `name` is a model whose files are whole, or one that the hub or its cache can give."""
    folder = Path(find_model(name))
    if not folder.exists():
        from huggingface_hub import try_to_load_from_cache

        cached = any(isinstance(try_to_load_from_cache(name, file), str) for file in _CONFIGS)
        if not cached and not hub_reachable():
            raise UserError(f"{name}: no such folder, not in the hub's cache, and the hub cannot be reached")
        return
    for file in (*_CONFIGS, "tokenizer_config.json", "generation_config.json"):
        if (folder / file).exists():
            read_json(folder / file)
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{name}: no .safetensors in it; pickled weights could run code and are not read: convert them")
    for path in weights:
        try:
            safe_open(path, framework="np").keys()
        except Exception as error:  # SafetensorError, or what the file system raises
            raise UserError(f"{path} cannot be read: {first_line(error)}; is it a whole file?") from None


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


def check_judge(spec):
    """UserError unless `spec` names a reward function or a model that is there."""
    import_function(spec) if is_function(spec) else check_model(spec)
