"""LoRA by hand (Hu et al., 2106.09685), and its files in PEFT's format.

    y = W x + b + s · B A dropout(x),      s = α / r,      A (r, in),  B (out, r),  B = 0 at first

W and b are frozen; only the adapters (A, B) train, and the new head of a reward model. An adapted matrix is the dense
W + ΔW with ΔW = s · B A: policies are merged on ΔW, because the mean of two A and the mean of two B are not the factors
of the mean of two B A.
"""

import contextlib
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .errors import UserError, first_line
from .files import whole, write_json
from .model_files import PREFIX, adapted_modules, read_adapter_header, unknown_target

TARGETS = ("q_proj", "v_proj", "c_attn", "q_lin", "v_lin", "query", "value")  # Llama, GPT-2, DistilBERT, BERT
HEADS = ("score", "classifier", "pre_classifier", "pooler")  # what a classifier has on top of its backbone


class LoRALayer(nn.Module):
    """A linear module with an adapter. W and b keep their names in the model, so `weight` is the frozen W still.

    Wraps nn.Linear, whose weight is (out, in), and GPT-2's Conv1D, whose weight is (in, out).
    """

    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__()
        self.weight, self.bias, self.transposed = base.weight, base.bias, isinstance(base, Conv1D)
        n_in, n_out = self.weight.shape if self.transposed else self.weight.shape[::-1]
        self.lora_A = nn.Parameter(self.weight.new_zeros(r, n_in))
        self.lora_B = nn.Parameter(self.weight.new_zeros(n_out, r))
        self.scale, self.dropout, self.enabled = alpha / r, nn.Dropout(dropout), True
        self.train(base.training)
        self.reset()

    @torch.no_grad()
    def reset(self, generator=None):
        """A ~ U(−1/√in, 1/√in), as PEFT draws it, and B = 0: ΔW = 0."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        self.lora_A.copy_(torch.rand(self.lora_A.shape, generator=generator) * 2 * bound - bound)
        self.lora_B.zero_()

    def delta(self):
        """ΔW = s · B A in the shape of `weight`."""
        delta = self.scale * self.lora_B @ self.lora_A  # (out, in)
        return delta.T if self.transposed else delta

    def forward(self, x):
        """(..., in) → (..., out)"""
        y = F.linear(x, self.weight.T if self.transposed else self.weight, self.bias)
        if not self.enabled:
            return y
        h = self.scale * F.linear(self.dropout(x), self.lora_A)  # (..., r)
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), self.lora_B.T).view(y.shape)  # y + h Bᵀ in one pass


def lora_layers(model):
    """{name: LoRALayer} of all adapters in the model; empty for a model without."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def add_lora(model, r, alpha, dropout=0.0, target_modules=None):
    """Give an adapter of rank r to every module whose last name is one of `target_modules`, and freeze the rest.

    In place; a classifier's head goes on training, and TARGETS are the modules by default. The model computes what it
    did before. Returns the model. Raises UserError where a name fits no linear module.
    """
    once = {name for name, _ in model.named_parameters()}  # without a tied lm_head, whose W is the embedding's
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
              and f"{name}.weight" in once and not is_head(name)]  # fmt: skip
    found = {target: [name for name in linear if name.rpartition(".")[2] == target]
             for target in target_modules or TARGETS}  # fmt: skip
    missing = [target for target, names in found.items() if not names]
    if (target_modules and missing) or not any(found.values()):
        raise unknown_target(missing[0], {name.rpartition(".")[2] for name in linear})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_head(name))
    for names in found.values():
        for name in names:
            replace_module(model, name, LoRALayer(model.get_submodule(name), r, alpha, dropout))
    return model


def add_lora_of(model, options):
    """add_lora as LoRAOptions say; with a rank of 0 the model stays as it is."""
    if options.lora_r:
        add_lora(model, options.lora_r, options.lora_alpha, options.lora_dropout, options.lora_target_modules)


def is_head(name):
    """Whether a parameter belongs to what a classifier has on top of its backbone."""
    return any(part in HEADS for part in name.split("."))


def replace_module(model, name, module):
    """Put `module` where the model has the module `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@torch.no_grad()
def merge_lora(model):
    """Put W + ΔW in W's place and take the adapters away, in place: the plain model, of which all weights train again.

    Returns the model.
    """
    for name, layer in lora_layers(model).items():
        n_in, n_out = layer.lora_A.shape[1], layer.lora_B.shape[0]
        plain = Conv1D(n_out, n_in) if layer.transposed else nn.Linear(n_in, n_out)
        plain.weight, plain.bias = nn.Parameter(layer.weight + layer.delta()), layer.bias
        replace_module(model, name, plain.train(layer.training))
    return model.requires_grad_(True)


@contextlib.contextmanager
def lora_disabled(model):
    """`with lora_disabled(policy):` the policy is its own reference, W without ΔW. No second copy of it is held."""
    layers = lora_layers(model).values()
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def reset_lora(model, generator):
    """Start all adapters anew, ΔW = 0; a model without adapters is left alone."""
    for layer in lora_layers(model).values():
        layer.reset(generator)


@torch.no_grad()
def set_adapters(model, start, end, rank):
    """Set W to `start` and the adapters to A, B of rank `rank` with W + B A = `end`; exact if ΔW has no higher rank.

    ΔW = U Σ Vᵀ (singular values in float64), B = U √Σ, A = √Σ Vᵀ. Merging and interpolating M adapters of rank r gives
    one of rank M·r, and each of WARP's I iterations adds as much, so with rank = I·M·r this is its result. start, end:
    {name: W} as from models.dense_weights.
    """
    for name, layer in lora_layers(model).items():
        layer.weight.copy_(start[f"{name}.weight"])
        delta = (end[f"{name}.weight"] - start[f"{name}.weight"]).double()
        u, s, vh = torch.linalg.svd(delta.T if layer.transposed else delta, full_matrices=False)
        k = min(rank, len(s))
        a, b = layer.weight.new_zeros(rank, vh.shape[1]), layer.weight.new_zeros(u.shape[0], rank)
        a[:k], b[:, :k] = s[:k, None].sqrt() * vh[:k], u[:, :k] * s[:k].sqrt()
        layer.lora_A, layer.lora_B, layer.scale = nn.Parameter(a), nn.Parameter(b), 1.0


def save_adapter(model, folder, tokenizer=None):
    """Write adapters, and a classifier's head, in PEFT's format: adapter_config.json, adapter_model.safetensors."""
    layers, tensors = lora_layers(model), {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
    heads = {part for name, _ in model.named_parameters() for part in name.split(".") if part in HEADS}
    tensors |= {PREFIX + name: p for name, p in model.named_parameters() if is_head(name)}
    layer = next(iter(layers.values()))
    r = layer.lora_A.shape[0]
    config = {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if heads else "CAUSAL_LM",
        "base_model_name_or_path": model.config._name_or_path, "inference_mode": True,
        "r": r, "lora_alpha": round(layer.scale * r, 6), "lora_dropout": layer.dropout.p, "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}), "fan_in_fan_out": layer.transposed,
        "modules_to_save": sorted(heads) or None,
    }  # fmt: skip
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole(folder) as new:
        new.mkdir()
        write_json(new / "adapter_config.json", config)
        save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(new)


def read_adapter(folder):
    """(config, {name in the model: tensor}) of a folder in PEFT's format; UserError for one that is not plain LoRA."""
    config, _ = read_adapter_header(folder)
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    return config, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


@torch.no_grad()
def load_adapter(model, folder):
    """Add the adapters that a folder in PEFT's format holds, and its head, to the model, in place. Returns the model.

    The tensors themselves say which modules they belong to. UserError where the model has no such module or shape.
    """
    config, tensors = read_adapter(folder)
    for name in adapted_modules(folder):
        a, b = tensors.pop(f"{name}.lora_A.weight"), tensors.pop(f"{name}.lora_B.weight")
        try:
            base = model.get_submodule(name)
            layer = LoRALayer(base, a.shape[0], config["lora_alpha"], config.get("lora_dropout", 0.0))
            if layer.lora_A.shape != a.shape or layer.lora_B.shape != b.shape:
                raise ValueError("it has another shape")
            layer.lora_A.copy_(a)
            layer.lora_B.copy_(b)
        except Exception as error:  # of the six kinds that a wrong file can raise here
            raise UserError(f"{folder}: {name} does not fit the model: {first_line(error)}") from None
        replace_module(model, name, layer)
    parameters = dict(model.named_parameters(remove_duplicate=False))  # PEFT saves a tied matrix under both its names
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise UserError(f"{folder}: {name} {tuple(tensor.shape)} does not fit the model")
        parameters[name].copy_(tensor)
    for name, parameter in parameters.items():
        parameter.requires_grad_("lora_" in name or is_head(name))
    return model
