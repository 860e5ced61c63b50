"""The next token's logits, fast: here speed goes before plainness. What it computes is model(tokens).

A token of B answers is a product of every weight with B rows, so reading the weights is what it costs. Therefore they
are laid out for that once a rollout: adapters merged, in the dtype of autocast, on a CPU in oneDNN's order, which few
rows read two to four times as fast as the order that training needs. Keys and values go into memory that is taken once,
and on a GPU the step is recorded as one CUDA graph, since launching its kernels one by one takes longer than they do.
"""

import inspect

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .lora import LoRALayer, replace_module

PACK_FROM = 2**17  # weights of a matrix; below, oneDNN's call costs more than its order saves
PACK_UP_TO = 32  # rows; beyond, computing is what a product costs, and a second copy of the weights gains little
FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "gpt_neox")  # whose attention is full, and reads the mask alone


def positions(attention_mask):
    """(B, L) → (B, L): 0, 1, 2, ... from the first real token. Without them GPT-2 is nats off under left padding."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


class Decoder:
    """`with Decoder(model, attention_mask, max_length) as decoder:` logits of the next token, a call a token.

    attention_mask: (B, P) of the prompts, which are left-padded. Models of other families are called as they are.
    """

    records = True  # on a GPU, where the model's step can be a graph

    def __init__(self, model, attention_mask, max_length):
        self.model, self.max_length, self.length = model, max_length, 0
        room = attention_mask.new_ones(len(attention_mask), max_length - attention_mask.shape[1])
        self.real = torch.cat([attention_mask, room], dim=1)  # (B, L)
        self.positions = positions(self.real)
        self.mask = torch.where(self.real, 0.0, -torch.inf)[:, None, None]  # (B, 1, 1, L), added to the scores
        config = getattr(model, "config", None)
        self.fast = getattr(config, "model_type", "") in FAMILIES and not getattr(config, "sliding_window", None)
        self.fast = self.fast and config._attn_implementation == "sdpa"
        rope = getattr(config, "rope_parameters", None) or {}
        self.records = self.records and rope.get("rope_type") not in ("dynamic", "longrope")  # they look at the length
        self.cache, self.layers, self.graph = Cache(max_length) if self.fast else None, {}, None
        self.tokens = attention_mask.new_empty(len(attention_mask), 0, dtype=torch.long)  # so far, without a cache
        takes = inspect.signature(getattr(model, "forward", model)).parameters
        names = [name for name in ("cache", "past_key_values") if name in takes]  # the latter before transformers 5.24
        # a model with a state instead of keys (Mamba) reads a mask of the new tokens only; some have neither
        self.cache_name = names[0] if names and not getattr(model, "_is_stateful", False) else None

    def __enter__(self):
        if self.fast:
            self.layers = {name: module for name, module in self.model.named_modules()
                           if isinstance(module, nn.Linear | Conv1D | LoRALayer)}  # fmt: skip
            for name, layer in self.layers.items():
                replace_module(self.model, name, _Linear(layer, rows=len(self.real)))
        return self

    def __exit__(self, *error):
        for name, layer in self.layers.items():
            replace_module(self.model, name, layer)

    def __call__(self, tokens):
        """tokens: (B, P), the prompts, then (B, 1), the token drawn last → logits (B, V)."""
        start, self.length = self.length, self.length + tokens.shape[1]
        if not self.fast:
            if self.cache_name is None:  # all tokens again
                tokens = self.tokens = torch.cat([self.tokens, tokens], dim=1)
                start = 0
            return self._forward(tokens, self.real[:, : self.length], self.positions[:, start : self.length])
        if self.records and self.real.is_cuda and start and self.max_length - start > 8:
            self._record(tokens, start)
        if self.graph is not None:
            self.token.copy_(tokens)
            self.slot.fill_(start)
            self.graph.replay()
            return self.logits
        if start:
            self.mask[..., start : self.length] = 0.0  # which _record may have closed
        self.cache.slots, self.cache.length = slice(start, self.length), self.length
        mask = self.mask[..., : self.length]
        if not start:  # (B, 1, P, P): a token sees those before it, and itself, lest a row of padding see nothing
            later = mask.new_full((self.length, self.length), -torch.inf).triu(1)
            mask = (mask + later).masked_fill(torch.eye(self.length, dtype=torch.bool, device=mask.device), 0.0)
        return self._forward(tokens, mask, self.positions[:, start : self.length])

    def _forward(self, tokens, mask, position_ids):
        cache = {self.cache_name: self.cache} if self.cache_name else {}
        output = self.model(input_ids=tokens, attention_mask=mask, position_ids=position_ids, use_cache=bool(cache),
                            logits_to_keep=1, **cache)  # fmt: skip
        self.cache = getattr(output, self.cache_name) if cache else None
        return output.logits[:, -1]

    def keep(self, rows):
        """Go on with these rows of the batch only, (B,) bool. Returns whether it did: a recorded graph has one size."""
        if not self.fast or self.graph is not None:
            return False
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        for tensors in (self.cache.keys, self.cache.values):
            tensors[:] = [tensor[rows] for tensor in tensors]
        return True

    def _record(self, tokens, start):
        """Record a step as a graph, or see that this machine or model cannot, and never try again.

        A graph's inputs and outputs stay where they are, so it attends to all of the cache, most of it masked.
        """
        self.token, self.slot = tokens.clone(), torch.tensor([start], device=tokens.device)
        self.mask[..., start:] = -torch.inf
        self.cache.slots, self.cache.length = self.slot, self.max_length

        def step():
            self.mask.index_fill_(-1, self.slot, 0.0)
            return self._forward(self.token, self.mask, self.positions.index_select(1, self.slot))

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what a first call allocates must not be recorded
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph, self.records = torch.cuda.CUDAGraph(), False
        try:  # the outer stream is put back where a capture that fails leaves its own
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, capture_error_mode="thread_local"),
            ):
                self.logits = step()
            self.graph = graph
        except RuntimeError:
            Decoder.records = False


class Cache:
    """Keys and values of L tokens at most, by layer; with the method of a cache that transformers' attention calls.

    `slots` are the places of the tokens that come, `length` how many places are then attended to.
    """

    def __init__(self, max_length):
        self.max_length, self.keys, self.values, self.slots, self.length = max_length, [], [], None, 0

    def update(self, keys, values, layer, *args, **kwargs):
        """keys, values: (B, heads, new, d) → (B, heads, length, d) × 2."""
        if layer == len(self.keys):
            self.keys.append(keys.new_zeros(*keys.shape[:2], self.max_length, keys.shape[3]))
            self.values.append(values.new_zeros(*values.shape[:2], self.max_length, values.shape[3]))
        self.keys[layer][:, :, self.slots] = keys
        self.values[layer][:, :, self.slots] = values
        return self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]

    def get_seq_length(self, layer=0):
        """How many places are taken."""
        return self.length


class _Linear(nn.Module):
    """y = x Wᵀ + b of a linear module, its adapter merged; `rows` is how many rows x will have."""

    def __init__(self, layer, rows):
        super().__init__()
        weight = layer.weight.detach()
        if isinstance(layer, LoRALayer) and layer.enabled:
            weight = weight + layer.delta().detach()
        if isinstance(layer, Conv1D) or getattr(layer, "transposed", False):
            weight = weight.T
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.onednn = device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
        self.onednn &= hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        self.onednn &= weight.numel() >= PACK_FROM and rows <= PACK_UP_TO
        if self.onednn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        else:
            self.weight = weight.to(dtype)

    def forward(self, x):
        if self.onednn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)
