"""The training of exercise 16: REINFORCE in the embedded world at a high learning rate, then (1−η) θ_sft + η θ."""

from tqdm import tqdm

import train_reinforce
from rlhf_min.evaluation import judge_policy, load_task
from rlhf_min.support import parallel
from rlhf_min.support.models import get_weights, set_weights
from rlhf_min.support.precision import resolve_device
from rlhf_min.warp import interpolate
from train_rm import prepare_world


class ProgressBar:
    """In place of a RunLog: nothing is written."""

    team = parallel.ALONE

    def progress(self, title, steps, state):
        return tqdm(range(1, steps + 1), desc=title, disable=None)

    def step(self, **metrics):
        """A metrics line, which nobody reads."""


def train_and_judge(beta, eta, steps=150, held_out=256):
    """judge_policy's columns of the policy (1−η) θ_sft + η θ, where θ was trained with the KL weight β.

    The prompts are the `held_out` ones that come behind the package's own held-out prompts. No training here sees
    either.
    """
    options = train_reinforce.ReinforceOptions(lr=3e-4, beta=beta, steps=steps, num_eval_prompts=2 * held_out)
    device = resolve_device(options)
    prepare_world([options.prompts, options.policy, *options.reward_model])
    task = load_task(options, device)
    sft = get_weights(task.policy)
    train_reinforce.train_policy(task, sft, options, ProgressBar())
    set_weights(task.policy, interpolate(sft, get_weights(task.policy), eta))
    prompts = task.eval_prompts[held_out:]
    return judge_policy(task.policy, task.tokenizer, prompts, task.judges, options, task.policy, sft)
