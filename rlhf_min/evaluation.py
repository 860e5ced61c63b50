"""Sampling a policy on held-out prompts, judging the answers, and the statistics of it."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from . import toy
from .data import load_prompts, split_prompts
from .lora import LoRAOptions, add_lora, lora_disabled
from .reinforce import prefix_kl
from .reward_model import judge_answers, load_judges_of_task
from .rollout import completion_logits, load_policy, sample, uniform_numbers
from .support.errors import UserError
from .support.models import checkpoint_gradients, get_weights, set_weights
from .support.options import RunOptions, option
from .support.precision import autocast
from .warp import interpolate


@dataclass
class SamplingOptions(RunOptions):
    """What every script has that samples answers."""

    prompts: str = option(toy.PROMPTS, "x: lines with 'prompt', or with 'text', whose first tokens are the prompt")
    columns: list = option([], "new=old: other names of the fields of prompts; =old leaves a field out")
    prompt_tokens: int = option(10, "tokens of a 'text' that make a prompt", low=1)
    max_prompt_characters: int = option(0, "leave out longer prompts; 0 keeps all", low=0)
    temperature: float = option(0.7, "of sampling and scoring: it belongs to the policy", low=0.01)
    max_length: int = option(64, "tokens of prompt and answer", low=2)
    batch_size: int = option(64, "answers per forward pass", low=1)


@dataclass
class TaskOptions(SamplingOptions, LoRAOptions):
    """What names a Task: the policy, its judges, its prompts, and how it is trained."""

    policy: str = option(toy.POLICY, "π_sft: a run folder, a transformers folder, an adapter or a hub name")
    reward_model: list = option([toy.REWARD_MODEL], "r: a reward model of either head, folder:LABEL of a classifier, "
                                "package.module.function, or several, which are added up (default: the embedded "
                                "world's)")  # fmt: skip
    reward_weights: list = option([], "a weight for each of several --reward-model")
    judges: list = option([], "name=spec of other judges: watched, not trained on (the embedded world has its own)")
    eval_prompts: str = option("", "prompts of the evaluation (default: some of --prompts are held out)")
    num_eval_prompts: int = option(256, "how many prompts to evaluate on", low=2)
    eval_every: int = option(0, "steps between evaluations while training, with three answers; 0 has none", low=0)
    gradient_accumulation_steps: int = option(1, "passes per optimizer step, of --batch-size answers each", low=1)
    gradient_checkpointing: bool = option(False, "compute activations twice instead of keeping them: less memory")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0 never clips", low=0)

    @property
    def answers(self):
        """B: the answers of an optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps


class Task(NamedTuple):
    """What a training needs: the policy, its judges (`reward` trains it, the others watch), and prompts."""

    policy: nn.Module
    tokenizer: object
    judges: dict
    prompts: list
    eval_prompts: list  # held out

    @property
    def cheap_judges(self):
        """The reward, and the judges that are functions: so cheap that every step of a training can have them."""
        rewards = ("reward", *getattr(self.judges["reward"], "parts", ()))
        return {name: judge for name, judge in self.judges.items() if name in rewards or judge.is_function}

    def eval_metrics(self, options, sft, step, kept=None):
        """At every --eval-every-th step, what its metrics line says of the held-out prompts; else {}.

        With --keep best, `kept` then holds the weights of the evaluation with the best r − β KL.
        """
        if not options.eval_every or step % options.eval_every:
            return {}
        columns = judge_policy(self.policy, self.tokenizer, self.eval_prompts, self.judges, options, self.policy, sft)
        means = {f"eval_{name}": mean_se(columns[name])[0] for name in [*self.judges, "kl"]}
        samples = zip(columns["prompt"][:3], columns["completion"])
        if kept and options.keep == "best":
            value = means["eval_reward"] - options.beta * means["eval_kl"]
            if value > kept.get("value", -math.inf):
                kept |= {"value": value, "step": step, "weights": get_weights(self.policy)}
        return means | {"samples": [{"prompt": prompt, "completion": answer} for prompt, answer in samples]}


def load_task(options, device):
    """The Task that the options of a script name; with --lora-r, the policy has its adapters."""
    policy, tokenizer = load_policy(options.policy, device, options.max_length)
    specs = options.judges or (toy.JUDGES if options.prompts == toy.PROMPTS else [])
    judges = load_judges_of_task(options.reward_model, options.reward_weights, specs, device)
    prompts, eval_prompts = prompts_of(options, tokenizer)
    torch.manual_seed(options.seed)
    if options.lora_r:
        add_lora(policy, options.lora_r, options.lora_alpha, target_modules=options.lora_target_modules)
    if options.gradient_checkpointing:
        checkpoint_gradients(policy)
    return Task(policy, tokenizer, judges, prompts, eval_prompts)


def prompts_of(options, tokenizer):
    """(training, held-out) prompts of a run."""
    files = [options.prompts, options.eval_prompts]
    prompts, eval_prompts = (load_prompts(file, tokenizer, options) if file else [] for file in files)
    return split_prompts(prompts, eval_prompts, options.num_eval_prompts)


@torch.no_grad()
def judge_policy(policy, tokenizer, prompts, judges, options, reference=None, reference_weights=None):
    """One answer to every prompt: {column: list of one value per prompt}.

    Columns are `prompt`, `completion`, `length` (tokens), `ended` (0 or 1), the name of every judge, and `kl`, which
    estimates KL(policy ‖ reference) per answer, in nats, and is empty without a reference. The reference's adapters are
    off, and `reference_weights` replace its weights. `options` has temperature, max_length, batch_size, precision and
    seed. The same seed means the same random numbers for every policy, from a generator of its own: evaluation leaves
    the training's random state alone.
    """
    generator = torch.Generator().manual_seed(options.seed)
    columns = {name: [] for name in ["prompt", "completion", "length", "ended", *judges, "kl"]}
    for start in range(0, len(prompts), options.batch_size):
        batch = prompts[start : start + options.batch_size]
        uniform = uniform_numbers(len(batch), options.max_length, generator)  # (B, max_length)
        with autocast(policy.device, options.precision):
            rollout = sample(policy, [prompt.tokens for prompt in batch], uniform, options.temperature)
        if reference is not None:  # no autocast: bfloat16 rounds away the very difference that KL measures
            logits = completion_logits(policy, rollout, options.temperature)  # (B, T, V)
            with lora_disabled(reference):
                ref_logits = completion_logits(reference, rollout, options.temperature, reference_weights)  # (B, T, V)
            columns["kl"] += prefix_kl(logits, ref_logits, rollout.mask).tolist()
        scores, completions = judge_answers(judges, tokenizer, batch, rollout)
        for name in judges:
            columns[name] += scores[name].tolist()
        columns["prompt"] += [prompt.text for prompt in batch]
        columns["completion"] += completions
        columns["length"] += rollout.mask.sum(-1).tolist()
        columns["ended"] += rollout.ended.int().tolist()
    return columns


def judge_weights(task, options, sft, weights):
    """(table row, columns) of the task's policy at `weights`, with its KL to the weights `sft`.

    The policy, which must have no adapters, is a place to put the weights in.
    """
    set_weights(task.policy, weights)
    columns = judge_policy(task.policy, task.tokenizer, task.eval_prompts, task.judges, options, task.policy, sft)
    return summarise(columns, task.judges), columns


def sweep_front(task, options, sft, merged, etas=(0.0, 0.25, 0.5, 0.75, 1.0)):
    """The KL–reward front of WARP: a row for each η of θ = (1−η) θ_sft + η θ_slerp, and the answers.

    All rows share prompts and random numbers, so η = 0 is θ_sft itself, at a KL of exactly 0.
    """
    points = [judge_weights(task, options, sft, interpolate(sft, merged, eta)) for eta in etas]
    return [{"eta": eta, **row} for eta, (row, _) in zip(etas, points)], [columns for _, columns in points]


def mean_se(values):
    """(mean, standard error of the mean); the error of fewer than two values is NaN, as is the mean of none."""
    n = len(values)
    mean = sum(values) / n if n else math.nan
    variance = sum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else math.nan
    return mean, math.sqrt(variance / n) if n else math.nan


def distinct_2(texts):
    """Distinct word pairs over all word pairs of the texts, in [0, 1]: it falls when a policy repeats itself."""
    pairs = [pair for text in texts for pair in pairwise(text.split())]
    return len({*pairs}) / max(1, len(pairs))


def summarise(columns, judge_names):
    """Means and standard errors of judge_policy's columns as one flat row."""
    row = {}
    for name in [*judge_names, "kl"]:
        row[name], row[f"{name}_se"] = mean_se(columns[name])
    row["length"], row["eos_rate"] = mean_se(columns["length"])[0], mean_se(columns["ended"])[0]
    row["distinct_2"] = distinct_2(columns["completion"])
    return row


def match_kl(policy, tokenizer, prompts, options, reference, target, halvings=10):
    """Move the policy towards the reference, θ = (1−η) θ_ref + η θ, until KL(π_θ ‖ π_ref) is `target`; returns η.

    Bisection, as KL grows with η. A policy that is nearer than that is left as it is, at η = 1. A policy that moves
    further from the reference gets more reward, so policies are compared at the same KL. UserError for another
    architecture.
    """
    start, end = get_weights(reference), get_weights(policy)
    shapes = [{name: tensor.shape for name, tensor in weights.items()} for weights in (start, end)]

    def kl_at(eta):
        set_weights(policy, interpolate(start, end, eta))
        return mean_se(judge_policy(policy, tokenizer, prompts, {}, options, reference)["kl"])[0]

    if shapes[0] != shapes[1] or kl_at(0.0) > 0:  # the same shapes, but e.g. another number of heads
        set_weights(policy, end)
        raise UserError("--match-kl needs policies of one architecture")
    low, high = 0.0, 1.0
    if kl_at(high) <= target:
        return high
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if kl_at(middle) < target else (low, middle)
    set_weights(policy, interpolate(start, end, high))
    return high


def z_score(values, reference):
    """How many standard deviations of the reference's rewards the mean lies above its mean (2210.10760).

    Judges have units of their own: a Bradley–Terry reward is free up to a shift, a mean rating up to its order. NaN
    where the reference's rewards do not vary.
    """
    mean, error = mean_se(reference)
    varies = max(reference) > min(reference)  # rounding leaves constants a deviation of 1e-17
    return (mean_se(values)[0] - mean) / (error * math.sqrt(len(reference))) if varies else math.nan


def paired_difference(values, reference, generator, resamples=2000):
    """Mean of values − reference, pair by pair, and its 95 % bootstrap interval (percentile): (mean, low, high)."""
    difference = torch.tensor(values, dtype=torch.float64) - torch.tensor(reference, dtype=torch.float64)  # (N,)
    picks = torch.randint(len(difference), (resamples, len(difference)), generator=generator)
    low, high = difference[picks].mean(-1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return difference.mean().item(), low, high


def win_rate(values, reference):
    """Share of pairs in which `values` is higher; a tie counts ½."""
    return sum((v > b) + 0.5 * (v == b) for v, b in zip(values, reference)) / len(values)


def print_samples(policies, count=3):
    """Print the answers of {policy: columns} to the first prompts; returns [{"prompt", policy: answer}]."""
    prompts = next(iter(policies.values()))["prompt"]
    answers = {"prompt": prompts} | {name: columns["completion"] for name, columns in policies.items()}
    samples = [dict(zip(answers, row)) for row in zip(*answers.values())][:count]
    for row in samples:
        print("\n" + format_sample(row))
    return samples


def format_sample(row):
    """A prompt, of a conversation its last message, and the answers to it, a line each."""
    width = max(map(len, row))
    texts = {name: text if isinstance(text, str) else text[-1]["content"] for name, text in row.items()}
    return "\n".join(f"{name:{width}}  {' '.join(text.split())}" for name, text in texts.items())


def format_table(rows):
    """Rows (dictionaries) as a Markdown table with all of their columns, those of the longest row first.

    Where the row has them, `column` shows `column_se` behind ±, or `column_low` and `column_high` in brackets.
    """

    def cell(row, name):
        value, error = row.get(name), row.get(f"{name}_se")
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "–"
        if not isinstance(value, float):
            return str(value)
        interval = f" [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]" if f"{name}_low" in row else ""
        return f"{value:.3f}" + (interval if error is None or math.isnan(error) else f" ± {error:.3f}")

    columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    columns = [name for name in columns if not name.endswith(("_se", "_low", "_high"))]
    lines = [columns, ["---"] * len(columns), *([cell(row, name) for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
