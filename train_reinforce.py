"""REINFORCE for language models (Back to Basics, 2402.14740): one answer is one action.

    python train_reinforce.py                               # the embedded world: offline, half a minute on two cores
    python train_reinforce.py --reward-model runs/toy/ordinal_reward_model --sigma advantage --lora-r 8 --lr 3e-4
    torchrun --nproc-per-node 2 train_reinforce.py          # two processes share each batch

The mathematics is in rlhf_min/reinforce.py; `diff train_reinforce.py train_warp.py` shows what WARP adds. Unlike in
PPO there is no critic, an answer's tokens share one advantage, a batch makes one step, and nothing is clipped but the
gradient.
"""

from dataclasses import dataclass
from typing import ClassVar

from rlhf_min.errors import UserError, one_line_errors
from rlhf_min.options import PolicyOptions, option, parse_options, refuse_mistakes
from rlhf_min.preflight import has_sigma


@dataclass
class ReinforceOptions(PolicyOptions):
    """Train a policy with REINFORCE."""

    script: ClassVar[str] = "train_reinforce.py"
    parallel: ClassVar[bool] = True

    steps: int = option(150, "T: optimizer steps", low=1)
    num_generations: int = option(1, "k: answers to the same prompt; --batch-size counts answers", low=1)
    baseline: str = option("moving-average", "b: mean of all past shaped rewards, or of the k − 1 other answers (RLOO)",
                           choices=["moving-average", "leave-one-out"])  # fmt: skip
    beta: float = option(0.05, "β: weight of the KL to π_sft in the reward", low=0)
    sigma: str = option("off", "the judge's doubt: unused, f(σ) = 1/(1+σ) on the advantage, or r − λσ",
                        choices=["off", "advantage", "penalty"])  # fmt: skip
    sigma_coefficient: float = option(1.0, "λ of --sigma penalty", low=0)
    missing_eos_penalty: float = option(0.0, "taken from the reward of an answer without EOS", low=0)

    def check(self):
        super().check()
        if self.batch_size % self.num_generations:
            raise UserError(f"--batch-size {self.batch_size} must be a multiple of --num-generations "
                            f"{self.num_generations}")  # fmt: skip
        if self.sigma != "penalty" and self.sigma_coefficient != 1.0:
            raise UserError("--sigma-coefficient goes with --sigma penalty only; leave it out")
        if self.baseline == "leave-one-out" and self.num_generations < 2:
            raise UserError("--baseline leave-one-out compares answers to one prompt; set --num-generations to 2 or "
                            "more")  # fmt: skip
        self.check_sigma(has_sigma(self.reward_model))

    def check_sigma(self, there):
        """UserError where --sigma asks for the σ of a judge that gives none."""
        if self.sigma != "off" and not there:
            raise UserError(f"--sigma {self.sigma}: {self.reward_model} gives no σ; name an ordinal reward model")


if __name__ == "__main__":  # a mistake is told before torch takes its seconds to import
    refuse_mistakes(ReinforceOptions)

import torch

import train_rm  # which makes what is missing of the embedded world
from rlhf_min import parallel
from rlhf_min.batches import Batches
from rlhf_min.evaluation import format_table, judge_policy, print_samples, summarise
from rlhf_min.inputs import load_inputs
from rlhf_min.lora import lora_disabled, merge_lora, save_adapter
from rlhf_min.models import eos_token_ids, get_weights, save_model, trained_weights
from rlhf_min.plots import plot_metrics
from rlhf_min.precision import Optimizer, autocast, resolve_device
from rlhf_min.reinforce import (
    MovingAverageBaseline,
    kl_estimate,
    leave_one_out,
    policy_gradient_loss,
    shaped_reward,
    sigma_weight,
    step_metrics,
)
from rlhf_min.rollout import decode_completions, sample, token_logprobs
from rlhf_min.runlog import RunLog


def train_policy(policy, tokenizer, judge, prompts, sft, options, log):
    """T steps of REINFORCE, in place. `sft`: π_sft's weights, or None where it is the policy without its adapters."""
    team = log.team  # who share a batch
    k, rloo = options.num_generations, options.baseline == "leave-one-out"
    baseline = MovingAverageBaseline()
    optimizer = Optimizer(policy.parameters(), options.lr, policy.device, options.precision, options.warmup_steps,
                          max_grad_norm=options.max_grad_norm, team=team)  # fmt: skip
    sigma_coefficient = options.sigma_coefficient if options.sigma == "penalty" else 0.0
    weight = sigma_weight if options.sigma == "advantage" else torch.ones_like
    generator = torch.Generator().manual_seed(options.seed)
    stream = Batches(prompts, options.batch_size // k, generator)
    eos = eos_token_ids(policy, tokenizer)
    state = lambda: {"policy": trained_weights(policy), "baseline": vars(baseline), "optimizer": optimizer,
                     "stream": stream}  # what --resume goes on with  # fmt: skip

    for step in log.progress("REINFORCE", options.steps, state):
        # y ~ π_θ(·|x), k times for each prompt, and r(x, y)
        batch = [prompt for prompt in next(stream) for _ in range(k)]
        with autocast(policy.device, options.precision):
            rollout = sample(policy, [prompt.tokens for prompt in batch], options.max_length, options.temperature, eos,
                             tokenizer.pad_token_id, generator, team)  # fmt: skip
        completions, texts = decode_completions(tokenizer, rollout), [prompt.text for prompt in team.share(batch)]
        reward, sigma = judge(texts, completions, rollout.ended)  # (B,), (B,)

        # log π(y_t | x, y_<t) under the policy and π_sft, which with LoRA is the policy with its adapters off; a region
        # of its own, because some versions of torch would reuse the weights that sample() cast, which have no gradient
        with autocast(policy.device, options.precision):
            logprobs = token_logprobs(policy, rollout, options.temperature)  # (B, T)
            with torch.no_grad(), lora_disabled(policy):
                sft_logprobs = token_logprobs(policy, rollout, options.temperature, sft)  # (B, T)

        # R = r − λσ − β log[ π_θ(y|x) / π_sft(y|x) ] (and less without EOS),  A = (R − b) f(σ)
        kl = kl_estimate(logprobs.detach(), sft_logprobs, rollout.mask)  # (B,)
        penalty = sigma_coefficient * sigma + options.missing_eos_penalty * ~rollout.ended  # (B,)
        shaped = shaped_reward(reward - penalty, kl, options.beta)  # (B,)
        centered = leave_one_out(shaped.view(-1, k)).flatten() if rloo else shaped - baseline.value  # (B,) R − b
        advantage = centered * weight(sigma)  # (B,)

        # θ ← Opt(θ, A ∇ log π)
        optimizer.backward(policy_gradient_loss(logprobs, advantage, rollout.mask))
        grad_norm, moved = optimizer.step()
        if moved:  # False where float16 overflowed and the step was skipped
            baseline.update(team.gather(shaped))

        metrics = step_metrics(team, rollout, logprobs, reward=reward, sigma=sigma, kl=kl, advantage=advantage,
                               baseline=shaped - centered)  # fmt: skip
        log.step(step=step, **metrics, grad_norm=grad_norm, learning_rate=optimizer.lr, show=["reward", "kl"])


@one_line_errors
def main(argv=None):
    options = parse_options(ReinforceOptions, argv)
    options.check()
    device = resolve_device(options)
    parallel.join()
    log = RunLog(options)
    log.team = parallel.everyone()
    log.team.check(options.batch_size, options.num_generations)
    parallel.one_a_machine(train_rm.prepare_inputs, options.files(), options.model_names())
    policy, tokenizer, judges, prompts, eval_prompts = load_inputs(options, device)
    options.check_sigma(judges["reward"].has_sigma)
    sft = None if options.lora_r else get_weights(policy)

    with log.running():
        evaluate = lambda: judge_policy(policy, tokenizer, eval_prompts, judges, options, policy, sft)
        before = log.once("before", evaluate)
        train_policy(policy, tokenizer, judges["reward"], prompts, sft, options, log)
        if not log.writes:
            return
        after = evaluate()

        if options.lora_r:
            save_adapter(policy, log.folder / "adapter", tokenizer)
        save_model(merge_lora(policy), tokenizer, log.folder / "model")
        plot_metrics(log.metrics(), ["reward", "kl"], log.folder / "steps.png")
        rows = {"before": summarise(before, judges), "after": summarise(after, judges)}
        print("\nHeld-out prompts, before and after\n")
        print(format_table([{"policy": name, **row} for name, row in rows.items()]))
        samples = print_samples(before, after)
        log.finish(**rows, samples=samples)


if __name__ == "__main__":
    main()
