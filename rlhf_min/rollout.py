"""Sampling answers, and scoring them: whatever the sampler does to the logits, the scorer does, too.

B prompts, left-padded to P tokens, and answers of at most T tokens: `tokens` is (B, P+T). An answer is what TRL calls a
completion; where a name comes from there, so does the word.
"""

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .batches import pad
from .decoding import Decoder, positions
from .errors import UserError
from .parallel import ALONE


class Rollout(NamedTuple):
    """Sampled answers, as token ids: they are scored as they are, never decoded and tokenised again."""

    tokens: torch.Tensor  # (B, P+T) prompt, answer, and pad after the first EOS
    attention_mask: torch.Tensor  # (B, P+T) False on the left padding
    mask: torch.Tensor  # (B, T) True for the answer's tokens, the first EOS included
    ended: torch.Tensor  # (B,) True where the answer has an EOS

    @property
    def completions(self):
        """(B, T)"""
        return self.tokens[:, -self.mask.shape[1] :]


def completion_mask(tokens, eos_token_id):
    """True up to and including the first EOS; all True where there is none.

    By position, not by id: pad may be EOS. tokens: (B, T); eos_token_id: an id or a list of ids. Returns bool (B, T).
    """
    is_eos = _is_eos(tokens, eos_token_id)
    ends_before = is_eos.cumsum(-1) - is_eos.long()  # (B, T) how many EOS stand before this token
    return ends_before == 0


def _is_eos(tokens, eos_token_id):
    return torch.isin(tokens, torch.as_tensor(eos_token_id, device=tokens.device))


@torch.no_grad()
def sample(model, prompts, max_length, temperature, eos_token_id, pad_token_id, generator, team=ALONE):
    """One answer to each prompt from π(· | x) = softmax(logits / temperature): no top-k, no top-p, no penalty.

    A token is the inverse of the cumulated distribution at one uniform number. The numbers are drawn beforehand on the
    CPU, a row per prompt, so that two policies can be compared on the same ones.

    prompts: B lists of token ids, of which a team of processes answers each its share. T = max_length − P with P the
    longest prompt: a short prompt beside a long one gets a shorter answer. Returns a Rollout. Raises UserError for
    logits that are not finite.
    """
    tokens, attention_mask = pad(prompts, pad_token_id, model.device, side="left")  # (B, P)
    length = max_length - tokens.shape[1]  # T
    uniform = torch.rand(len(prompts), max_length, generator=generator, dtype=torch.float64).to(model.device)
    tokens, attention_mask, uniform = team.share(tokens), team.share(attention_mask), team.share(uniform)
    rows = torch.arange(len(tokens), device=model.device)  # (b,) whose answers go on, and a few that have ended
    going = torch.ones_like(rows, dtype=torch.bool)  # (b,)
    completions = tokens.new_full((len(tokens), length), pad_token_id)
    with Decoder(model, attention_mask, max_length) as decoder:
        inputs = tokens
        for t in range(length):
            probs = (decoder(inputs).float() / temperature).softmax(-1)  # (b, V)
            token = draw(probs, uniform[rows, t : t + 1])  # (b, 1)
            completions[rows, t : t + 1] = token
            going &= ~_is_eos(token[:, 0], eos_token_id)
            if not going.any():
                break
            if going.sum() < 0.75 * len(rows) and decoder.keep(going):
                rows, token, going = rows[going], token[going], going[going]
            inputs = token
    completions = completions[:, : t + 1]
    mask = completion_mask(completions, eos_token_id)
    completions = completions.masked_fill(~mask, pad_token_id)
    attention_mask = torch.cat([attention_mask, torch.ones_like(mask)], dim=1)
    ended = _is_eos(completions, eos_token_id).logical_and(mask).any(-1)
    return Rollout(torch.cat([tokens, completions], dim=1), attention_mask, mask, ended)


def draw(probs, uniform):
    """The token at which the cumulated distribution passes a uniform number: (B, V), (B, 1) → (B, 1).

    Two searches, for the block of √V tokens and then in it, cumulate 2 √V numbers in float64 instead of V. Raises
    UserError for probabilities that are not finite.
    """
    width = math.isqrt(probs.shape[1]) + 1
    blocks = F.pad(probs, (0, -probs.shape[1] % width)).unflatten(1, (-1, width))  # (B, V / width, width)
    cumulated = blocks.sum(-1).double().cumsum(-1)
    if not cumulated[:, -1].isfinite().all():
        raise UserError("the policy's logits are not finite: the run diverged; lower --lr")
    target = uniform * cumulated[:, -1:]
    block = torch.searchsorted(cumulated, target, right=True)  # (B, 1)
    inner = blocks.take_along_dim(block[..., None], 1).squeeze(1).double().cumsum(-1)  # (B, width)
    target = target - cumulated.take_along_dim(block, 1) + inner[:, -1:]  # what is left of it in the block
    target = torch.minimum(target.clamp(min=0), inner[:, -1:] * (1 - 2**-50))  # rounding must not lead out of it
    return block * width + torch.searchsorted(inner, target, right=True)


def completion_logits(model, rollout, temperature, weights=None):
    """Logits / temperature of every token of the answer, in float32: (B, T, V).

    The logits at position t−1 are those of token t, so the last prompt token scores the first of the answer. With
    `weights`, a dictionary {name: tensor}, the model is evaluated at those instead of its own.
    """
    return _logits(model, rollout, weights).float() / temperature


def _logits(model, rollout, weights):
    inputs = {
        "input_ids": rollout.tokens,
        "attention_mask": rollout.attention_mask,
        "position_ids": positions(rollout.attention_mask),
        "logits_to_keep": torch.arange(-rollout.mask.shape[1] - 1, -1, device=rollout.tokens.device),
        "use_cache": False,
    }
    output = model(**inputs) if weights is None else torch.func.functional_call(model, weights, kwargs=inputs)
    logits, kept = output.logits, inputs["logits_to_keep"]
    return logits if logits.shape[1] == len(kept) else logits[:, kept]  # some models give all, whatever is asked for


def token_logprobs(model, rollout, temperature, weights=None):
    """log π(y_t | x, y_<t) of the sampled tokens, (B, T), in nats; behind the first EOS the values mean nothing."""
    return _SampledLogprob.apply(_logits(model, rollout, weights), rollout.completions, temperature)


class _SampledLogprob(torch.autograd.Function):
    """log p_y = z_y/τ − log Σ_v e^(z_v/τ), whose gradient in z is (1_y − p)/τ: two passes and no copy of (B, T, V).

    Autograd's own way keeps logits/τ and builds the gradients of gather and logsumexp apart. In float32.
    """

    @staticmethod
    def forward(ctx, logits, tokens, temperature):
        sampled = logits.gather(-1, tokens[..., None])[..., 0].float() / temperature
        total = torch.cat([(row.float() / temperature).logsumexp(-1, keepdim=True) for row in logits.split(1)])
        ctx.save_for_backward(logits, tokens, total)
        ctx.temperature = temperature
        return sampled - total[..., 0]

    @staticmethod
    def backward(ctx, gradient):
        logits, tokens, total = ctx.saved_tensors
        scale = gradient / ctx.temperature  # (B, T)
        out = torch.empty_like(logits)
        for z, y, row, norm, s in zip(logits, tokens, out, total, scale):  # s (1_y − p), rounded to half precision once
            p = (z.float() / ctx.temperature - norm).exp_()
            row.copy_(p.mul_(-s[:, None]).scatter_add_(-1, y[:, None], s[:, None]))
        return out, None, None


def decode_completions(tokenizer, rollout):
    """The answers as text, special tokens removed: what they add to the prompt's text.

    Decoded alone, an answer of a Llama tokenizer would lose the space before its first word.
    """
    width = rollout.tokens.shape[1] - rollout.mask.shape[1]  # P
    starts, ends = (~rollout.attention_mask).sum(-1).tolist(), (width + rollout.mask.sum(-1)).tolist()
    texts = []
    for row, start, end in zip(rollout.tokens.tolist(), starts, ends):
        prompt = tokenizer.decode(row[start:width], skip_special_tokens=True)
        texts.append(tokenizer.decode(row[start:end], skip_special_tokens=True)[len(prompt) :])
    return texts
