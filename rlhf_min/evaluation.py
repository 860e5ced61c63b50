"""Sampling a policy on held-out prompts, judging the answers, and the statistics of it."""

import math
from collections import Counter
from itertools import pairwise

import torch

from .errors import UserError
from .lora import lora_disabled
from .models import eos_token_ids, get_weights, set_weights
from .parallel import in_turn
from .precision import autocast
from .reinforce import prefix_kl
from .reward_model import load_judge
from .rollout import completion_logits, decode_completions, sample
from .sources import named_judges
from .warp import interpolate


def load_judges(specs, device):
    """{name: judge}, named as sources.named_judges says."""
    return {name: load_judge(spec, device) for name, spec in named_judges(specs).items()}


@torch.no_grad()
def judge_policy(policy, tokenizer, prompts, judges, options, reference=None, reference_weights=None):
    """One answer to every prompt: {column: list of one value per prompt}.

    Columns are `prompt`, `completion`, `length` (tokens), `ended` (0 or 1), the name of every judge, and `kl`: the
    low-variance estimate of KL(policy ‖ reference) per answer in nats, where the reference is a model without its
    adapters, at other weights if given. `options` has temperature, max_length, batch_size, precision and seed. The same
    seed means the same random numbers for every policy, from a generator of its own: evaluation leaves the training's
    random state alone.
    """
    generator = torch.Generator().manual_seed(options.seed)
    eos, columns = eos_token_ids(policy, tokenizer), {"prompt": [], "completion": [], "length": [], "ended": []}
    columns |= {name: [] for name in [*judges, "kl"]}
    for start in range(0, len(prompts), options.batch_size):
        batch = prompts[start : start + options.batch_size]
        with autocast(policy.device, options.precision):
            rollout = sample(policy, [prompt.tokens for prompt in batch], options.max_length, options.temperature, eos,
                             tokenizer.pad_token_id, generator)  # fmt: skip
        if reference is not None:  # in float32: bfloat16 rounds away the very difference that KL measures
            logits = completion_logits(policy, rollout, options.temperature)  # (B, T, V)
            with lora_disabled(reference):
                ref_logits = completion_logits(reference, rollout, options.temperature, reference_weights)
            columns["kl"] += prefix_kl(logits, ref_logits, rollout.mask).tolist()
        texts, completions = [prompt.text for prompt in batch], decode_completions(tokenizer, rollout)
        for name, judge in judges.items():
            columns[name] += judge(texts, completions, rollout.ended)[0].tolist()
        columns["prompt"] += texts
        columns["completion"] += completions
        columns["length"] += rollout.mask.sum(-1).tolist()
        columns["ended"] += rollout.ended.int().tolist()
    return columns


def mean_se(values):
    """(mean, standard error of the mean); the error of fewer than two values is NaN, as is the mean of none."""
    n = len(values)
    mean = sum(values) / n if n else math.nan
    variance = sum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else math.nan
    return mean, math.sqrt(variance / n) if n else math.nan


def distinct_2(texts):
    """Distinct word pairs over all word pairs of the texts, in [0, 1]: it falls when a policy repeats itself."""
    pairs = Counter(pair for words in map(str.split, texts) for pair in pairwise(words))
    return len(pairs) / pairs.total() if pairs else 0.0


def summarise(columns, judge_names):
    """Means and standard errors of judge_policy's columns as one flat row."""
    row = {}
    for name in [*judge_names, "kl"]:
        row[name], row[f"{name}_se"] = mean_se(columns[name])
    row["length"], row["eos_rate"] = mean_se(columns["length"])[0], mean_se(columns["ended"])[0]
    row["distinct_2"] = distinct_2(columns["completion"])
    return row


def sweep_front(policy, tokenizer, prompts, judges, options, sft, merged, points=5):
    """The KL–reward front of WARP: a row for each η in [0, 1] of θ = (1−η) θ_sft + η θ_slerp, and the answers.

    All rows share prompts and random numbers, so η = 0 is θ_sft itself, at a KL of exactly 0. The policy is a place to
    put the weights in. Several processes take the rows in turn.
    """

    def point(eta):
        set_weights(policy, interpolate(sft, merged, eta))
        columns = judge_policy(policy, tokenizer, prompts, judges, options, policy, sft)
        return {"eta": eta, **summarise(columns, judges)}, columns

    front, columns = zip(*in_turn(point, [k / (points - 1) for k in range(points)]))
    return list(front), list(columns)


def match_kl(policy, tokenizer, prompts, options, reference, target, halvings=10):
    """Move the policy towards the reference, θ = (1−η) θ_ref + η θ, until KL(π_θ ‖ π_ref) is `target`; returns η.

    Bisection, as KL grows with η. A policy that is nearer than that is left as it is, at η = 1. Rewards of policies
    are comparable at the same KL only: whoever goes further gets more. Raises UserError for other architectures.
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
    return sum(0.5 + 0.5 * ((v > b) - (v < b)) for v, b in zip(values, reference)) / len(values)


def print_samples(before, after, count=3):
    """Print the first answers of two policies to the same prompts; returns [{"prompt", "before", "after"}]."""
    samples = [{"prompt": prompt, "before": old, "after": new} for prompt, old, new in
               zip(before["prompt"][:count], before["completion"], after["completion"])]  # fmt: skip
    for row in samples:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        print(f"\nprompt  {prompt}\nbefore  {row['before'].strip()}\nafter   {row['after'].strip()}")
    return samples


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
