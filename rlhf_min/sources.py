"""What a name on the command line stands for: a file, a model's folder, a hub name, a reward function.

No torch here: what is not there, or broken at first sight, is refused before torch and transformers take their seconds.
"""

import importlib
import importlib.util
import os
import re
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path

from .errors import UserError, first_line
from .model_files import read_adapter_header

TAKEN = {*"prompt completion length ended kl eos_rate distinct_2 eta policy run".split()}  # columns of tables

NO_COLUMN = re.compile(r"^$|[|\n]|_(se|z|delta|low|high|rate)$")  # of a table; the endings are evaluate.py's


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
        except (OSError, ValueError, HTTPException):  # the last one where something else than a web server answers
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
    path, name = Path(source), source.partition(":")[0]
    if not source or path.is_file():
        return
    is_hub_name = name.count("/") == 1 and not source.startswith(("/", ".")) and not path.exists()
    is_hub_name &= path.suffix not in {".jsonl", ".gz", ".json", ".txt"}
    if not is_hub_name:
        raise UserError(f"{source}: no such file; give a .jsonl or .jsonl.gz file or a hub data set owner/name")
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"{source} is no local file, and hub data sets need: pip install 'rlhf_min[data]'")
    if refusal := hub_refusal(f"datasets/{name}/resolve/main/README.md"):
        raise UserError(f"{source} is no local file, and {refusal}; give a .jsonl file")


def is_adapter(folder):
    """Whether a folder holds an adapter in PEFT's format, and no model."""
    here = lambda file: os.path.isfile(Path(folder, file))  # False, too, for a name that no file system takes
    return here("adapter_config.json") and not here("config.json")


def find_model(name):
    """The folder of a model (for a run folder its model/), or the hub name itself where there is no such folder."""
    for candidate in (Path(name, "model"), Path(name)):
        if os.path.isfile(candidate / "config.json") or is_adapter(candidate):
            return str(candidate)
    if os.path.exists(name):
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
    if os.path.exists(folder):
        return Path(folder)
    config = _cached(name, "config.json")
    return config and Path(config).parent


def in_cache(name):
    """Whether the hub's cache has a model or an adapter of that name."""
    return any(_cached(name, file) for file in ("config.json", "adapter_config.json"))


def check_on_hub(name):
    """UserError unless the hub can give the model."""
    if refusal := hub_refusal(f"{name}/resolve/main/config.json"):
        raise UserError(f"{name}: no such folder, not in the hub's cache, and {refusal}")


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


def named_judges(specs):
    """{name: spec} of judges `name=spec` or plain `spec`, whose name is then its last part; no name twice."""
    judges = {}
    for spec in specs:
        name, equals, rest = spec.partition("=")
        if not equals:
            name, rest = spec.rstrip("/").replace("/", ".").rpartition(".")[2], spec
        if not rest:
            raise UserError(f"--judges {spec} names no judge; write name=folder or name=package.module.function")
        if name in judges or name in TAKEN or NO_COLUMN.search(name):
            raise UserError(
                f"--judges {spec}: the name {name} is taken or cannot head a column; write other-name={rest}"
            )
        judges[name] = rest
    return judges


def is_function(spec):
    """Whether a judge's name is package.module.function and no model."""
    return not os.path.exists(spec) and "/" not in spec and "." in spec


def import_function(spec):
    """The function package.module.function; UserError where there is none."""
    module_name, _, function_name = spec.rpartition(".")
    sys.path.insert(0, "")  # so that a module beside the user's prompt is found, as python -m does
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except AttributeError:
        raise UserError(f"{spec}: module {module_name} has no function {function_name}") from None
    except (Exception, SystemExit) as error:  # no such module; leading dots; or what the module's own lines raise
        raise UserError(
            f"{spec}: {type(error).__name__}: {first_line(error)}; name a model folder or package.module.function"
        ) from None
    finally:
        sys.path.remove("")
    if not callable(function):
        raise UserError(f"{spec} is not a function")
    return function
