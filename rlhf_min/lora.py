"""LoRA by hand (Hu et al., 2106.09685), and its files in PEFT's format.

    y = W x + b + s · B A dropout(x),      s = α / r,      A (r, in),  B (out, r),  B = 0 at first

W and b are frozen. Only the adapters (A, B) train, and the new head of a reward model. An adapted matrix is the dense
W + ΔW with ΔW = s · B A. Policies are merged on ΔW, because the mean of two A and the mean of two B are not the factors
of the mean of two B A.
"""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from .support.errors import UserError, first_line
from .support.files import read_json, whole, write_json
from .support.models import HEADS, base_of, find_model, get_weights, head_labels, is_adapter, is_head, load_plain_model
from .support.options import TrainingOptions, flag_of, option

# queries and values of Llama, GPT-2, DistilBERT, BERT; Pythia, BLOOM, Falcon; Phi-3; MPT, ModernBERT; DeBERTa.
# Where one matrix holds queries, keys and values (c_attn, query_key_value, qkv_proj, Wqkv), the keys train, too.
TARGETS = "q_proj v_proj c_attn q_lin v_lin query value query_key_value qkv_proj Wqkv query_proj value_proj".split()
PREFIX = "base_model.model."  # of every tensor's name in PEFT's files
UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "alora_invocation_tokens")


@dataclass
class LoRAOptions(TrainingOptions):
    """What every script has that can train adapters."""

    lora_r: int = option(0, "rank r of LoRA's adapters; 0 trains all weights", low=0)
    lora_alpha: float = option(32.0, "α: the update is scaled by α/r", low=1e-6)
    lora_target_modules: list = option([], "last names of the modules with an adapter, or all-linear (default: "
                                      "queries and values)")  # fmt: skip

    def check(self):
        super().check()
        given = [name for name, value in vars(type(self)()).items() if getattr(self, name) != value]
        if not self.lora_r and (without := [name for name in given if name.startswith("lora_")]):
            raise UserError(f"{flag_of(without[0])} goes with LoRA only; set --lora-r, or leave it out")


class LoRALayer(nn.Module):
    """A linear module with an adapter. W and b keep their names in the model, so `weight` is the frozen W still.

    Wraps nn.Linear, whose weight is (out, in), and GPT-2's Conv1D, whose weight is (in, out).
    """

    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__()
        self.weight, self.bias, self.transposed = base.weight, base.bias, isinstance(base, Conv1D)
        n_in, n_out = self.weight.shape if self.transposed else self.weight.shape[::-1]
        self.lora_A = nn.Parameter(self.weight.new_zeros(r, n_in))  # (r, in)
        self.lora_B = nn.Parameter(self.weight.new_zeros(n_out, r))  # (out, r)
        self.scale, self.dropout, self.enabled = alpha / r, nn.Dropout(dropout), True
        self.train(base.training)
        self.reset()

    @torch.no_grad()
    def reset(self, generator=None):
        """A ~ U(−1/√in, 1/√in), as PEFT draws it, and B = 0: ΔW = 0."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        self.lora_A.copy_(torch.rand(self.lora_A.shape, generator=generator) * 2 * bound - bound)  # (r, in)
        self.lora_B.zero_()  # (out, r)

    def delta(self):
        """ΔW = s · B A in the shape of `weight`."""
        delta = self.scale * self.lora_B @ self.lora_A  # (out, in)
        return delta.T if self.transposed else delta  # (in, out) of a Conv1D

    def forward(self, x):
        """(..., in) → (..., out)"""
        y = F.linear(x, self.weight.T if self.transposed else self.weight, self.bias)  # (..., out)
        if not self.enabled:
            return y
        h = self.scale * F.linear(self.dropout(x), self.lora_A)  # (..., r)
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), self.lora_B.T).view(y.shape)  # y + h Bᵀ in one pass


def lora_layers(model):
    """{name: LoRALayer} of all adapters in the model; empty for a model without."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def add_lora(model, r, alpha, dropout=0.0, target_modules=None):
    """Give an adapter of rank r to every module whose last name is one of `target_modules`, and freeze the rest.

    In place. A classifier's head goes on training. By default the modules are TARGETS. As B = 0, the model computes
    what it did before. Returns the model. UserError where a name fits no linear module.
    """
    named = dict(model.named_parameters())  # without a tied lm_head, whose W is the embedding's
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    adaptable = {name: name.rpartition(".")[2] for name in linear if f"{name}.weight" in named and not is_head(name)}
    found = {*adaptable.values()}
    target_modules = found if target_modules == ["all-linear"] else target_modules
    missing = {*(target_modules or ())} - found
    if missing or not found & {*(target_modules or TARGETS)}:
        name = min(missing) if missing else f"any of {', '.join(TARGETS)}"
        there = f"there are {', '.join(sorted(found))}"
        raise UserError(f"--lora-target-modules: no linear module is named {name}; {there}")
    for name, parameter in named.items():
        parameter.requires_grad_(is_head(name))
    for name, last in adaptable.items():
        if last in (target_modules or TARGETS):
            model.set_submodule(name, LoRALayer(model.get_submodule(name), r, alpha, dropout))
    return model


@torch.no_grad()
def merge_lora(model):
    """Put W + ΔW in W's place and take the adapters away, in place: the plain model, of which all weights train again.

    Returns the model.
    """
    for name, layer in lora_layers(model).items():
        n_in, n_out = layer.lora_A.shape[1], layer.lora_B.shape[0]
        plain = Conv1D(n_out, n_in) if layer.transposed else nn.Linear(n_in, n_out)
        plain.weight, plain.bias = nn.Parameter(layer.weight + layer.delta()), layer.bias  # the shape of W
        model.set_submodule(name, plain.train(layer.training))
    return model.requires_grad_(True)


@contextlib.contextmanager
def lora_disabled(model):
    """`with lora_disabled(policy):` W without ΔW: θ_sft in train_reinforce.py. (In train_warp.py W is θ_init.)"""
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
def dense_weights(model):
    """{name: tensor}, a copy of the weights that training moves: W + ΔW of each adapted module, or all of them."""
    layers = lora_layers(model)
    return {f"{name}.weight": layer.weight + layer.delta() for name, layer in layers.items()} or get_weights(model)


@torch.no_grad()
def set_adapters(model, start, end, rank):
    """Set W to `start` and the adapters to A, B of rank `rank` with W + B A = `end`; exact if ΔW has no higher rank.

    ΔW = U Σ Vᵀ (singular values in float64), B = U √Σ, A = √Σ Vᵀ. Merging M adapters of rank r gives one of rank M·r,
    and each of WARP's I iterations adds as much, so with rank = I·M·r this is its result. start, end: {name: W} as from
    dense_weights.
    """
    for name, layer in lora_layers(model).items():
        layer.weight.copy_(start[f"{name}.weight"])  # the shape of W
        delta = (end[f"{name}.weight"] - start[f"{name}.weight"]).double()  # the shape of W
        delta = delta.T if layer.transposed else delta  # (out, in)
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)  # (out, n), (n,), (n, in)
        k = min(rank, len(s))
        a, b = layer.weight.new_zeros(rank, vh.shape[1]), layer.weight.new_zeros(len(u), rank)  # (r, in), (out, r)
        a[:k], b[:, :k] = s[:k, None].sqrt() * vh[:k], u[:, :k] * s[:k].sqrt()  # (k, in), (out, k)
        layer.lora_A, layer.lora_B, layer.scale = nn.Parameter(a), nn.Parameter(b), 1.0


# Files: plain LoRA, and rsLoRA when read. Other variants compute something else.


def save_adapter(model, folder, tokenizer):
    """Write adapters, and a classifier's head, in PEFT's format: adapter_config.json, adapter_model.safetensors."""
    layers, tensors = lora_layers(model), {}
    for name, layer in layers.items():
        tensors |= {f"{name}.lora_A.weight": layer.lora_A, f"{name}.lora_B.weight": layer.lora_B}  # (r, in), (out, r)
    tensors |= {name: parameter for name, parameter in model.named_parameters() if is_head(name)}
    tensors = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    heads = sorted({part for name, _ in model.named_parameters() for part in name.split(".") if part in HEADS})
    r = layer.lora_A.shape[0]
    config = {"peft_type": "LORA", "bias": "none", "inference_mode": True}
    config |= {"task_type": "SEQ_CLS" if heads else "CAUSAL_LM", "modules_to_save": heads or None}
    config |= {"r": r, "lora_alpha": round(layer.scale * r, 6), "lora_dropout": layer.dropout.p}
    config |= {"base_model_name_or_path": model.config._name_or_path, "fan_in_fan_out": layer.transposed}
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in layers})
    with whole(folder) as new:
        new.mkdir()
        write_json(new / "adapter_config.json", config)
        save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(new)


def read_adapter(folder):
    """(config, {name in the model: tensor}) of a folder in PEFT's format; UserError for one that is not plain LoRA."""
    config = read_json(Path(folder, "adapter_config.json"))
    extras = [key for key in UNSUPPORTED if config.get(key)]
    plain = config.get("peft_type") == "LORA" and config.get("bias", "none") == "none"
    plain &= config.get("init_lora_weights", True) in (True, False, "gaussian", "eva", "orthogonal")  # others change W
    if extras or not plain:
        kind = {key: config.get(key) for key in ("peft_type", "bias", "init_lora_weights")}
        raise UserError(f"{folder}: {extras or kind} is not supported; only plain LoRA is")
    try:
        tensors = load_file(Path(folder, "adapter_model.safetensors"))
    except Exception as error:  # safetensors' own, or what the file system raises
        raise UserError(f"{folder}: adapter_model.safetensors cannot be read: {first_line(error)}") from None
    return config, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


@torch.no_grad()
def load_adapter(model, folder):
    """Add the adapters that a folder in PEFT's format holds, and its head, to the model, in place. Returns the model.

    The tensors themselves say which modules they belong to. UserError where the model has no such module or shape.
    """
    config, tensors = read_adapter(folder)
    names = sorted({name.rpartition(".lora_")[0] for name in tensors if name.endswith(".lora_A.weight")})
    if not names:
        raise UserError(f"{folder}: no lora_A in its adapter_model.safetensors")
    for name in names:
        try:
            a, b = tensors.pop(f"{name}.lora_A.weight"), tensors.pop(f"{name}.lora_B.weight")  # (r, in), (out, r)
            alpha = config["lora_alpha"] * (math.sqrt(len(a)) if config.get("use_rslora") else 1)  # rsLoRA: α/√r
            layer = LoRALayer(model.get_submodule(name), len(a), alpha, config.get("lora_dropout", 0.0))
            layer.load_state_dict({"lora_A": a, "lora_B": b}, strict=False)
        except Exception as error:  # no such module, no linear one, no such tensor, another shape
            raise UserError(f"{folder}: {name} does not fit the model: {' '.join(str(error).split())[:200]}") from None
        model.set_submodule(name, layer)
    parameters = dict(model.named_parameters(remove_duplicate=False))  # PEFT saves a tied matrix under both its names
    for name, tensor in tensors.items():
        names = [other for other in parameters if parameters[other] is parameters.get(name)]  # several of a tied one
        same = names and all(other in tensors and torch.equal(tensors[other], tensor) for other in names)
        if not same or parameters[name].shape != tensor.shape:
            raise UserError(f"{folder}: {name} {tuple(tensor.shape)} does not fit the model")
        parameters[name].copy_(tensor)
    for name, parameter in parameters.items():
        parameter.requires_grad_("lora_" in name or is_head(name))
    return model


def load_model(auto_class, name, tokenizer, **config):
    """The model of that name in float32; of an adapter's name, its base with the adapter merged into it."""
    source = find_model(name)
    if not is_adapter(source):
        return load_plain_model(auto_class, name, **config)
    heads = [tensor for key, tensor in read_adapter(source)[1].items() if is_head(key) and key.endswith("weight")]
    if heads and not config:  # the adapter brings a head, whose last matrix (K, width) says how many labels it has
        config = head_labels(min(len(head) for head in heads))
    model = load_model(auto_class, base_of(source), tokenizer, **config)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # train_rm.py may have added a pad token
        model.resize_token_embeddings(len(tokenizer))
    if heads:
        model.config.architectures = [type(model).__name__]
    merge_lora(load_adapter(model, source))
    model.config._name_or_path = source  # what an adapter on top of this one is trained on
    return model
