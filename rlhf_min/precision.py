"""Devices, mixed precision and the optimizer step: the one room that knows about autocast and GradScaler."""

import ctypes
import math
import os
import sys

import torch

from .errors import UserError, no_device
from .parallel import ALONE, world_size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name):
    """`auto` is the GPU where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a process, a GPU
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch raises either for a device that is unknown or not there
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise no_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # graphs and nccl go by the current device
    return device


def pick_precision(name, device):
    """`auto` is float32 on a CPU, bfloat16 on a GPU that has it, else float16."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def resolve_device(options):
    """The torch.device of --device; `options` then say what `auto` came to, and so does run.json."""
    device = pick_device(options.device)
    options.device = device.type if world_size() > 1 else str(device)  # each process has its own
    options.precision = pick_precision(options.precision, device)
    return device


def autocast(device, precision):
    """Matrix products in half precision, master weights in float32; a no-op for fp32."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def keep_memory():
    """Keep what large tensors took for those that come next: every step makes the same ones again.

    glibc gives each block above 32 MB back to the kernel, and waits for new pages at the next, which is a fifth of a
    step with GPT-2 small. It holds for the rest of the process; without glibc nothing happens.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the end of the heap stays


class Optimizer:
    """AdamW (weight decay 0 unless asked), linear warm-up (and decay), gradient clipping, a GradScaler for float16.

    The order matters: the scaled gradient is unscaled *before* it is clipped, and a step that float16 overflowed is
    skipped whole: weights, moments and learning rate stay, and `step` says so, so that the caller's baseline and EMA
    stay, too.
    """

    def __init__(self, parameters, lr, device, precision, warmup_steps=0, decay_steps=None, max_grad_norm=1.0,
                 weight_decay=0.0, team=ALONE):  # fmt: skip
        if device.type == "cpu":
            keep_memory()
        self.team = team
        self.parameters = [p for p in parameters if p.requires_grad]
        self.adam = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.max_grad_norm = max_grad_norm

        def rate(step):  # lr / (w+1), 2 lr / (w+1), ..., lr after w steps, then constant, or linear to 0 at decay_steps
            warmup = min(1.0, (step + 1) / (warmup_steps + 1))
            decay = 1.0 if decay_steps is None else max(0.0, (decay_steps - step) / max(1, decay_steps - warmup_steps))
            return min(warmup, decay)

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, rate)
        self.lr = lr  # of the last step

    def state_dict(self):
        """Moments, schedule and loss scale."""
        return {name: getattr(self, name).state_dict() for name in ("adam", "schedule", "scaler")}

    def load_state_dict(self, state):
        """Go on where state_dict was taken."""
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)

    def backward(self, loss):
        """Add the gradient of `loss`, a scalar. A loss that is not finite stops the run."""
        if not math.isfinite(loss.item()):
            raise _diverged("loss", loss.item())
        self.scaler.scale(loss).backward()

    def step(self):
        """Average over the team, unscale, clip, update, clear.

        Returns (gradient norm before clipping, whether the weights moved).
        """
        self.team.mean_gradients(self.parameters)
        self.scaler.unscale_(self.adam)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm).item()
        moved = math.isfinite(grad_norm)
        if not moved and not self.scaler.is_enabled():
            raise _diverged("gradient norm", grad_norm)
        self.lr = self.schedule.get_last_lr()[0]
        if moved:
            self.scaler.step(self.adam)
            self.schedule.step()
        self.scaler.update()  # halves the scale if unscale_ met a gradient that is not finite
        self.adam.zero_grad(set_to_none=True)
        return grad_norm, moved


def _diverged(name, value):
    return UserError(f"the {name} is {value}: the run diverged; lower --lr, or try --precision fp32")
