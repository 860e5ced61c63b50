"""Sampling answers, and scoring them: whatever the sampler does to the logits, the scorer does, too.

B prompts, left-padded to P tokens, and answers of at most T tokens: `tokens` is (B, P+T). An answer is what TRL calls a
completion; where a name comes from there, so does the word.
"""

from typing import NamedTuple

import torch

from .batches import pad
from .errors import UserError


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


def positions(attention_mask):
    """(B, L) → (B, L): 0, 1, 2, ... from the first real token. Without them GPT-2 is nats off under left padding."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


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
def sample(model, prompts, max_length, temperature, eos_token_id, pad_token_id, generator):
    """One answer to each prompt from π(· | x) = softmax(logits / temperature): no top-k, no top-p, no penalty.

    A token is the inverse of the cumulated distribution at one uniform number. The numbers are drawn beforehand on the
    CPU, a row per prompt, so that two policies can be compared on the same ones.

    prompts: B lists of token ids. T = max_length − P with P the longest prompt: a short prompt beside a long one gets a
    shorter answer. Returns a Rollout. Raises UserError for logits that are not finite.
    """
    tokens, attention_mask = pad(prompts, pad_token_id, model.device, side="left")  # (B, P)
    uniform = torch.rand(len(prompts), max_length, generator=generator, dtype=torch.float64).to(model.device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    inputs, cache, answer = tokens, None, []
    for t in range(max_length - tokens.shape[1]):
        output = model(
            input_ids=inputs, attention_mask=attention_mask, past_key_values=cache, use_cache=True, logits_to_keep=1,
            position_ids=positions(attention_mask)[:, -inputs.shape[1] :],
        )  # fmt: skip
        cumulated = (output.logits[:, -1].double() / temperature).softmax(-1).cumsum(-1)  # (B, V)
        if not cumulated[:, -1].isfinite().all():
            raise UserError("the policy's logits are not finite: the run diverged; lower --lr")
        token = torch.searchsorted(cumulated, uniform[:, t : t + 1] * cumulated[:, -1:], right=True)  # (B, 1)
        token = token.masked_fill(ended[:, None], pad_token_id)
        answer.append(token)
        ended |= _is_eos(token[:, 0], eos_token_id)
        inputs, cache = token, output.past_key_values
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(prompts), 1)], dim=1)
        if ended.all():
            break
    completions = torch.cat(answer, dim=1)
    mask = completion_mask(completions, eos_token_id)
    return Rollout(torch.cat([tokens, completions], dim=1), attention_mask, mask, ended)


def completion_logits(model, rollout, temperature, weights=None):
    """Logits / temperature of every token of the answer, in float32: (B, T, V).

    The logits at position t−1 are those of token t, so the last prompt token scores the first of the answer. With
    `weights`, a dictionary {name: tensor}, the model is evaluated at those instead of its own.
    """
    inputs = {
        "input_ids": rollout.tokens,
        "attention_mask": rollout.attention_mask,
        "position_ids": positions(rollout.attention_mask),
        "logits_to_keep": rollout.mask.shape[1] + 1,
        "use_cache": False,
    }
    output = model(**inputs) if weights is None else torch.func.functional_call(model, weights, kwargs=inputs)
    return output.logits[:, :-1].float() / temperature


def token_logprobs(model, rollout, temperature, weights=None):
    """log π(y_t | x, y_<t) of the sampled tokens, (B, T), in nats; behind the first EOS the values mean nothing."""
    logits = completion_logits(model, rollout, temperature, weights)  # (B, T, V)
    chosen = logits.gather(-1, rollout.completions.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


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
