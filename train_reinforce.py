"""REINFORCE for language models (Back to Basics, 2402.14740): one answer is one action.

    python train_reinforce.py                               # the embedded world: offline, half a minute on two cores
    python train_reinforce.py --baseline leave-one-out --num-generations 4    # RLOO
    torchrun --nproc-per-node 2 train_reinforce.py          # two processes share each batch

The algorithm:

    for each of T steps:                                                                         train_policy
        y ~ π_θ(·|x), its reward r(x, y), and its log-probs under π_θ and π_sft
        (1)  R = r − β log[ π_θ(y|x) / π_sft(y|x) ],      A = R − b
        (2)  θ ← Opt(θ, A ∇ log π_θ(y|x)),      b ← the mean of all R so far

Unlike in PPO there is no critic, an answer's tokens share one advantage, and a batch makes one step. The mathematics is
in rlhf_min/reinforce.py. Compare train_policy here and in train_warp.py: but for σ, RLOO and --keep, all that differs
is WARP.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlhf_min import reinforce
from rlhf_min.evaluation import TaskOptions, format_table, load_task, print_samples, sweep_front
from rlhf_min.lora import dense_weights, lora_disabled, merge_lora, save_adapter
from rlhf_min.reward_model import judge_answers, named_judges
from rlhf_min.rollout import sample, token_logprobs, uniform_numbers
from rlhf_min.support import parallel
from rlhf_min.support.batches import Batches
from rlhf_min.support.errors import UserError, one_line_errors
from rlhf_min.support.models import save_model, set_weights, trained_weights
from rlhf_min.support.options import option, parse_options
from rlhf_min.support.plots import plot_metrics
from rlhf_min.support.precision import Optimizer, resolve_device
from rlhf_min.support.runlog import RunLog
from train_rm import prepare_world

BASELINES, SIGMA_USES = ["moving-average", "leave-one-out"], ["off", "advantage", "penalty"]


@dataclass
class ReinforceOptions(TaskOptions):
    """Train a policy with REINFORCE."""

    script: ClassVar[str] = "train_reinforce.py"

    steps: int = option(150, "T: optimizer steps", low=1)
    lr: float = option(1e-4, "AdamW learning rate", low=0)
    beta: float = option(0.05, "β: weight of the KL to π_sft in the reward", low=0)
    baseline: str = option("moving-average", "b: mean of all past R, or of the k − 1 other answers", choices=BASELINES)
    num_generations: int = option(1, "k: answers to the same prompt; --batch-size counts answers", low=1)
    sigma: str = option("off", "σ: unused, f(σ) = 1/(1+σ) on the advantage, or r − σ", choices=SIGMA_USES)
    keep: str = option("last", "save the last weights, or the best by held-out r − β KL", choices=["best", "last"])

    def check(self):
        super().check()
        if self.answers % self.num_generations:
            raise UserError(f"--batch-size gives a step {self.answers} answers, no multiple of --num-generations")
        if self.keep == "best" and not 0 < self.eval_every <= self.steps:
            raise UserError("--keep best chooses among evaluations; set --eval-every to at most --steps")
        if self.baseline == "leave-one-out" and self.num_generations < 2:
            raise UserError("--baseline leave-one-out compares answers to one prompt; raise --num-generations to 2")


def train_policy(task, sft, options, log):
    """T steps of REINFORCE, in place; returns the step that --keep keeps. sft: the weights of π_sft."""
    policy, team, passes = task.policy, log.team, options.gradient_accumulation_steps
    k, rloo = options.num_generations, options.baseline == "leave-one-out"
    penalty = 1.0 if options.sigma == "penalty" else 0.0
    weight = reinforce.sigma_weight if options.sigma == "advantage" else torch.ones_like
    generator = torch.Generator().manual_seed(options.seed)
    baseline = reinforce.MovingAverageBaseline()
    optimizer = Optimizer(policy, options.lr, options.precision, max_grad_norm=options.max_grad_norm, team=team)
    stream = Batches(task.prompts, options.answers // k, generator)
    kept = {"step": options.steps}  # with --keep best: the best evaluation so far
    parts = {"baseline": vars(baseline), "optimizer": optimizer, "stream": stream, "kept": kept}
    state = lambda: {"policy": trained_weights(policy), **parts}  # what --resume goes on with

    for step in log.progress("REINFORCE", options.steps, state):
        # y ~ π_θ(·|x), and r(x, y)
        batch = team.share([prompt for prompt in next(stream) for _ in range(k)])
        uniform = team.share(uniform_numbers(options.answers, options.max_length, generator))  # (B, max_length)
        with optimizer.autocast():
            rollout = sample(policy, [prompt.tokens for prompt in batch], uniform, options.temperature)
        scores, _ = judge_answers(task.cheap_judges, task.tokenizer, batch, rollout)  # {name: (B,)}

        # log π(y_t | x, y_<t) under the policy and what it is compared with
        with optimizer.autocast():
            logprobs = token_logprobs(policy, rollout, options.temperature, passes=passes)  # (B, T)
            with torch.no_grad():
                with lora_disabled(policy):
                    sft_logprobs = token_logprobs(policy, rollout, options.temperature, sft, passes)  # (B, T)

        # (1) R = r − σ − β log[ π_θ(y|x) / π_sft(y|x) ],  A = (R − b) f(σ); σ and f only where --sigma asks for them
        kl = reinforce.kl_estimate(logprobs.detach(), sft_logprobs, rollout.mask)  # (B,)
        reward = scores["reward"] - penalty * scores["sigma"]  # (B,)
        shaped = reinforce.shaped_reward(reward, kl, options.beta)  # (B,)
        r_minus_b = reinforce.leave_one_out(shaped.view(-1, k)).flatten() if rloo else shaped - baseline.value  # (B,)
        advantage = r_minus_b * weight(scores["sigma"])  # (B,)

        # (2) θ ← Opt(θ, A ∇ log π)
        optimizer.backward(reinforce.policy_gradient_loss(logprobs, advantage, rollout.mask))
        moved = optimizer.step()
        if moved:  # False where float16 overflowed and the step was skipped
            baseline.update(team.gather(shaped))

        scores |= {"kl": kl, "advantage": advantage, "baseline": shaped - r_minus_b}
        metrics = reinforce.step_metrics(team, rollout, logprobs, scores)
        metrics |= task.eval_metrics(options, sft, step, kept)
        log.step(step=step, **metrics, **optimizer.metrics)
    if options.keep == "best":
        set_weights(policy, kept["weights"])
    return kept["step"]


@one_line_errors
def main(argv=None):
    options = parse_options(ReinforceOptions, argv)
    device = resolve_device(options)
    log = RunLog(options, parallel.join(options.answers, options.num_generations))
    prepare_world([options.prompts, options.policy, *options.reward_model, *named_judges(options.judges).values()])
    task = load_task(options, device)
    if options.sigma != "off" and not task.judges["reward"].has_sigma:
        raise UserError(f"--sigma {options.sigma}: {options.reward_model[0]} gives no σ; name an ordinal reward model")

    with log.running():
        sft = dense_weights(task.policy)
        step = train_policy(task, sft, options, log)
        if not log.writes:
            return
        if options.lora_r:
            save_adapter(task.policy, log.folder / "adapter", task.tokenizer)
        trained = dense_weights(task.policy)
        save_model(merge_lora(task.policy), task.tokenizer, log.folder / "model")

        (before, after), columns = sweep_front(task, options, sft, trained, etas=(0.0, 1.0))
        plot_metrics(log.metrics(), [*task.cheap_judges, "kl"], log.folder / "steps.png")
        print("\nHeld-out prompts, before and after\n")
        print(format_table([{"policy": "θ_sft", **before}, {"policy": "model/", **after}]))
        if options.keep == "best":
            print(f"\nmodel/ is step {step}, chosen on these very prompts: on others, expect a little less")
        samples = print_samples(dict(zip(("before", "after"), columns)))
        log.finish(before=before, after=after, samples=samples, step=step)


if __name__ == "__main__":
    main()
