"""One line changed, eight forms: where the KL term goes, and what it then does. On the embedded world, over seeds.

    python benchmarks/kl.py --out runs/kl            # half an hour on two cores; goes on where it stopped

FORMS holds the losses of a step, each a function of (logprobs (B, T), ref_logprobs (B, T), reward (B,), mask (B, T), β)
in which only the KL term differs; but a form that is scored at another temperature also scores its reward term there.
They are the losses that rlhf_min/oracle.py takes, so the oracle judges the very losses that train here. The mean of
past rewards is subtracted from the reward, which changes no expectation of a form that is scored as it is sampled.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.ablations import AblationOptions, Seed, run_all
from benchmarks.baselines import refuse
from rlhf_min.evaluation import judge_weights
from rlhf_min.reinforce import MovingAverageBaseline, kl_estimate, policy_gradient_loss, shaped_reward
from rlhf_min.reward_model import judge_answers
from rlhf_min.rollout import sample, token_logprobs, uniform_numbers
from rlhf_min.support.batches import Batches
from rlhf_min.support.errors import one_line_errors
from rlhf_min.support.models import get_weights, set_weights
from rlhf_min.support.options import option, parse_options
from rlhf_min.support.precision import Optimizer


@dataclass
class KlOptions(AblationOptions):
    """Eight places for the KL term."""

    script: ClassVar[str] = "benchmarks/kl.py"

    seeds: int = option(5, "repetitions, each with a reward model of its own", low=2)
    steps: int = option(150, "optimizer steps of each training", low=1)
    lr: float = option(1e-4, "AdamW learning rate", low=0)
    beta: float = option(0.135, "β: weight of the KL term", low=0)

    def check(self):
        refuse(self, "mu")
        super().check()


def in_the_reward(kind, sign=1.0):
    """The estimate is a number that is subtracted from the reward, as in train_reinforce.py."""

    def loss(logprobs, ref_logprobs, reward, mask, beta):
        kl = sign * kl_estimate(logprobs.detach(), ref_logprobs, mask, kind)  # (B,)
        return policy_gradient_loss(logprobs, shaped_reward(reward, kl, beta), mask)

    return loss


def as_a_loss(kind):
    """The estimate is added to the loss, and differentiated."""

    def loss(logprobs, ref_logprobs, reward, mask, beta):
        kl = kl_estimate(logprobs, ref_logprobs, mask, kind)  # (B,)
        return policy_gradient_loss(logprobs, reward, mask) + beta * kl.mean()

    return loss


FORMS = {  # name: (loss, temperature of scoring; None: that of sampling)
    "k1 in the reward, detached": (in_the_reward("k1"), None),
    "k2 as a loss": (as_a_loss("k2"), None),
    "k3 as a loss": (as_a_loss("k3"), None),
    "k1 as a loss": (as_a_loss("k1"), None),
    "no KL": (lambda logprobs, ref_logprobs, reward, mask, beta: policy_gradient_loss(logprobs, reward, mask), None),
    "k3 in the reward, detached": (in_the_reward("k3"), None),
    "k1 as a loss, scored at temperature 1": (as_a_loss("k1"), 1.0),
    "k1 in the reward, sign swapped": (in_the_reward("k1", -1.0), None),
}


def train(task, sft, options, loss, temperature):
    """The weights after `steps` steps with this loss: train_reinforce.py's loop, with the loss as an argument."""
    policy, temperature = task.policy, temperature or options.temperature
    set_weights(policy, sft)
    generator = torch.Generator().manual_seed(options.seed)
    baseline = MovingAverageBaseline()
    optimizer = Optimizer(policy, options.lr, options.precision, max_grad_norm=options.max_grad_norm)
    stream = Batches(task.prompts, options.batch_size, generator)
    for _ in range(options.steps):
        batch = next(stream)
        uniform = uniform_numbers(options.batch_size, options.max_length, generator)  # (B, max_length)
        rollout = sample(policy, [prompt.tokens for prompt in batch], uniform, options.temperature)
        scores, _ = judge_answers({"reward": task.judges["reward"]}, task.tokenizer, batch, rollout)
        logprobs = token_logprobs(policy, rollout, temperature)  # (B, T)
        with torch.no_grad():
            sft_logprobs = token_logprobs(policy, rollout, temperature, sft)  # (B, T)
        reward = scores["reward"] - baseline.value  # (B,)
        optimizer.backward(loss(logprobs, sft_logprobs, reward, rollout.mask, options.beta))
        if optimizer.step():
            baseline.update(scores["reward"])
    return get_weights(policy)


def judge_form(name, number, options):
    """Train a form at one seed, and judge it: its row."""
    seed = Seed(number, options)
    weights = train(seed.task, seed.sft, seed.options, *FORMS[name])
    row, columns = judge_weights(seed.task, dataclasses.replace(seed.options, seed=0), seed.sft, weights)
    answer = {"prompt": columns["prompt"][0], "completion": columns["completion"][0]}
    return [{"form": name, "seed": number, **row, "sample": answer}]


@one_line_errors
def main(argv=None):
    options = parse_options(KlOptions, argv)
    options.out = options.out or "runs/kl"
    run_all(options, judge_form, FORMS)


if __name__ == "__main__":
    main()
