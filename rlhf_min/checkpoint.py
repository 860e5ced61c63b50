"""The state of a run that --resume continues from.

A *state* is {name: what a step changes}: tensors (weights, an average of them), numbers, dictionaries of both, and
objects with torch's state_dict and load_state_dict (optimizer, order of the data).
"""

import io
import json
import random
import zipfile

import numpy
import torch

from .errors import explain, first_line
from .files import whole
from .resume import ABOUT, FORMAT, no_checkpoint, read_about


def save_checkpoint(path, about=None, **values):
    """Write {name: tensors, numbers, texts, in dictionaries, lists and tuples} as torch does.

    `about`, a dictionary that JSON has, goes beside it into the same archive, where it can be read without torch.
    """
    with whole(path) as new:
        with open(new, "wb") as file:
            torch.save(values, file)
        with zipfile.ZipFile(new, "a") as archive:
            archive.writestr(ABOUT, json.dumps({"format": FORMAT, **(about or {})}))


def load_checkpoint(path, device="cpu"):
    """All that save_checkpoint wrote, tensors on `device`; UserError for anything else. No code in it can run."""
    about = read_about(path)
    try:
        return about | torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # of the six kinds that a broken file raises here
        if explain(error):
            raise  # the file may be whole: no memory, or a disk that fails
        raise no_checkpoint(path, first_line(error)) from None


def pack(values):
    """{name: value} as a tensor of bytes, for another process."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def unpack(values, device="cpu"):
    """What pack was given, its tensors on `device`; what was not packed, as it is."""
    if not isinstance(values, torch.Tensor):
        return values
    return torch.load(io.BytesIO(values.numpy().tobytes()), map_location=device, weights_only=True)


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
        of_numpy = numpy.random.get_state(legacy=False)
        of_numpy["state"]["key"] = of_numpy["state"]["key"].tolist()  # an array is not what a checkpoint may hold
        return {"python": random.getstate(), "numpy": of_numpy, "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all()}  # fmt: skip

    def load_state_dict(self, state):
        random.setstate(state["python"])
        numpy.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"].cpu())
        for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda.cpu(), device)
