"""The REINFORCE report's two levels, compared, and whether its σ weight helps.

    python benchmarks/levels.py --seeds 4 --out runs/levels

Level 1 is a scalar reward model, level 2 an ordinal one; a policy is trained against each. Their rewards have different
units, so the policies are compared by what neither was trained on, the gold score, at the same KL to π_sft; the reward
models judge each other's policies in z-scores. The arms of level 2, each with strict and with half ties:

    off          A = R − b
    advantage    A = (R − b) f(σ),  f = 1/(1+σ), the report's; biased
    constant     A = (R − b) mean f: no σ. Adam divides a constant factor out again, but for clipping and ε
    penalty      r' = r − σ before KL and baseline; unbiased, of another objective
    folded       r' = r f(σ) before KL and baseline; likewise
    shrunk       r' = r mean f, what folding does to the reward's weight against β, without σ

Every seed has reward models, policies and samples of its own.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_reinforce
import train_rm
from benchmarks.baselines import over_seeds, refuse
from benchmarks.reward_models import load_rated_pairs, measure
from rlhf_min import toy
from rlhf_min.evaluation import format_table, judge_policy, load_task, match_kl, mean_se, win_rate, z_score
from rlhf_min.reinforce import sigma_weight
from rlhf_min.reward_model import load_judges
from rlhf_min.rollout import load_policy
from rlhf_min.support.errors import UserError, one_line_errors
from rlhf_min.support.models import get_weights, set_weights
from rlhf_min.support.options import option, parse_options
from rlhf_min.support.precision import resolve_device
from rlhf_min.support.runlog import RunLog

HEADS = {"scalar": [], "strict": ["--head", "ordinal"], "half": ["--head", "ordinal", "--ties", "half"]}
ARMS = ["off", "advantage", "constant", "penalty", "folded", "shrunk"]


@dataclass
class LevelOptions(train_reinforce.ReinforceOptions):
    """Train reward models of both levels and a policy for every arm, and compare them."""

    script: ClassVar[str] = "benchmarks/levels.py"

    seeds: int = option(4, "repetitions", low=1)
    save_every: int = option(0, "no checkpoints: a comparison is not resumed", low=0, high=0)
    arms: list = option(ARMS, f"arms of level 2: off, then any of {', '.join(ARMS[1:])} (default: all)")
    match_kl: float = option(1.0, "nats of KL at which the policies are compared", low=0.01)

    def check(self):
        if self.arms[:1] != ["off"] or set(self.arms) - set(ARMS):
            raise UserError(f"--arms are off, and then any of {', '.join(ARMS[1:])}")
        refuse(self, "policy", "prompts", "reward_model", "judges", "sigma", "seed", "baseline", "num_generations",
               "lora_r", "resume")  # fmt: skip
        super().check()


def arm_settings(arm, judge, answers, options):
    """(reward model, --sigma, β) of an arm. A constant factor on R − b is one on r and one on β.

    The constant is the mean of f(σ) over π_sft's `answers`: prompts, completions, ended.
    """
    f = sigma_weight(judge(*answers)[1]).mean().item()
    if arm in ("constant", "shrunk"):
        return reweighted(judge, lambda sigma: f), "off", options.beta * (f if arm == "constant" else 1)
    if arm == "folded":
        return reweighted(judge, sigma_weight), "off", options.beta
    return judge, arm, options.beta  # off, advantage, penalty


def reweighted(judge, weight):
    """A judge whose reward is r · weight(σ)."""

    def reweighted_judge(*inputs):
        reward, sigma = judge(*inputs)
        return reward * weight(sigma), sigma

    return reweighted_judge


def compare_arms(seed, task, reference, options, log):
    """Train and judge every arm at one seed: {(arm, at): row}, `at` the end of training or matched KL."""
    policy, tokenizer, judges, _, eval_prompts = task
    sft, options = get_weights(reference), dataclasses.replace(options, seed=seed)
    before = judge_policy(reference, tokenizer, eval_prompts, judges, options)
    answers = before["prompt"], before["completion"], torch.tensor(before["ended"])
    rows, level_1, off = {}, {}, {}
    for head, arm in [("scalar", "off"), *((head, arm) for head in ("strict", "half") for arm in options.arms)]:
        set_weights(policy, sft)
        reward_model, sigma, beta = arm_settings(arm, judges[head], answers, options)
        arm_options = dataclasses.replace(options, sigma=sigma, beta=beta)
        train_reinforce.train_policy(task._replace(judges={"reward": reward_model}), sft, arm_options, log)
        for at, eta in (("end", 1.0), ("matched", None)):
            eta = eta or match_kl(policy, tokenizer, eval_prompts, options, reference, options.match_kl)
            columns = judge_policy(policy, tokenizer, eval_prompts, judges, options, reference)
            level_1.setdefault(at, columns["gold"])  # the first arm's
            if arm == "off":
                off[at] = columns["gold"]
            row = {"eta": eta, "kl": mean_se(columns["kl"])[0]}
            row["gold"] = mean_se(columns["gold"])[0]
            row |= {f"{judge}_z": z_score(columns[judge], before[judge]) for judge in [*HEADS, "gold"]}
            row["win_rate_sft"] = win_rate(columns["gold"], before["gold"])
            row["win_rate_level_1"] = win_rate(columns["gold"], level_1[at])
            for name, other in {"level_1": level_1, "off": off}.items():  # paired: the same seed and prompts
                row[f"gold_minus_{name}"] = row["gold"] - mean_se(other[at])[0]
            rows[f"{head}, {arm}", at] = row
    return rows


@one_line_errors
def main(argv=None):
    options = parse_options(LevelOptions, argv)
    device = resolve_device(options)
    log = RunLog(options)
    train_rm.prepare_world([options.prompts, toy.EVAL_PAIRS, options.policy, *options.reward_model])
    task = load_task(options, device)
    reference, _ = load_policy(options.policy, device, options.max_length)
    pairs, ratings = load_rated_pairs(toy.EVAL_PAIRS)
    with log.running():
        machine = ["--device", options.device, "--precision", options.precision]
        quality, results = {head: [] for head in HEADS}, {}
        for seed in range(1, options.seeds + 1):
            folders = {head: f"{log.folder}/{head}{seed}" for head in HEADS}
            for head, flags in HEADS.items():
                train_rm.main([*flags, *machine, "--seed", str(seed), "--out", folders[head]])
            judges = load_judges([f"{head}={folder}" for head, folder in folders.items()] + toy.JUDGES, device)
            for head in HEADS:
                quality[head].append(measure(judges[head], pairs, ratings))
            rows = compare_arms(seed, task._replace(judges=judges), reference, options, log)
            for key, row in rows.items():
                results.setdefault(key, []).append(row)

        tables = {"quality": [{"head": head, **over_seeds(rows)} for head, rows in quality.items()]}
        for at in ("end", "matched"):
            tables[at] = [{"arm": arm, **over_seeds(rows)} for (arm, when), rows in results.items() if when == at]
        text = "".join(f"{title}\n\n{format_table(rows)}\n\n" for title, rows in tables.items())
        print("\n" + text)
        (log.folder / "table.md").write_text(text, encoding="utf-8")
        by_seed = [{"arm": arm, "at": at, "seed": seed, **row} for (arm, at), rows in results.items()
                   for seed, row in enumerate(rows, 1)]  # fmt: skip
        log.finish(**tables, by_seed=by_seed)


if __name__ == "__main__":
    main()
