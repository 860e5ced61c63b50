"""Judges: anything that turns prompts and answers into (reward, sigma), one number each per answer.

A judge is a transformers sequence classifier, whose head is one reward or a distribution over ratings, or a Python
function `package.module.function` with TRL's signature f(prompts, completions, **columns) -> list[float]. sigma is the
standard deviation of the rating, and 0 for a scalar head and a function.
"""

import traceback

import torch

from .batches import pad
from .data import encode_answer
from .errors import UserError, first_line
from .losses import rating_mean_std
from .models import context_length, load_classifier
from .sources import import_function, is_function


def classify(model, tokens, attention_mask):
    """Logits (B, K) of a sequence classifier on right-padded tokens (B, L).

    GPT-2, Llama and their kin pool the last token whose *id* is not pad. Somebody's reward model with pad = EOS was
    trained to pool the token before the EOS, so that is what is read here, too; train_rm.py gives a model a pad token
    of its own, so that it sees how an answer ends. Without a pad token transformers refuses batches; here the mask says
    which token is the last. Encoders such as BERT pool the first token themselves.
    """
    if not hasattr(model, "score"):
        return model(input_ids=tokens, attention_mask=attention_mask).logits
    hidden = model.base_model(input_ids=tokens, attention_mask=attention_mask, use_cache=False).last_hidden_state
    pad_token_id = model.config.pad_token_id
    real = attention_mask if pad_token_id is None else attention_mask & (tokens != pad_token_id)  # (B, L)
    last = (real * torch.arange(tokens.shape[1], device=tokens.device)).argmax(-1)  # (B,)
    return model.score(hidden[torch.arange(len(last), device=last.device), last])  # (B, d) → (B, K)


def reward_and_sigma(logits):
    """(reward, sigma) of a head's logits (B, K): the one logit and 0, or mean and deviation of the rating 1..K."""
    if logits.shape[-1] == 1:
        return logits.squeeze(-1), torch.zeros_like(logits[:, 0])
    return rating_mean_std(logits)


def row_logits(model, rows, pad_token_id):
    """Logits (B, K) in float32 of B lists of token ids, those of similar length together."""
    groups = group_by_length(rows, model.device)
    logits = torch.cat([classify(model, *pad([rows[i] for i in group], pad_token_id, model.device)).float()
                        for group in groups])  # fmt: skip
    return logits[torch.tensor([i for group in groups for i in group], device=model.device).argsort()]


def group_by_length(rows, device):
    """[[positions of rows]]: a pass for every group, where that saves more padding than a pass costs.

    On a CPU a pass costs about what 128 tokens do, on a GPU more than a batch has.
    """
    if device.type != "cpu":
        return [list(range(len(rows)))]
    groups, longest = [], 0
    for done, i in enumerate(sorted(range(len(rows)), key=lambda i: -len(rows[i]))):
        if not groups or (longest - len(rows[i])) * (len(rows) - done) >= 128:
            groups.append([])
            longest = len(rows[i])
        groups[-1].append(i)
    return groups


class RewardModel:
    """A sequence classifier as a judge."""

    def __init__(self, model, tokenizer, max_length=512, batch_size=64):
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.max_length = min(max_length, context_length(model))
        self.has_sigma = model.config.num_labels > 1

    def __call__(self, prompts, completions, ended):
        """B prompts (text or messages), B answers as text, ended (B,) → reward (B,), sigma (B,), float32."""
        rows = [
            encode_answer(self.tokenizer, prompt, completion, end, self.max_length)
            for prompt, completion, end in zip(prompts, completions, torch.as_tensor(ended).tolist())
        ]
        rows = [row or [self.tokenizer.pad_token_id] for row in rows]  # an empty answer to an empty prompt
        return reward_and_sigma(self.logits(rows))

    @torch.no_grad()
    def logits(self, rows):
        """B lists of token ids → (B, K), float32."""
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        return torch.cat([row_logits(self.model, batch, self.tokenizer.pad_token_id) for batch in batches])


class RewardFunction:
    """A function f(prompts, completions, **columns) -> list[float] as a judge."""

    has_sigma = False

    def __init__(self, function, name, device):
        self.function, self.name, self.device = function, name, device

    def __call__(self, prompts, completions, ended):
        """As RewardModel; UserError where the function does not return one finite number per answer."""
        try:
            values = self.function(prompts=prompts, completions=completions)
        except (Exception, SystemExit) as error:  # somebody else's program: what it raises, and where
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(f"reward function {self.name} raised {type(error).__name__}: {first_line(error)} "
                            f"({at.filename}, line {at.lineno})") from None  # fmt: skip
        try:
            values = [float(value) for value in values]
        except (TypeError, ValueError):
            raise UserError(f"reward function {self.name} must return a list of numbers") from None
        if len(values) != len(completions):
            raise UserError(f"reward function {self.name}: {len(values)} numbers for {len(completions)} answers")
        reward = torch.tensor(values, device=self.device)
        if not reward.isfinite().all():
            value = values[reward.isfinite().int().argmin()]
            raise UserError(f"reward function {self.name} returned {value}; every reward must be finite in float32")
        return reward, torch.zeros_like(reward)


def load_judge(spec, device):
    """A judge by name: a run folder, a transformers folder, an adapter, a hub name, or package.module.function."""
    if is_function(spec):
        return RewardFunction(import_function(spec), spec, device)
    model, tokenizer = load_classifier(spec, device)
    return RewardModel(model, tokenizer)
