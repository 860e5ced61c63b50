"""Judges: whatever turns prompts and answers into (reward, sigma), one number each per answer.

A judge is a *reward model*, a transformers sequence classifier whose head is one reward or a distribution over ratings,
or a *reward function* `package.module.function` with TRL's signature f(prompts, completions, **columns) -> list[float].
sigma is the standard deviation of the rating, and 0 for a head with one reward and for a function.
"""

import asyncio
import copy
import inspect
import math
import os
import re
import sys
import traceback

import torch
from transformers import AutoModelForSequenceClassification

from .data import cut, encode_answer
from .lora import load_model
from .losses import rating_mean_std
from .rollout import decode_completions
from .support.batches import group_by_length, pad
from .support.errors import UserError, first_line, import_function
from .support.models import check_loaded, context_length, head_labels, is_classifier, load_tokenizer

TAKEN = """prompt completion length ended kl sigma step eta policy run baseline advantage anchor_kl entropy reward_std
grad_norm clipped iteration step_seconds learning_rate distinct_2 loss accuracy""".split()  # columns of tables and logs


def classify(model, tokens, attention_mask):
    """Logits (B, K) of a sequence classifier on right-padded tokens (B, L).

    GPT-2, Llama and their kin read the last token whose *id* is not pad. A reward model with pad = EOS was trained to
    read the token before the EOS, so we read the same token. train_rm.py gives a model a pad token of its own: its
    models see how an answer ends. Without a pad token transformers refuses batches; here the mask says which token is
    the last. Encoders such as BERT read the first token themselves.
    """
    if not hasattr(model, "score"):
        return model(input_ids=tokens, attention_mask=attention_mask).logits  # (B, K)
    hidden = model.base_model(input_ids=tokens, attention_mask=attention_mask, use_cache=False).last_hidden_state
    pad_token_id = model.config.pad_token_id
    real = attention_mask if pad_token_id is None else attention_mask & (tokens != pad_token_id)  # (B, L)
    last = (real * torch.arange(tokens.shape[1], device=tokens.device)).argmax(-1)  # (B,)
    return model.score(hidden[torch.arange(len(last), device=last.device), last])  # (B, d) → (B, K)


def row_logits(model, rows, pad_token_id):
    """Logits (B, K) in float32 of B lists of token ids, those of similar length together."""
    groups = group_by_length(rows, model.device)
    batches = [pad([rows[i] for i in group], pad_token_id, model.device) for group in groups]
    logits = torch.cat([classify(model, *batch).float() for batch in batches])  # (B, K) in the order of the groups
    return logits[torch.tensor([i for group in groups for i in group], device=model.device).argsort()]


def reward_and_sigma(logits):
    """(reward, sigma) of a head's logits (B, K): the one logit and 0, or mean and deviation of the rating 1..K."""
    if logits.shape[-1] == 1:
        return logits.squeeze(-1), torch.zeros_like(logits[:, 0])  # (B,), (B,)
    return rating_mean_std(logits)


class RewardModel:
    """A sequence classifier as a judge. With `label`, the logit of that label, of several, is the reward."""

    is_function = False

    def __init__(self, model, tokenizer, label=""):
        self.model, self.tokenizer, self.said = model.eval(), tokenizer, False
        self.max_length = min(context_length(model), tokenizer.model_max_length)
        self.label = [labels_of(model).index(label)] if label else slice(None)
        self.has_sigma = model.config.num_labels > 1 and not label

    def __call__(self, prompts, completions, ended, columns=None):
        """B prompts (text or messages), B answers as text, ended (B,) → reward (B,), sigma (B,), float32."""
        rows = [encode_answer(self.tokenizer, *answer) for answer in zip(prompts, completions, ended.tolist())]
        longer = sum(len(row) > self.max_length for row in rows)
        if longer and not self.said:
            name, self.said = self.model.config._name_or_path, True
            what = f"{longer} of {len(rows)} texts lose their beginning, and so may others"
            print(f"{name} reads {self.max_length} tokens: {what}", file=sys.stderr)
        rows = [cut(self.tokenizer, row, self.max_length, keep="end") for row in rows]
        return reward_and_sigma(self.logits([row or [self.tokenizer.pad_token_id] for row in rows])[:, self.label])

    @torch.no_grad()
    def logits(self, rows):
        """B lists of token ids → (B, K), float32."""
        return row_logits(self.model, rows, self.tokenizer.pad_token_id)


class RewardFunction:
    """A function f(prompts, completions, **columns) -> list[float | None] as a judge, sync or async; None counts 0.

    As in TRL: `columns` are the fields of the prompts' rows, a list each, and completion_ids. The completion of a
    prompt of messages is a list of one message.
    """

    is_function, has_sigma = True, False

    def __init__(self, function, name, device):
        self.function, self.name, self.device = function, name, device

    def __call__(self, prompts, completions, ended, columns=None):
        """As RewardModel. UserError where the function does not return one finite number per answer."""
        texts = [answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
                 for prompt, answer in zip(prompts, completions)]  # fmt: skip
        columns = copy.deepcopy({**(columns or {}), "prompts": prompts, "completions": texts})  # it may change them
        try:
            takes = inspect.signature(self.function).parameters
            takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
            values = self.function(**{name: columns[name] for name in columns if takes_all or name in takes})
            values = asyncio.run(values) if inspect.iscoroutine(values) else values
            reward = torch.tensor([0.0 if value is None else float(value) for value in values], device=self.device)
        except (Exception, SystemExit) as error:  # somebody else's program: what it raises, and where
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{at.filename}, line {at.lineno}"
            if at.filename == __file__:  # the call itself failed, or what it returned is no list of numbers
                where = f"it is called with {', '.join(columns)} and returns a list of numbers"
            said = f"{type(error).__name__}: {first_line(error)} ({where})"
            raise UserError(f"reward function {self.name} raised {said}") from None
        if isinstance(values, dict) or len(reward) != len(completions) or not reward.isfinite().all():
            found = f"not {len(reward)}: {str(values)[:100]}"
            raise UserError(f"reward function {self.name} must return {len(completions)} finite numbers, {found}")
        return reward, torch.zeros_like(reward)  # (B,), (B,)


class WeightedSum:
    """Σ_i w_i r_i of judges that stand before it: `parts` is {name: w_i}."""

    is_function, has_sigma = False, False

    def __init__(self, parts):
        self.parts = parts

    def __call__(self, rewards):
        """{name: (B,)} → reward (B,), sigma (B,)."""
        reward = sum(weight * rewards[name] for name, weight in self.parts.items())  # (B,)
        return reward, torch.zeros_like(reward)


def judge_answers(judges, tokenizer, prompts, rollout):
    """({name: what that judge gives to B answers, (B,)}, the answers as text).

    With a judge named `reward` there is also its `sigma`, (B,).
    """
    texts, completions = [prompt.text for prompt in prompts], decode_completions(tokenizer, rollout)
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns or {})
    columns = {name: [(prompt.columns or {}).get(name) for prompt in prompts] for name in names}
    ids, lengths = rollout.completions.tolist(), rollout.mask.sum(-1).tolist()  # B × T, B
    columns["completion_ids"] = [row[:length] for row, length in zip(ids, lengths)]
    rewards = {}
    for name, judge in judges.items():
        summed = isinstance(judge, WeightedSum)
        rewards[name], sigma = judge(rewards) if summed else judge(texts, completions, rollout.ended, columns)
        rewards |= {"sigma": sigma} if name == "reward" else {}
    return rewards, completions


def labels_of(model):
    """The names of a classifier's logits, in their order."""
    return [str(model.config.id2label.get(i)) for i in range(model.config.num_labels)]


def load_classifier(name, device, new_head=0, label=""):
    """(model, tokenizer) of a sequence classifier in float32, whose label is one reward, or whose labels are ratings.

    With `new_head` = 1 or K any model will do, and gets such a head. With `label` any classifier will do that has it.
    Otherwise UserError for what is no reward model.
    """
    tokenizer = load_tokenizer(name)
    config = head_labels(new_head) if new_head else {}
    model = load_model(AutoModelForSequenceClassification, name, tokenizer, **config)
    check_loaded(name, model, tokenizer, lambda rows: row_logits(model, rows, tokenizer.pad_token_id))
    labels = labels_of(model)
    if not new_head and not is_classifier(model):
        raise UserError(f"{name} is {model.config.architectures}, no sequence classifier; train_rm.py makes one of it")
    if label and label not in labels:
        raise UserError(f"{name}:{label}: no such label; it has {', '.join(labels[:9])}")
    if not label and len(labels) > 1 and labels != [str(k + 1) for k in range(len(labels))]:
        right = "a reward model has one label, or the ratings 1, 2, 3, ... in this order"
        remedy = f"--reward-model {name}:{labels[-1]} takes the logit of one of them"
        raise UserError(f"{name}: a classifier with the labels {', '.join(labels[:3])}, ...; {right}; {remedy}")
    return model.to(device), tokenizer


def load_judge(spec, device):
    """A judge by name: a run folder, a transformers folder, an adapter, a hub name, or package.module.function."""
    if not os.path.exists(spec) and "/" not in spec and "." in spec:
        function = import_function(spec, remedy="name a model folder or package.module.function")
        return RewardFunction(function, spec, device)
    if ".py" in spec:
        raise UserError(f"{spec}: write a function as package.module.function")
    name, _, label = spec.partition(":") if not os.path.exists(spec) else (spec, "", "")
    return RewardModel(*load_classifier(name, device, label=label), label=label)


def named_judges(specs):
    """{name: spec} of judges written `name=spec`, or `spec`, whose name is then its last part. UserError if taken."""
    judges = {}
    for spec in specs:
        name, equals, rest = spec.partition("=")
        if not equals:
            name, rest = spec.rstrip("/").replace("/", ".").rpartition(".")[2], spec
        if not rest or name in [*judges, *TAKEN] or re.fullmatch(r"|.*[|\n].*|.*_(se|z|delta|low|high|rate)", name):
            raise UserError(f"judge {spec}: write other-name={rest or 'folder'}; {name!r} is taken or no name")
        judges[name] = rest
    return judges


def load_judges_of_task(rewards, weights, judges, device):
    """{name: judge} of `judges`, and before them the one spec of `rewards` as `reward`, or several and their sum."""
    if len(rewards) == 1 and not weights:
        return load_judges([f"reward={rewards[0]}", *judges], device)
    try:
        numbers = [float(weight) for weight in weights or [1.0] * len(rewards)]
        names = named_judges([*rewards, *judges])
        if len(numbers) != len(rewards) or "reward" in names or not all(map(math.isfinite, numbers)):
            raise ValueError
    except ValueError:
        need = f"--reward-weights: {len(rewards)} numbers are needed, one for each --reward-model"
        raise UserError(f"{need}; and no name, the last part of a folder, is reward") from None
    loaded, parts = load_judges([*rewards, *judges], device), dict(zip(names, numbers))
    return {name: loaded[name] for name in parts} | {"reward": WeightedSum(parts)} | loaded


def load_judges(specs, device):
    """{name: judge}."""
    return {name: load_judge(spec, device) for name, spec in named_judges(specs).items()}
