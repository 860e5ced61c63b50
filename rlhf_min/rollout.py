"""Sampling answers, and scoring them: whatever the sampler does to the logits, the scorer does, too.

B prompts are padded on the left to P tokens. An answer has at most T tokens. `tokens` is (B, P+T):

    pad pad  x   x   x  │  y   y  EOS pad pad       attention_mask is True on x, y and the first EOS
    x   x    x   x   x  │  y   y   y   y  EOS       mask (B, T) on y, the first EOS included

An answer is what TRL calls a completion. `max_length` counts the prompt, too, unlike TRL's max_completion_length.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, DynamicCache

from .lora import load_model
from .support import gpu_step
from .support.batches import pad, positions
from .support.errors import UserError
from .support.models import cache_argument, check_loaded, context_length, is_classifier, load_tokenizer


def load_policy(name, device, max_length):
    """(model, tokenizer) of a causal language model, in float32. It stays in eval mode: no dropout.

    The ids that end an answer, and pad, stand in its generation config, where transformers' generate reads them, too.
    UserError where it is no language model, or cannot read `max_length` tokens.
    """
    tokenizer = load_tokenizer(name)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: its tokenizer has no EOS token, so no answer could end; set eos_token in its config")
    model = load_model(AutoModelForCausalLM, name, tokenizer)
    if is_classifier(model):
        raise UserError(f"{name} is a classifier, not a language model; name a policy")
    check_loaded(name, model, tokenizer, lambda rows: next_logits(model, rows, tokenizer.pad_token_id))
    if max_length > context_length(model):
        raise UserError(f"{name} reads at most {context_length(model)} tokens; lower --max-length {max_length}")
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = sorted({tokenizer.eos_token_id, *ends} - {None})  # some models end an answer in their own way
    config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer


class Rollout(NamedTuple):
    """Sampled answers, as token ids. Log-probs are those of these very ids; only judges read the decoded text."""

    tokens: torch.Tensor  # (B, P+T) prompt, answer, and pad after the first EOS
    attention_mask: torch.Tensor  # (B, P+T) True on prompt and answer
    mask: torch.Tensor  # (B, T) True on the answer, the first EOS included
    ended: torch.Tensor  # (B,) True where the answer has an EOS

    @property
    def completions(self):
        """(B, T)"""
        return self.tokens[:, -self.mask.shape[1] :]


def is_eos(tokens, eos_token_id):
    """True where a token ends an answer; eos_token_id: an id or a list of ids. (B, T) → bool (B, T)."""
    return torch.isin(tokens, torch.as_tensor(eos_token_id, device=tokens.device))


def completion_mask(tokens, eos_token_id):
    """True up to and including the first EOS; all True where there is none.

    By position, not by id: pad may be EOS. tokens: (B, T); eos_token_id: an id or a list of ids. Returns bool (B, T).
    """
    ends = is_eos(tokens, eos_token_id)  # (B, T)
    ends_before = ends.cumsum(-1) - ends.long()  # (B, T) how many EOS stand before this token
    return ends_before == 0


def next_logits(model, prompts, pad_token_id):
    """Logits of the token after each of B prompts, lists of token ids, as `decode` pads them: (B, V)."""
    tokens, attention_mask = pad(prompts, pad_token_id, model.device, side="left")  # (B, P), (B, P)
    inputs = {"attention_mask": attention_mask, "position_ids": positions(attention_mask), "logits_to_keep": 1}
    return model(tokens, **inputs).logits[:, -1]


def uniform_numbers(count, length, generator):
    """(count, length) numbers in [0, 1), drawn on the CPU: the same ones for every device."""
    return torch.rand(count, length, generator=generator, dtype=torch.float64)


@torch.no_grad()
def sample(policy, prompts, uniform, temperature):
    """One answer to each prompt from π(· | x) = softmax(logits / temperature): no top-k, no top-p, no penalty.

    Token t is the inverse of the cumulative distribution at the uniform number t. So an answer is a function of the
    policy and of `uniform`, and two policies can be compared on the same random numbers.

    prompts: B lists of token ids; uniform: (B, max_length) in [0, 1). Prompt and answer together have at most
    max_length tokens, whatever the other rows have. Returns a Rollout. UserError for logits that are not finite.
    """
    config = policy.generation_config
    prompt, attention_mask = pad(prompts, config.pad_token_id, policy.device, side="left")  # (B, P), (B, P)
    room = uniform.shape[1] - attention_mask.sum(-1, keepdim=True)  # (B, 1) tokens that are left for each answer
    inputs = policy, prompt, attention_mask, uniform.to(policy.device), room, temperature
    tokens, probs = (gpu_step.decode(*inputs, draw) if prompt.is_cuda else None) or decode(*inputs)
    if not probs.isfinite().all():  # a NaN among the weights or in the cache stays, so the last step shows it
        raise UserError("the policy's logits are not finite: the run diverged; lower --lr")
    completions = tokens[:, prompt.shape[1] :]  # (B, T)
    in_room = torch.arange(completions.shape[1], device=tokens.device) < room  # (B, T)
    mask = completion_mask(completions, config.eos_token_id) & in_room  # (B, T)
    ended = (is_eos(completions, config.eos_token_id) & mask).any(-1)  # (B,)
    return Rollout(tokens, torch.cat([attention_mask, mask], dim=1), mask, ended)


def decode(policy, tokens, attention_mask, uniform, room, temperature):
    """Tokens (B, P+T), which begin with the prompts (B, P), and the last token's probabilities (B, V).

    Row i gets at most room[i] tokens, and pad behind its EOS. On a GPU, support/gpu_step.py does the same faster.
    """
    config, name, seen = policy.generation_config, cache_argument(policy), 0
    cache = {name: DynamicCache(config=policy.config)} if name else {}
    going = torch.ones_like(room, dtype=torch.bool)  # (B, 1) whose answer goes on
    for t in range(int(room.max())):
        inputs = {"input_ids": tokens[:, seen:], "position_ids": positions(attention_mask)[:, seen:]}  # (B, new)
        inputs |= {"attention_mask": attention_mask, "use_cache": bool(cache), "logits_to_keep": 1}  # (B, P+t)
        logits = policy(**inputs, **cache).logits  # (B, 1 or more, V)
        seen = tokens.shape[1] if cache else 0  # what the cache knows is not computed again
        probs = (logits[:, -1].float() / temperature).softmax(-1)  # (B, V)
        token = draw(probs, uniform[:, t : t + 1]).masked_fill(~going, config.pad_token_id)  # (B, 1)
        tokens = torch.cat([tokens, token], dim=1)  # (B, P+t+1)
        attention_mask = torch.cat([attention_mask, going], dim=1)  # (B, P+t+1)
        going = going & ~is_eos(token, config.eos_token_id) & (t + 1 < room)
        if not going.any():
            break
    return tokens, probs


def draw(probs, uniform):
    """The token at which the cumulative distribution passes a uniform number: (B, V), (B, 1) → (B, 1).

    In float64: in float32 the sum over a large vocabulary would move the rare tokens.
    """
    cumulative = probs.double().cumsum(-1)  # (B, V)
    token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)  # (B, 1)
    return token.clamp(max=probs.shape[1] - 1)  # rounding must not lead out of the vocabulary


def completion_logits(model, rollout, temperature, weights=None):
    """Logits / temperature of every token of the answer, in float32: (B, T, V).

    The logits at position t−1 are those of token t, so the last prompt token scores the first of the answer. With
    `weights`, a dictionary {name: tensor}, the model is evaluated at those instead of its own.
    """
    length = rollout.mask.shape[1]  # T
    inputs = {"input_ids": rollout.tokens, "attention_mask": rollout.attention_mask, "use_cache": False}
    inputs |= {"position_ids": positions(rollout.attention_mask), "logits_to_keep": length + 1}
    output = model(**inputs) if weights is None else torch.func.functional_call(model, weights, kwargs=inputs)
    logits = output.logits[:, -length - 1 : -1]  # (B, T, V), also where a model gives all of its logits
    return logits.float() / temperature


def token_logprobs(model, rollout, temperature, weights=None, passes=1):
    """log π(y_t | x, y_<t) of the sampled tokens, (B, T), in nats. Behind the first EOS the values mean nothing.

    With several `passes`, each over a part of the rows, training needs the memory of one: `backward` computes each of
    them a second time.
    """
    if passes > 1:
        parts = [Rollout(*rows) for rows in zip(*(tensor.chunk(passes) for tensor in rollout))]
        inputs = [(model, part, temperature, weights) for part in parts]
        return torch.cat([checkpoint(token_logprobs, *part, use_reentrant=False) for part in inputs])
    logits = completion_logits(model, rollout, temperature, weights)  # (B, T, V)
    nats = F.cross_entropy(logits.flatten(0, 1), rollout.completions.flatten(), reduction="none")  # (B·T,) −log π
    return -nats.view_as(rollout.mask)


def decode_completions(tokenizer, rollout):
    """The answers as B texts, special tokens removed: what they add to the prompt's text.

    Decoded alone, an answer of a Llama tokenizer would lose the space before its first word.
    """
    width = rollout.tokens.shape[1] - rollout.mask.shape[1]  # P
    starts = (~rollout.attention_mask[:, :width]).sum(-1).tolist()  # B numbers
    ends = (width + rollout.mask.sum(-1)).tolist()  # B numbers
    texts = []
    for row, start, end in zip(rollout.tokens.tolist(), starts, ends):
        prompt = tokenizer.decode(row[start:width], skip_special_tokens=True)
        texts.append(tokenizer.decode(row[start:end], skip_special_tokens=True)[len(prompt) :])
    return texts
