"""What is a reward model worth? Accuracy, likelihood, calibration, agreement with ratings; does σ know its errors?

    python benchmarks/reward_models.py --reward-models runs/toy/reward_model runs/toy/ordinal_reward_model

Both heads give a probability that the chosen answer is better: σ(r_w − r_l), or P(i > j) + ½ P(i = j). Where the pairs
have ratings, the accuracy is also given by the gap between the two: a small gap is nearly a tie. The first row takes
the longer answer for the better one: a reward model that has learned more than length is right more often.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlhf_min import toy
from rlhf_min.data import encode_pairs, load_pairs
from rlhf_min.evaluation import format_table, mean_se
from rlhf_min.losses import preference_logprob
from rlhf_min.reward_model import load_judge, reward_and_sigma
from rlhf_min.support.errors import UserError, one_line_errors
from rlhf_min.support.options import RunOptions, option, parse_options
from rlhf_min.support.precision import resolve_device
from rlhf_min.support.rows import read_rows
from rlhf_min.support.runlog import RunLog
from train_rm import prepare_world


@dataclass
class QualityOptions(RunOptions):
    """Measure reward models on pairs that they were not trained on."""

    script: ClassVar[str] = "benchmarks/reward_models.py"

    reward_models: list = option([toy.REWARD_MODEL, toy.ORDINAL_REWARD_MODEL], "reward models to measure "
                                 "(default: both of the embedded world)")  # fmt: skip
    data: str = option(toy.EVAL_PAIRS, "pairs; with the fields chosen_rating and rejected_rating also rank agreement")
    max_length: int = option(512, "tokens; longer pairs are left out", low=8)


def load_rated_pairs(source):
    """Pairs and their ratings [(chosen, rejected)], or None where the data have none."""
    pairs, _ = load_pairs(source)
    rows = read_rows(source)
    rated, keys = all("chosen_rating" in row for row in rows), ("chosen_rating", "rejected_rating")
    if rated and not all(isinstance(row.get(key), int | float) for row in rows for key in keys):
        raise UserError(f"{source}: chosen_rating and rejected_rating must be numbers in every row")
    return pairs, [(row["chosen_rating"], row["rejected_rating"]) for row in rows] if rated else None


def spearman(a, b):
    """Rank correlation of two (N,) tensors; equal values share their mean rank."""
    rank = lambda x: ((x[:, None] > x).double() + 0.5 * (x[:, None] == x)).sum(-1)  # (N,)
    return torch.corrcoef(torch.stack([rank(a), rank(b)]))[0, 1].item()


def calibration_error(p, bins=10):
    """Expected calibration error of P(the first is better), p (N,), where the first *is* better.

    Confidence is max(p, 1−p); in each of `bins` equal steps from ½ to 1 it is compared with the share of right answers.
    """
    confidence, right = torch.maximum(p, 1 - p), (p > 0.5).double()
    step = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = [(confidence[step == i].mean() - right[step == i].mean()).abs() * (step == i).sum() for i in step.unique()]
    return (sum(gaps) / len(p)).item()


def encode_rated(pairs, ratings, judge, max_length):
    """The (chosen ids, rejected ids, margin) of the pairs that fit into `max_length`, and their ratings, or None."""
    encoded = [encode_pairs([pair], judge.tokenizer, min(max_length, judge.max_length))[0] for pair in pairs]
    rows = [row for found in encoded for row in found]  # a pair that is too long has none
    if not rows:
        raise UserError(f"no pair fits into --max-length {max_length}; raise it")
    return rows, ratings and [rating for found, rating in zip(encoded, ratings) if found]


def agreement(reward_w, reward_l, ratings):
    """Accuracy of rewards (N,), (N,) of chosen and rejected answers; with ratings also by their gap, and Spearman's."""
    right = (reward_w > reward_l).double()  # (N,)
    row = {"pairs": len(right), **named("accuracy", right)}
    if ratings is None:
        return row
    rating = torch.tensor(ratings).double()  # (N, 2)
    gap = (rating[:, 0] - rating[:, 1]).abs()  # (N,)
    for name, chosen in {"gap < 1": gap < 1, "gap 1 to 2": (gap >= 1) & (gap < 2), "gap ≥ 2": gap >= 2}.items():
        row |= named(f"accuracy at {name}", right[chosen]) if chosen.any() else {}
    return row | {"spearman": spearman(torch.cat([reward_w, reward_l]), rating.T.flatten())}


def named(name, values):
    """Mean and standard error of values (N,), as two columns of a table."""
    return dict(zip((name, f"{name}_se"), mean_se(values.tolist())))


def measure(judge, pairs, ratings, max_length=512):
    """One row of figures for a RewardModel on pairs; `ratings` belong to them, or are None."""
    rows, ratings = encode_rated(pairs, ratings, judge, max_length)
    batches = [rows[start : start + 64] for start in range(0, len(rows), 64)]
    logits_w, logits_l = (
        torch.cat([judge.logits([row[i] for row in batch]) for batch in batches]) for i in (0, 1)
    )  # (N, K) each
    (reward_w, sigma_w), (reward_l, sigma_l) = reward_and_sigma(logits_w), reward_and_sigma(logits_l)
    ordinal = logits_w.shape[1] > 1
    log_p = (preference_logprob(logits_w, logits_l, "half") if ordinal
             else torch.nn.functional.logsigmoid(reward_w - reward_l)).double()  # (N,)  # fmt: skip
    row = agreement(reward_w, reward_l, ratings)
    row |= {**named("nll", -log_p), "calibration_error": calibration_error(log_p.exp())}
    if ordinal:
        row["tie_mass"] = (logits_w.softmax(-1) * logits_l.softmax(-1)).sum(-1).mean().item()
        row["sigma"] = torch.cat([sigma_w, sigma_l]).mean().item()
    if ordinal and ratings is not None:
        # E is free up to its order, and ratings have units of their own, so errors are of standard scores
        standard = lambda x: (x - x.mean()) / x.std()
        truth = torch.tensor(ratings).double().T.flatten()  # (2N,)
        error = (standard(torch.cat([reward_w, reward_l]).double()) - standard(truth)).abs()  # (2N,)
        row["sigma_error_correlation"] = spearman(torch.cat([sigma_w, sigma_l]), error)
    return row


@one_line_errors
def main(argv=None):
    options = parse_options(QualityOptions, argv)
    device = resolve_device(options)
    log = RunLog(options)
    prepare_world([options.data, *options.reward_models])
    pairs, ratings = load_rated_pairs(options.data)
    judges = {name: load_judge(name, device) for name in options.reward_models}
    for name, judge in judges.items():
        if judge.is_function:
            raise UserError(f"--reward-models {name}: a function has no probabilities; name a trained model")
    encoded, kept = encode_rated(pairs, ratings, next(iter(judges.values())), options.max_length)
    lengths = torch.tensor([[len(chosen), len(rejected)] for chosen, rejected, _ in encoded])  # (N, 2), in tokens
    rows = [{"reward_model": "the longer answer", **agreement(*lengths.T, kept)}]
    rows += [{"reward_model": name, **measure(judge, pairs, ratings, options.max_length)}
             for name, judge in judges.items()]  # fmt: skip
    with log.running():
        table = format_table(rows)
        print("\n" + table + "\n")
        (log.folder / "table.md").write_text(table + "\n", encoding="utf-8")
        log.finish(rows=rows)


if __name__ == "__main__":
    main()
