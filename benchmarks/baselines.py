"""How does REINFORCE with a moving-average baseline differ from RLOO? In the variance of its gradient.

    python benchmarks/baselines.py --out runs/baselines                                     # neutral openings
    python benchmarks/baselines.py --prompts runs/toy/reviews.jsonl --prompt-tokens 22 --out runs/baselines-begun

With N answers a step, k to each of N/k prompts, and σ²_x = Var_x(E[R|x]), σ²_y = E_x[Var(R|x)], the mean square of the
advantage, to which the gradient's variance is nearly proportional, is

    no baseline      (E R)² + σ²_x + σ²_y
    moving average            σ²_x + σ²_y          a constant takes away the level of the reward, not the prompt's worth
    RLOO                        k/(k−1) · σ²_y     so does the mean of k − 1 neighbours, which is noisy itself

and RLOO sees N/k prompts instead of N. First all seven baselines at the fixed policy π_sft: variance and direction of
the gradient of one step. Then training with the same number of answers, a run per seed.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_reinforce
import train_rm
from rlhf_min import toy
from rlhf_min.batches import Batches
from rlhf_min.errors import UserError, one_line_errors
from rlhf_min.evaluation import format_table, judge_policy, mean_se
from rlhf_min.inputs import load_inputs
from rlhf_min.models import eos_token_ids, get_weights, set_weights
from rlhf_min.options import option, parse_options
from rlhf_min.precision import resolve_device
from rlhf_min.reinforce import MovingAverageBaseline, leave_one_out, policy_gradient_loss
from rlhf_min.rollout import decode_completions, sample, token_logprobs
from rlhf_min.runlog import RunLog


@dataclass
class BaselineOptions(train_reinforce.ReinforceOptions):
    """Compare baselines: the gradient's variance at a fixed policy, then training at equal numbers of answers."""

    script: ClassVar[str] = "benchmarks/baselines.py"
    parallel: ClassVar[bool] = False

    sequences: int = option(64, "answers a batch", low=8)
    batches: int = option(200, "batches of the variance", low=2)
    past: int = option(20, "batches before, which only fill the moving averages", low=1)
    reference_sequences: int = option(20_000, "answers of the gradient that directions are compared with", low=64)
    seeds: int = option(4, "training runs of each kind; 0 trains none", low=0)
    save_every: int = option(0, "no checkpoints: a comparison is not resumed", low=0, high=0)

    def check(self):
        for name in ("sequences", "batch_size"):
            if getattr(self, name) % 4:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be a multiple of 4")
        if self.baseline != "moving-average" or self.num_generations != 1:
            raise UserError("--baseline, --num-generations: the comparison sets them itself; leave them out")
        if self.resume:
            raise UserError("--resume: a comparison is not resumed; begin it again")
        if self.lora_r:
            raise UserError("--lora-r: the baselines are compared on all weights; leave it out")
        super().check()


def sample_gradients(policy, tokenizer, reward_model, prompts, generator, options):
    """A batch of answers to N/k prompts: rewards (N,), and advantage (N,) → gradient (n,) of the step's loss."""
    rollout = sample(policy, [prompt.tokens for prompt in prompts], options.max_length, options.temperature,
                     eos_token_ids(policy, tokenizer), tokenizer.pad_token_id, generator)  # fmt: skip
    texts = [prompt.text for prompt in prompts]
    reward, _ = reward_model(texts, decode_completions(tokenizer, rollout), rollout.ended)
    logprobs = token_logprobs(policy, rollout, options.temperature)

    def gradient(advantage):
        loss = policy_gradient_loss(logprobs, advantage, rollout.mask)
        parts = torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    return reward, gradient


def measure_gradients(policy, tokenizer, reward_model, prompts, options, log):
    """{baseline: gradients (batches, n)}, the reference gradient (n,), the decomposition of the reward's variance."""
    generator = torch.Generator().manual_seed(options.seed)
    gradients = {}
    add = lambda name, gradient: gradients.setdefault(name, []).append(gradient)
    streams = {k: Batches(prompts, options.sequences // k, generator) for k in (1, 2, 4)}
    mean, ema, within, group_means, rewards = MovingAverageBaseline(), None, [], [], []
    for step in log.progress("gradients", options.past + options.batches):
        reward, gradient = sample_gradients(policy, tokenizer, reward_model, next(streams[1]), generator, options)
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
            reward, gradient = sample_gradients(policy, tokenizer, reward_model, batch, generator, options)
            groups = reward.view(-1, k)
            add(f"RLOO, k = {k}", gradient(leave_one_out(groups).flatten()))
            if k == 4:
                within.append(groups.var(-1).mean().item())
                group_means.append(groups.mean(-1))
    sigma_y2 = mean_se(within)[0]
    sigma_x2 = torch.cat(group_means).var().item() - sigma_y2 / 4
    spread = {"level": torch.cat(rewards).mean().item(), "between prompts": sigma_x2, "within prompts": sigma_y2}

    reference = torch.zeros_like(gradients["none"][0])
    for _ in log.progress("reference", options.reference_sequences // options.sequences):
        reward, gradient = sample_gradients(policy, tokenizer, reward_model, next(streams[1]), generator, options)
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


def train_at_equal_sequences(policy, tokenizer, judges, prompts, eval_prompts, options, log):
    """A row per way to train: the mean reward of all steps, and what the policy is worth at the end, ± over seeds."""
    ways = {"moving average, k = 1": (1, "moving-average"), "RLOO, k = 2": (2, "leave-one-out"),
            "RLOO, k = 4": (4, "leave-one-out"), "moving average, k = 4": (4, "moving-average")}  # fmt: skip
    sft, rows = get_weights(policy), []
    for name, (k, baseline) in ways.items():
        results = []
        for seed in range(1, options.seeds + 1):
            run_options = dataclasses.replace(options, num_generations=k, baseline=baseline, seed=seed)
            set_weights(policy, sft)
            done = len(log.metrics())
            train_reinforce.train_policy(policy, tokenizer, judges["reward"], prompts, sft, run_options, log)
            columns = judge_policy(policy, tokenizer, eval_prompts, judges, run_options, policy, sft)
            result = {judge: mean_se(columns[judge])[0] for judge in [*judges, "kl"]}
            steps = [row["reward"] for row in log.metrics()[done:]]
            results.append({"reward over training": mean_se(steps)[0], **result})
        row = {"way": name}
        for key in results[0]:
            row[key], row[f"{key}_se"] = mean_se([result[key] for result in results])
        rows.append(row)
    return rows


@one_line_errors
def main(argv=None):
    options = parse_options(BaselineOptions, argv)
    options.check()
    device = resolve_device(options)
    log = RunLog(options)
    train_rm.prepare_inputs([options.prompts], [options.policy, options.reward_model])
    options.judges = options.judges or toy.JUDGES  # for begun reviews, too, which are another file of the same world
    policy, tokenizer, judges, prompts, eval_prompts = load_inputs(options, device)
    with log.running():
        gradients, reference, spread = measure_gradients(policy, tokenizer, judges["reward"], prompts, options, log)
        table = variance_table(gradients, reference, spread)
        text = format_table(table)
        text += "\n\nvariance of the reward: " + ", ".join(f"{name} {value:.3f}" for name, value in spread.items())
        rows = (
            train_at_equal_sequences(policy, tokenizer, judges, prompts, eval_prompts, options, log)
            if options.seeds
            else []
        )
        if rows:
            text += "\n\n" + format_table(rows)
        print("\n" + text + "\n")
        (log.folder / "table.md").write_text(text + "\n", encoding="utf-8")
        log.finish(variance=table, spread=spread, training=rows)


if __name__ == "__main__":
    main()
