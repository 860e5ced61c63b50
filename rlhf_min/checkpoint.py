"""What a run must not lose: files that are whole or not there at all, and the state that --resume continues from.

A *state* is {name: what a step changes}: tensors (weights, an average of them), dictionaries of such, and objects with
torch's state_dict and load_state_dict (optimizer, order of the data).
"""

import contextlib
import hashlib
import os
import random
import shutil
import warnings
from pathlib import Path

import numpy
import torch

from .errors import UserError, first_line

FORMAT = "rlhf_min checkpoint 1"


def _sync(path):
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):  # Windows cannot
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def whole(path):
    """`with whole(path) as new:` make the file or folder `new`; once it is complete and on the disk, it becomes `path`.

    Killed or failed at any moment, it leaves the old `path` as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    _remove(new)
    try:
        yield new
        for part in (new, *new.rglob("*")):
            _sync(part)
        if path.is_dir():  # a folder cannot be replaced in one go
            _remove(path)
        os.replace(new, path)
        _sync(path.parent)
    except BaseException:
        _remove(new)
        raise


def save_checkpoint(path, **values):
    """Write {name: tensors, numbers, texts, in dictionaries, lists and tuples}."""
    with whole(path) as new, open(new, "wb") as file:
        torch.save({"format": FORMAT, **values}, file)


def load_checkpoint(path, device):
    """What save_checkpoint wrote, its tensors on `device`; UserError for anything else. Nothing in it can run code."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of what a foreign file may hold
            values = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # of the six kinds that a broken file raises here
        values = first_line(error)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        why = values if isinstance(values, str) else "it has another format"
        raise UserError(f"{path} is not a whole checkpoint of this program ({why}); remove the folder "
                        f"{Path(path).parent} to begin the run anew")  # fmt: skip
    return values


def snapshot(state):
    """A state as save_checkpoint takes it; the tensors are not copied."""
    if isinstance(state, dict):
        return {name: snapshot(value) for name, value in state.items()}
    return state.state_dict() if hasattr(state, "state_dict") else state


@torch.no_grad()
def restore(state, saved):
    """Put a snapshot back where it was taken: into the tensors, dictionaries and objects of `state`, in place."""
    for name, value in saved.items():
        target = state.get(name)
        if isinstance(target, dict):
            restore(target, value)
        elif isinstance(target, torch.Tensor):
            target.copy_(value)
        elif hasattr(target, "load_state_dict"):
            target.load_state_dict(value)
        else:
            state[name] = value


class RandomState:
    """The global random generators of Python, numpy and torch: dropout's, and those of a user's reward function."""

    def state_dict(self):
        legacy = numpy.random.get_state(legacy=False)  # its array is not what a checkpoint may hold
        legacy["state"]["key"] = legacy["state"]["key"].tolist()
        return {"python": random.getstate(), "numpy": legacy, "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all()}  # fmt: skip

    def load_state_dict(self, state):
        random.setstate(state["python"])
        numpy.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"].cpu())
        for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda.cpu(), device)


def fingerprint(value):
    """A SHA-256 of a model's weights, a judge's, or of whatever prints all it is; the same inputs have the same."""
    digest, value = hashlib.sha256(), getattr(value, "model", value)
    if isinstance(value, dict):
        digest.update(repr({name: fingerprint(item) for name, item in value.items()}).encode())
    elif isinstance(value, torch.nn.Module):
        for name, tensor in value.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    else:
        digest.update(repr(value).encode())
    return digest.hexdigest()
