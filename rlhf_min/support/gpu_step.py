"""On a GPU: rollout.decode with its step recorded as a CUDA graph. It computes the same; read that one.

A step launches hundreds of small kernels, and Python takes longer to launch them than the GPU to run them. A graph is
recorded once and launched as a whole. Whatever it reads and writes stays at its place in memory: tokens, mask, keys and
values, and the weights of the matrix products, which are held in autocast's dtype with their adapters merged.
"""

import copy
import sys

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, DynamicCache
from transformers.pytorch_utils import Conv1D

from .batches import positions
from .errors import first_line
from .models import cache_argument

STEPS, REFUSED = {}, {}  # {what a step depends on: Step}, and {the same: why there is none}


def one_token_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention of one token, in which the heads that share a key head are its rows: no key is repeated for them.

    query: (B, heads, 1, d); key, value: (B, key heads, L, d); attention_mask, added: (B, 1, 1, L) → (B, 1, heads, d).
    """
    window = kwargs.get("sliding_window") or key.shape[2]
    if window < key.shape[2] or any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise ValueError("the model's attention is not the plain one")
    rows = query.to(key.dtype).reshape(len(query), key.shape[1], -1, query.shape[3])  # (B, key heads, heads of each, d)
    values = F.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return values.reshape(len(query), 1, query.shape[1], -1), None


AttentionInterface.register("one_token", one_token_attention)


class Step:
    """The next token of B rows of at most L tokens, in place. `slot` is where the last token stands."""

    def __init__(self, policy, prompts, length, temperature, draw, dtype):
        config, count, device = policy.generation_config, len(prompts), policy.device
        shared = {id(tensor): tensor for tensor in (*policy.parameters(), *policy.buffers())}  # not copied
        self.model = copy.deepcopy(policy, shared).eval()  # checkpointing leaves blocks in training mode
        self.model.config._attn_implementation = "one_token"
        if cache_argument(policy) is None:
            raise ValueError("the model has no keys and values")
        self.copies = []  # [(copy, module, name of its parameter)]
        for module, copied in zip(policy.modules(), self.model.modules()):
            if hasattr(module, "delta") or (isinstance(module, nn.Linear | Conv1D) and dtype != policy.dtype):
                copied.enabled = False
                for name in [name for name in ("weight", "bias") if getattr(module, name) is not None]:
                    setattr(copied, name, nn.Parameter(getattr(module, name).detach().to(dtype, copy=True), False))
                    self.copies.append((getattr(copied, name), module, name))
        full = lambda value, *shape, dtype=torch.long: torch.full(shape, value, dtype=dtype, device=device)
        self.tokens, self.uniform = full(0, count, length), full(0.5, count, length, dtype=torch.float64)  # (B, L) × 2
        self.mask = full(0.0, count, 1, 1, length, dtype=dtype)  # (B, 1, 1, L), 0 or −∞
        self.pads, self.end = full(0, count, 1), full(length, count, 1)  # (B, 1) × 2: padding, slot behind the answer
        self.slot, self.keys, self.values = full(0, 1), [], []  # keys and values in the mask's dtype, too
        self.eos, self.pad = torch.tensor(config.eos_token_id, device=device), config.pad_token_id
        self.temperature, self.draw = temperature, draw
        for _ in range(2):  # what first calls allocate, or compile, must not be recorded
            self.take()
        if device.type == "cuda":
            self.graph = torch.cuda.CUDAGraph()
            # the outer stream is put back where a capture that fails leaves its own
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(self.graph):
                self.take()

    def update(self, keys, values, layer, *args, **kwargs):
        """For transformers' attention this is the cache: (B, key heads, 1, d) × 2 → (B, key heads, L, d) × 2."""
        both = []
        for caches, new in (self.keys, keys), (self.values, values):
            if layer == len(caches):
                caches.append(self.mask.new_zeros(*new.shape[:2], self.tokens.shape[1], new.shape[3]))
            both.append(caches[layer].index_copy_(2, self.slot, new.to(self.mask.dtype)))
        return both

    def take(self):
        """Read the last token, write the next one."""
        inputs = {"input_ids": self.tokens.index_select(1, self.slot), "position_ids": self.slot - self.pads}
        inputs |= {"attention_mask": self.mask, "use_cache": True, cache_argument(self.model): self}
        device, dtype = self.tokens.device.type, self.mask.dtype
        # what autocast has cast and cached is freed when its region ends, and a graph would go on reading it
        with torch.autocast(device, dtype, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
            self.probs = self.write(self.model(**inputs).logits)

    def write(self, logits):
        """Write a token for each row that goes on, as rollout.decode does: (B, 1, V) → their probabilities (B, V)."""
        self.slot += 1
        going = self.slot < self.end  # (B, 1)
        probs = (logits[:, -1].float() / self.temperature).softmax(-1)  # (B, V)
        token = self.draw(probs, self.uniform.index_select(1, self.slot)).masked_fill(~going, self.pad)  # (B, 1)
        self.tokens.index_copy_(1, self.slot, token)
        self.mask.index_fill_(-1, self.slot, 0.0)
        self.end.copy_(torch.where(going & torch.isin(token, self.eos), self.slot + 1, self.end))
        return probs

    def begin(self, policy, prompts, attention_mask, uniform, room):
        """Read the prompts (B, P), and write the first token of each answer; returns its probabilities (B, V)."""
        width = prompts.shape[1]  # P
        for target, module, name in self.copies:
            adapted = name == "weight" and getattr(module, "enabled", False)
            target.copy_(getattr(module, name) + module.delta() if adapted else getattr(module, name))
        self.tokens[:, :width], self.mask[:] = prompts, -torch.inf
        self.mask[..., :width].masked_fill_(attention_mask[:, None, None], 0.0)
        self.uniform[:, width : width + uniform.shape[1]] = uniform[:, : self.uniform.shape[1] - width]
        self.pads.copy_(width - attention_mask.sum(-1, keepdim=True))
        self.end.copy_(width + room)
        self.slot.fill_(width - 1)
        cache = DynamicCache(config=policy.config)
        inputs = {"attention_mask": attention_mask, "position_ids": positions(attention_mask), "logits_to_keep": 1}
        probs = self.write(policy(prompts, **inputs, use_cache=True, **{cache_argument(policy): cache}).logits)
        for keys, values, layer in zip(self.keys, self.values, cache.layers):
            keys[:, :, :width], values[:, :, :width] = layer.keys, layer.values
        return probs


@torch.no_grad()
def decode(policy, prompts, attention_mask, uniform, room, temperature, draw):
    """As rollout.decode; None where the model's step cannot be recorded, which is said once, with the reason."""
    width, steps, half = prompts.shape[1], int(room.max()), torch.is_autocast_enabled(prompts.device.type)
    length = -(-(width + steps) // 64) * 64  # a multiple of 64, so that there are few graphs
    dtype = torch.get_autocast_dtype(prompts.device.type) if half else policy.dtype
    key = (len(prompts), length, temperature, dtype, *map(id, policy.parameters()))  # which a Step keeps alive
    try:
        if key in REFUSED:
            return None
        if new := key not in STEPS:
            for other in [other for other in STEPS if other[4:] != key[4:]]:
                del STEPS[other]  # of another model
            STEPS[key] = Step(policy, prompts, length, temperature, draw, dtype)
        step = STEPS[key]
        probs = step.begin(policy, prompts, attention_mask, uniform, room)
        for t in range(1, steps):
            if t % 8 == 1 and step.slot + 1 >= step.end.max():  # a question to the GPU, whose answer is waited for
                break
            step.graph.replay() if prompts.is_cuda else step.take()
            probs = step.probs
            if new and t == 1:
                check(policy, step, attention_mask)
    except Exception as error:
        STEPS.pop(key, None)
        if (reason := first_line(error)) not in REFUSED.values():
            print(f"no CUDA graph of a step, so sampling is slower: {reason}", file=sys.stderr)
        REFUSED[key] = reason
        return None
    return step.tokens[:, : int(step.end.max())].clone(), probs


def check(policy, step, attention_mask):
    """RuntimeError if the first recorded step has other probabilities than the model has without any cache."""
    attention_mask = F.pad(attention_mask, (0, 1), value=True)  # (B, P+1)
    inputs = {"attention_mask": attention_mask, "position_ids": positions(attention_mask), "logits_to_keep": 1}
    logits = policy(step.tokens[:, : attention_mask.shape[1]], **inputs, use_cache=False).logits[:, -1]  # (B, V)
    difference = ((logits.float() / step.temperature).softmax(-1) - step.probs).abs().sum(-1).max() / 2  # in [0, 1]
    if not difference < 0.1:
        raise RuntimeError(f"its probabilities are {difference:.2f} off")
