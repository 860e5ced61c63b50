"""How does REINFORCE with a moving-average baseline differ from RLOO? In the variance of its gradient.

    python benchmarks/baselines.py --out runs/baselines                                     # neutral openings
    python benchmarks/baselines.py --prompts runs/toy/reviews.jsonl --prompt-tokens 22 --out runs/baselines-begun

With N answers a step, k to each of N/k prompts, and σ²_x = Var_x(E[R|x]), σ²_y = E_x[Var(R|x)], the mean square of the
advantage, to which the gradient's variance is roughly proportional, is

    no baseline      (E R)² + σ²_x + σ²_y
    moving average            σ²_x + σ²_y          a constant takes away the level of the reward, not the prompt's worth
    RLOO                        k/(k−1) · σ²_y     the mean of k − 1 neighbours takes away both, but is noisy itself

and RLOO sees N/k prompts instead of N. First all seven baselines at the fixed policy π_sft: variance and direction of
the gradient of one step. Then training with the same number of answers, a run per seed.
"""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_reinforce
from rlhf_min import toy
from rlhf_min.evaluation import format_table, judge_weights, load_task, mean_se
from rlhf_min.reinforce import MovingAverageBaseline, leave_one_out, policy_gradient_loss
from rlhf_min.reward_model import judge_answers
from rlhf_min.rollout import sample, token_logprobs, uniform_numbers
from rlhf_min.support.batches import Batches
from rlhf_min.support.errors import UserError, one_line_errors
from rlhf_min.support.models import get_weights, set_weights
from rlhf_min.support.options import flag_of, option, parse_options
from rlhf_min.support.precision import resolve_device
from rlhf_min.support.runlog import RunLog
from train_rm import prepare_world

WAYS = {  # how to train: k, and the baseline
    "moving average, k = 1": (1, "moving-average"),
    "RLOO, k = 2": (2, "leave-one-out"),
    "RLOO, k = 4": (4, "leave-one-out"),
    "moving average, k = 4": (4, "moving-average"),
}


@dataclass
class BaselineOptions(train_reinforce.ReinforceOptions):
    """Compare baselines: the gradient's variance at a fixed policy, then training at equal numbers of answers."""

    script: ClassVar[str] = "benchmarks/baselines.py"

    sequences: int = option(64, "answers a batch", low=8)
    batches: int = option(200, "batches of the variance", low=2)
    past: int = option(20, "batches before, which only fill the moving averages", low=1)
    reference_sequences: int = option(20_000, "answers of the gradient that directions are compared with", low=64)
    seeds: int = option(4, "training runs of each kind; 0 trains none", low=0)
    save_every: int = option(0, "no checkpoints: a comparison is not resumed", low=0, high=0)

    def check(self):
        for name in ("sequences", "batch_size"):
            if getattr(self, name) % 4:
                raise UserError(f"{flag_of(name)} {getattr(self, name)} must be a multiple of 4")
        refuse(self, "baseline", "num_generations", "sigma", "resume", "lora_r")
        super().check()


def refuse(options, *names):
    """UserError where one of these options is given, which a comparison sets itself."""
    for name in names:
        if getattr(options, name) != getattr(type(options)(), name):
            raise UserError(f"{flag_of(name)}: the comparison sets it itself; leave it out")


def sample_gradients(task, prompts, generator, options):
    """A batch of answers to N/k prompts: rewards (N,), and advantage (N,) → gradient (n,) of the step's loss."""
    uniform = uniform_numbers(len(prompts), options.max_length, generator)  # (N, max_length)
    rollout = sample(task.policy, [prompt.tokens for prompt in prompts], uniform, options.temperature)
    scores, _ = judge_answers({"reward": task.judges["reward"]}, task.tokenizer, prompts, rollout)
    logprobs = token_logprobs(task.policy, rollout, options.temperature)  # (N, T)

    def gradient(advantage):
        loss = policy_gradient_loss(logprobs, advantage, rollout.mask)
        parts = torch.autograd.grad(loss, list(task.policy.parameters()), retain_graph=True)
        return torch.cat([part.flatten() for part in parts])  # (n,)

    return scores["reward"], gradient


def measure_gradients(task, options, log):
    """{baseline: gradients (batches, n)}, the reference gradient (n,), the decomposition of the reward's variance."""
    generator = torch.Generator().manual_seed(options.seed)
    gradients = {}
    add = lambda name, gradient: gradients.setdefault(name, []).append(gradient)
    streams = {k: Batches(task.prompts, options.sequences // k, generator) for k in (1, 2, 4)}
    mean, ema, within, group_means, rewards = MovingAverageBaseline(), None, [], [], []
    for step in log.progress("gradients", options.past + options.batches, dict):
        reward, gradient = sample_gradients(task, next(streams[1]), generator, options)
        if step > options.past:  # the gradient is linear in the advantage: two of them make five
            of_reward, of_one = gradient(reward), gradient(torch.ones_like(reward))
            n, batch_mean = len(reward), reward.mean()
            add("none", of_reward)
            add("mean of the past", of_reward - mean.value * of_one)
            add("EMA of the past", of_reward - ema * of_one)
            add("leave-one-out over the batch", n / (n - 1) * (of_reward - batch_mean * of_one))
            add("mean of the batch, self-included", of_reward - batch_mean * of_one)
            rewards.append(reward)
        mean.update(reward)
        ema = reward.mean().item() if ema is None else 0.9 * ema + 0.1 * reward.mean().item()
        for k in (2, 4) if step > options.past else ():
            batch = [prompt for prompt in next(streams[k]) for _ in range(k)]
            reward, gradient = sample_gradients(task, batch, generator, options)
            groups = reward.view(-1, k)
            add(f"RLOO, k = {k}", gradient(leave_one_out(groups).flatten()))
            if k == 4:
                within.append(groups.var(-1).mean().item())
                group_means.append(groups.mean(-1))
    sigma_y2 = mean_se(within)[0]
    sigma_x2 = torch.cat(group_means).var().item() - sigma_y2 / 4
    spread = {"level": torch.cat(rewards).mean().item(), "between prompts": sigma_x2, "within prompts": sigma_y2}

    reference = torch.zeros_like(gradients["none"][0])  # (n,)
    for _ in log.progress("reference", options.reference_sequences // options.sequences, dict):
        reward, gradient = sample_gradients(task, next(streams[1]), generator, options)
        reference += gradient(leave_one_out(reward[None])[0])
    return {name: torch.stack(rows) for name, rows in gradients.items()}, reference, spread


def variance_table(gradients, reference, spread):
    """A row per baseline: measured and predicted variance relative to none, cosine to the reference gradient."""
    level2, x2, y2 = spread["level"] ** 2, spread["between prompts"], spread["within prompts"]
    predicted = {"none": level2 + x2 + y2, "RLOO, k = 2": 2 * y2, "RLOO, k = 4": 4 / 3 * y2}
    squares = {name: (rows - rows.mean(0)).square().sum(-1) for name, rows in gradients.items()}  # (batches,) each
    whole = squares["none"].mean()
    table = []
    for name, rows in gradients.items():
        cosines = torch.cosine_similarity(rows, reference[None], dim=-1)  # (batches,)
        of_mean = torch.cosine_similarity(rows.mean(0), reference, dim=0).item()
        table.append({
            "baseline": name, "variance": (squares[name].mean() / whole).item(),
            "variance_se": (squares[name].std() / whole / math.sqrt(len(rows))).item(),
            "predicted": predicted.get(name, x2 + y2) / predicted["none"],
            "cosine": cosines.mean().item(), "cosine_se": (cosines.std() / math.sqrt(len(cosines))).item(),
            "cosine of the mean": of_mean,
        })  # fmt: skip
    return table


def over_seeds(rows):
    """One row from a row per seed: means, and standard errors over seeds."""
    merged = {}
    for key in rows[0]:
        if not key.endswith("_se"):  # one row's own error, over pairs or prompts
            merged[key], merged[f"{key}_se"] = mean_se([row[key] for row in rows])
    return merged


def train_at_equal_sequences(task, options, log):
    """A row per way to train: the mean reward of all steps, and what the policy is worth at the end, ± over seeds."""
    sft, rows = get_weights(task.policy), []
    for name, (k, baseline) in WAYS.items():
        results = []
        for seed in range(1, options.seeds + 1):
            run_options = dataclasses.replace(options, num_generations=k, baseline=baseline, seed=seed)
            set_weights(task.policy, sft)
            train_reinforce.train_policy(task, sft, run_options, log)
            lines = (log.folder / "metrics.jsonl").read_text("ascii").splitlines()[-options.steps :]  # of this run
            steps = [json.loads(line)["reward"] for line in lines]
            row, _ = judge_weights(task, run_options, sft, get_weights(task.policy))
            results.append({"reward over training": mean_se(steps)[0], **row})
        rows.append({"way": name, **over_seeds(results)})
    return rows


@one_line_errors
def main(argv=None):
    options = parse_options(BaselineOptions, argv)
    device = resolve_device(options)
    log = RunLog(options)
    prepare_world([options.prompts, options.policy, *options.reward_model])
    options.judges = options.judges or toy.JUDGES  # for begun reviews, too, which are another file of the same world
    task = load_task(options, device)
    with log.running():
        gradients, reference, spread = measure_gradients(task, options, log)
        table = variance_table(gradients, reference, spread)
        text = f"{format_table(table)}\n\nvariance of the reward: "
        text += ", ".join(f"{name} {value:.3f}" for name, value in spread.items())
        training = train_at_equal_sequences(task, options, log) if options.seeds else []
        text += f"\n\n{format_table(training)}" if training else ""
        print(f"\n{text}\n")
        (log.folder / "table.md").write_text(text + "\n", encoding="utf-8")
        log.finish(variance=table, spread=spread, training=training)


if __name__ == "__main__":
    main()
