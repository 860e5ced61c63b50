"""Devices, mixed precision and the optimizer step."""

import ctypes
import math
import os
import sys

import torch

from .errors import UserError
from .parallel import ALONE, world_size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(options):
    """The torch.device of --device. `options` then say what `auto` came to, and so does run.json.

    `auto` is the GPU where there is one, and its precision bfloat16, or float16 on a GPU without it.
    """
    name = options.device
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
        raise UserError(f"--device {name} is not available on this machine; try --device cpu")
    if device.type == "cuda":
        if device.index is not None:  # "cuda" alone is the current GPU
            torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # torch 2.11: its gradient of masked attention may be NaN (#196678)
        torch.set_float32_matmul_precision("high")  # TF32: float32 products, such as a judge's, round to 10 bits
    else:
        keep_memory()
    options.device = device.type if world_size() > 1 else str(device)  # each process has its own
    if options.precision == "auto":
        half = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        options.precision = half if device.type == "cuda" else "fp32"
    return device


def autocast(device, precision):
    """Matrix products in half precision; a context that does nothing for fp32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def keep_memory():
    """Tell glibc to keep the memory of large tensors: every step makes the same ones again.

    It gives each block above 32 MB back to the kernel and waits for new pages at the next one; a step of GPT-2 small
    then takes 1.4 times as long. This holds for the rest of the process. Without glibc nothing happens.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the end of the heap stays


class Optimizer:
    """AdamW, linear warm-up and decay where they are asked for, gradient clipping, and a GradScaler for float16.

    The order matters. The scaled gradient is unscaled *before* it is clipped. A step that float16 overflowed is skipped
    whole: weights, moments and learning rate stay, and `step` says so, so that the caller's baseline and EMA stay, too.
    """

    def __init__(self, model, lr, precision, warmup_steps=0, decay_steps=None, weight_decay=0.0, max_grad_norm=0.0,
                 team=ALONE):  # fmt: skip
        self.team, self.max_grad_norm = team, max_grad_norm or math.inf
        self.device, self.precision = model.device, precision
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.adam = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=precision == "fp16")

        def rate(step):  # lr / (w+1), 2 lr / (w+1), ..., lr after w steps, then constant, or linear to 0 at decay_steps
            warmup = min(1.0, (step + 1) / (warmup_steps + 1))
            decay = 1.0 if decay_steps is None else max(0.0, (decay_steps - step) / max(1, decay_steps - warmup_steps))
            return min(warmup, decay)

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, rate)
        self.metrics = {}  # of the last step

    def state_dict(self):
        """Moments, schedule and loss scale."""
        return {name: getattr(self, name).state_dict() for name in ("adam", "schedule", "scaler")}

    def load_state_dict(self, state):
        """Go on where state_dict was taken."""
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)

    def autocast(self):
        """The region in which models run. Sampling and scoring each open their own: in a shared one, some versions of
        torch score with the weights that sampling has cast, and these have no gradient."""
        return autocast(self.device, self.precision)

    def backward(self, loss):
        """Add the gradient of `loss`, a scalar. A loss that is not finite stops the run."""
        if not math.isfinite(loss.item()):
            raise diverged("loss", loss.item())
        self.scaler.scale(loss).backward()

    def step(self):
        """Average over the team, unscale, clip, update, clear; returns whether the weights moved."""
        self.team.mean_gradients(self.parameters)
        self.scaler.unscale_(self.adam)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm).item()
        moved = math.isfinite(grad_norm)
        if not moved and not self.scaler.is_enabled():
            raise diverged("gradient norm", grad_norm)
        clipped = float(grad_norm > self.max_grad_norm)
        self.metrics = {"grad_norm": grad_norm, "clipped": clipped, "learning_rate": self.schedule.get_last_lr()[0]}
        if moved:
            self.scaler.step(self.adam)
            self.schedule.step()
        self.scaler.update()  # halves the scale if unscale_ met a gradient that is not finite
        self.adam.zero_grad(set_to_none=True)
        return moved


def diverged(name, value):
    """The UserError that ends a run whose numbers are no longer finite."""
    return UserError(f"the {name} is {value}: the run diverged; lower --lr, or try --precision fp32")
