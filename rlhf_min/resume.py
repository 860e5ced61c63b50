"""Whether --resume can go on: what run.json and the checkpoint say of a run, told without torch.

The checkpoint's weights are not read here, and nothing in it can run code: see `read_state`.
"""

import hashlib
import os
import pickle
import zipfile
from pathlib import Path

from .errors import UserError, explain, first_line
from .files import read_json
from .preflight import base_of_adapter, folder_of
from .sources import is_adapter

FORMAT = "rlhf_min checkpoint 1"
READ = {".json", ".jinja", ".model", ".safetensors", ".txt"}  # files of a model's folder that a loader may read


def fingerprints(options):
    """{file: its SHA-256} of the data and models that the options name, and of the bases of adapters.

    What is not on this machine has none: a data set on the hub, a model that is not yet in its cache.
    """
    files, models = {name: Path(name) for name in options.files() if Path(name).is_file()}, [*options.model_names()]
    for name in models:
        if folder := folder_of(name):
            files |= {f"{name}: {path.name}": path for path in folder.iterdir() if path.suffix in READ}
            if is_adapter(folder):
                models.append(base_of_adapter(folder))
    return {name: _sha256(path) for name, path in sorted(files.items())}


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_inputs(folder, run, files):
    """UserError where `files`, of `fingerprints`, are not those that a run.json has."""
    before = run["inputs"] if isinstance(run.get("inputs"), dict) else {}
    differ = [name for name, value in files.items() if before.get(name) != value]
    if differ:
        raise UserError(f"--resume: {differ[0]}: not what the run in {folder} began with; put it back, or begin a new "
                        "run")  # fmt: skip


class _Plain(pickle.Unpickler):
    """Numbers and texts in dictionaries, lists and tuples. Whatever else is there becomes empty; no name is used."""

    class Nothing(dict):
        def __init__(self, *args):
            super().__init__()

    def find_class(self, module, name):
        return self.Nothing

    def persistent_load(self, key):
        return None  # the numbers of a tensor


def read_state(path):
    """What a checkpoint holds, but for its tensors; UserError for a file that is no whole one of this program."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                values = _Plain(file).load()
    except Exception as error:  # a broken pickle raises what it likes
        if explain(error):
            raise  # no memory, or a disk that fails
        raise no_checkpoint(path, first_line(error)) from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise no_checkpoint(path, "it has another format")
    return values


def no_checkpoint(path, why):
    """The UserError for a file that --resume cannot go on with."""
    return UserError(f"{path} is not a whole checkpoint of this program ({why}); remove the folder {path.parent} to "
                     "begin the run anew")  # fmt: skip


def check_state(folder, saved):
    """UserError where finished runs or lines of metrics.jsonl are gone, or the run was one of other processes."""
    checkpoints, metrics = folder / "checkpoint", folder / "metrics.jsonl"
    missing = [name for name in saved["finished"] if not (checkpoints / name).exists()]
    if missing:
        raise UserError(f"{checkpoints}/{missing[0]} is missing; remove the folder {checkpoints} to begin the run anew")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if len(saved["parts"]) != processes:
        raise UserError(f"--resume: the run in {folder} is one of {len(saved['parts'])} processes, not {processes}; "
                        "start as many")  # fmt: skip
    if (metrics.stat().st_size if metrics.exists() else 0) < saved["metrics_bytes"]:
        raise UserError(f"{metrics} has lost lines that the checkpoint knows; begin a new run")


def check_resume(options):
    """UserError where the interrupted run in --out has other inputs, or its checkpoint is not whole."""
    folder = Path(options.out)
    if not options.resume or not (folder / "run.json").exists():
        return
    check_inputs(folder, read_json(folder / "run.json"), fingerprints(options))
    for path in (folder / "checkpoint").glob("*.pt"):
        saved = read_state(path)
        if path.name == "state.pt":
            check_state(folder, saved)
