"""Whether --resume can go on: what run.json and the checkpoint say of a run, told without torch.

The checkpoint's weights are not read here, and nothing is unpickled.
"""

import hashlib
import json
import os
import zipfile
from pathlib import Path

from .errors import UserError, explain, first_line, world_size
from .files import read_json
from .model_files import weight_files
from .preflight import base_of_adapter, folder_of
from .sources import is_adapter

FORMAT, ABOUT = "rlhf_min checkpoint 3", "archive/about.json"  # what a checkpoint is, and where in it that is said
STATE = {"title": str, "step": int, "metrics_bytes": int, "processes": int, "seconds": int | float, "finished": list}
READ = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json",
        "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt",
        "tokenizer.model", "spiece.model")  # fmt: skip  # of a model's folder, beside the weights


def fingerprints(options):
    """{name: {file: its SHA-256}} of the data and models that the options name, and of the bases of adapters.

    What is not on this machine has none: a data set on the hub, a model that is not yet in its cache.
    """
    files = {name: [Path(name)] for name in options.files() if Path(name).is_file()}
    models = [*options.model_names()]
    for name in models:
        if folder := folder_of(name):
            files[name] = [*(folder / file for file in READ), *weight_files(folder)]
            if is_adapter(folder):
                models.append(base_of_adapter(folder))
    return {name: {path.name: _sha256(path) for path in paths if path.is_file()} for name, paths in files.items()}


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_inputs(folder, run, now):
    """UserError where `now`, the `fingerprints` of what is here, are not those that a run.json has."""
    begun = run["inputs"] if isinstance(run.get("inputs"), dict) else {}
    for name, files in now.items():
        before = begun[name] if isinstance(begun.get(name), dict) else {}
        in_cache = before and not Path(name).exists()  # of the hub, which may have got more of its files since
        differ = [file for file in (before if in_cache else before | files) if before.get(file) != files.get(file)]
        if differ:
            what = name if Path(name).is_file() else f"{name}: {differ[0]}"
            raise UserError(f"--resume: {what}: not what the run in {folder} began with; put it back, or begin a new "
                            "run")  # fmt: skip


def read_about(path):
    """What a checkpoint says of itself, see save_checkpoint; UserError for a file that is no whole one of ours."""
    why = "it has another format"
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        with zipfile.ZipFile(path) as archive:
            if ABOUT in archive.namelist() and archive.getinfo(ABOUT).file_size < 2**24:
                about = json.loads(archive.read(ABOUT))
                if isinstance(about, dict) and about.get("format") == FORMAT:
                    return about
    except Exception as error:  # of the six kinds that a broken file raises
        if explain(error):
            raise  # the file may be whole: no memory, or a disk that fails
        why = first_line(error)
    raise no_checkpoint(path, why)


def no_checkpoint(path, why):
    """The UserError for a file that --resume cannot go on with."""
    return UserError(f"{path} is not a whole checkpoint of this program ({why}); remove the folder {path.parent} to "
                     "begin the run anew")  # fmt: skip


def check_state(folder, run):
    """What the checkpoint of `run`, a run.json, says of itself, None before the first one.

    UserError where it is none of this run, finished runs or lines of metrics.jsonl are gone, or the number of processes
    is another.
    """
    checkpoints, metrics = folder / "checkpoint", folder / "metrics.jsonl"
    for path, right in ((checkpoints, checkpoints.is_dir()), (metrics, metrics.is_file())):
        if os.path.lexists(path) and not right:
            raise UserError(f"{path} is not what a run leaves under this name; remove it, or begin a new run")
    abouts = {path.name: read_about(path) for path in checkpoints.glob("*.pt")}
    for name, about in abouts.items():
        if about.get("run") != run.get("id"):
            raise no_checkpoint(checkpoints / name, "it is one of another run")
    if "state.pt" not in abouts:
        if any(about.get("metrics_bytes") for about in abouts.values()):
            raise UserError(f"{checkpoints}/state.pt is missing; remove the folder {checkpoints} to begin the run anew")
        return None
    about = abouts["state.pt"]
    if not all(isinstance(about.get(name), kind) for name, kind in STATE.items()) or not about["seconds"] < 1e12:
        raise no_checkpoint(checkpoints / "state.pt", "it is not the state of a run")
    missing = [name for name in about["finished"] if name not in [*abouts]]
    if missing:
        raise UserError(f"{checkpoints}/{missing[0]} is missing; remove the folder {checkpoints} to begin the run anew")
    if about["processes"] != world_size():
        raise UserError(f"--resume: the run in {folder} is one of {about['processes']} processes, not {world_size()}; "
                        "start as many")  # fmt: skip
    check_metrics(metrics, about["metrics_bytes"])
    return about


def check_metrics(path, size):
    """UserError unless the first `size` bytes of a metrics.jsonl are whole lines."""
    lines = path.read_bytes()[: max(0, size)] if path.is_file() else b""
    if len(lines) != size:
        raise UserError(f"{path} has lost lines that the checkpoint knows; begin a new run")
    try:
        for line in lines.splitlines():
            json.loads(line)
    except ValueError as error:
        raise UserError(f"{path} is not as the run left it ({first_line(error)}); begin a new run") from None


def check_resume(options):
    """UserError where the interrupted run in --out has other inputs, or its checkpoint is not whole."""
    folder = Path(options.out)
    if options.resume and (folder / "run.json").exists():
        run = read_json(folder / "run.json")
        check_state(folder, run)
        check_inputs(folder, run, fingerprints(options))
