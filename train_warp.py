"""WARP (Ramé et al., 2406.16768): three weight averages around REINFORCE.

    python train_warp.py --lr 1e-4                          # the embedded world: offline, two minutes on two cores
    torchrun --nproc-per-node 2 train_warp.py --lr 1e-4     # the two runs of an iteration side by side

The algorithm, Algorithm 1 of the paper:

    for each of I iterations:                                                                    train_warp
        for each of M runs, all from θ_init:                                                     train_policy
            T steps of REINFORCE, with the KL to the run's own EMA in the reward, and after every step
            (1)  θ_ema   ← (1−μ) θ_ema + μ θ
        (2)  θ_slerp ← θ_init + slerp(δ_1, ..., δ_M)      with δ_m = θ^m − θ_init
        (3)  θ_init  ← (1−η) θ_init + η θ_slerp
    the front: (1−η) θ_sft + η θ_slerp for 0 ≤ η ≤ 1

The mathematics is in rlhf_min/warp.py and rlhf_min/reinforce.py. README.md numbers all departures from the paper.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlhf_min import reinforce, warp
from rlhf_min.evaluation import TaskOptions, format_table, judge_weights, load_task, print_samples, sweep_front
from rlhf_min.lora import dense_weights, lora_disabled, merge_lora, reset_lora, save_adapter, set_adapters
from rlhf_min.reward_model import judge_answers, named_judges
from rlhf_min.rollout import sample, token_logprobs, uniform_numbers
from rlhf_min.support import parallel
from rlhf_min.support.batches import Batches
from rlhf_min.support.errors import one_line_errors
from rlhf_min.support.models import get_weights, save_model, set_weights, trained_weights
from rlhf_min.support.options import option, parse_options
from rlhf_min.support.plots import plot_front, plot_metrics
from rlhf_min.support.precision import Optimizer, resolve_device
from rlhf_min.support.runlog import RunLog
from train_rm import prepare_world


@dataclass
class WarpOptions(TaskOptions):
    """Train a policy with WARP; the defaults are the WARP report's."""

    script: ClassVar[str] = "train_warp.py"

    iterations: int = option(2, "I: rounds of train, merge, interpolate", low=1)
    runs: int = option(2, "M: policies per iteration", low=1)
    steps: int = option(100, "T: optimizer steps of each run", low=1)
    lr: float = option(1e-5, "AdamW learning rate", low=0)
    beta: float = option(0.1, "β: weight of the KL to the anchor in the reward", low=0)
    mu: float = option(0.01, "μ: rate of the EMA anchor", low=0, high=1)
    eta: float = option(0.5, "η: how far the next θ_init goes from θ_init to θ_slerp", low=0, high=1)
    anchor: str = option("ema", "what the KL is measured to: θ_ema, or θ_sft", choices=["ema", "sft"])
    merge: str = option("slerp", "how the runs are merged: along the arc, or their mean", choices=["slerp", "linear"])
    merge_by: str = option("block", "tensors that share a SLERP angle", choices=["block", "tensor", "model"])
    keep_runs: bool = option(False, "save every θ^m, too")


def train_policy(task, init, sft, options, log, iteration, run):
    """T steps of REINFORCE from θ_init, run m of an iteration. init, sft, and θ^m, which it returns: {name: tensor}."""
    policy, team, passes = task.policy, log.team, options.gradient_accumulation_steps
    seed = options.seed * 1_000_003 + iteration * 1_009 + run  # another order and other samples for every run
    generator = torch.Generator().manual_seed(seed)
    set_weights(policy, init)  # θ^m ← θ_init
    reset_lora(policy, generator)  # with adapters: ΔW = 0
    ema = get_weights(policy)  # θ^m_ema ← θ_init; with adapters, the average of A and B
    baseline = reinforce.MovingAverageBaseline()
    optimizer = Optimizer(policy, options.lr, options.precision, max_grad_norm=options.max_grad_norm, team=team)
    stream = Batches(task.prompts, options.answers, generator)
    parts = {"baseline": vars(baseline), "optimizer": optimizer, "stream": stream}
    state = lambda: {"policy": trained_weights(policy), "ema": ema, **parts}  # what --resume goes on with

    for step in log.progress(f"iteration {iteration} run {run}", options.steps, state):
        # y ~ π_θ(·|x), and r(x, y)
        batch = team.share(next(stream))
        uniform = team.share(uniform_numbers(options.answers, options.max_length, generator))  # (B, max_length)
        with optimizer.autocast():
            rollout = sample(policy, [prompt.tokens for prompt in batch], uniform, options.temperature)
        scores, _ = judge_answers(task.cheap_judges, task.tokenizer, batch, rollout)  # {name: (B,)}

        # log π(y_t | x, y_<t) under the policy and what it is compared with
        with optimizer.autocast():
            logprobs = token_logprobs(policy, rollout, options.temperature, passes=passes)  # (B, T)
            with torch.no_grad():
                ema_logprobs = token_logprobs(policy, rollout, options.temperature, ema, passes)  # (B, T)
                with lora_disabled(policy):
                    sft_logprobs = token_logprobs(policy, rollout, options.temperature, sft, passes)  # (B, T)

        # R = r − β log[ π_θ(y|x) / π_anchor(y|x) ],  A = R − b
        kl = reinforce.kl_estimate(logprobs.detach(), sft_logprobs, rollout.mask)  # (B,)
        ema_kl = reinforce.kl_estimate(logprobs.detach(), ema_logprobs, rollout.mask)  # (B,)
        anchor_kl = ema_kl if options.anchor == "ema" else kl  # (B,)
        shaped = reinforce.shaped_reward(scores["reward"], anchor_kl, options.beta)  # (B,)
        advantage = shaped - baseline.value  # (B,)

        # (1) θ^m ← Opt(θ^m, A ∇ log π),  then  θ^m_ema ← (1−μ) θ^m_ema + μ θ^m
        optimizer.backward(reinforce.policy_gradient_loss(logprobs, advantage, rollout.mask))
        moved = optimizer.step()
        if moved:  # False where float16 overflowed and the step was skipped
            baseline.update(team.gather(shaped))
            ema = warp.ema_update(ema, trained_weights(policy), options.mu)

        scores |= {"kl": kl, "anchor_kl": anchor_kl, "advantage": advantage, "baseline": shaped - advantage}
        metrics = reinforce.step_metrics(team, rollout, logprobs, scores)
        metrics |= task.eval_metrics(options, sft, step)
        log.step(iteration=iteration, run=run, step=step, **metrics, **optimizer.metrics)
    return dense_weights(policy)


def train_warp(task, options, log):
    """Algorithm 1. Returns (θ_sft, last θ_slerp, last θ_init, {"iteration-i-run-m": θ^m}, geometry by iteration)."""
    sft = init = dense_weights(task.policy)  # θ_init ← θ_sft
    kept, geometry = {}, []
    for iteration in range(1, options.iterations + 1):
        weights = {}  # {m: θ^m}
        for run in log.team.deal(options.runs):  # 1, ..., M
            name = f"iteration-{iteration}-run-{run}"
            weights[run] = log.once(name, train_policy, task, init, sft, options, log, iteration, run)
        policies = log.team.collect(weights, task.policy.device)
        merged = warp.merge(init, policies, options.merge_by, options.merge)  # (2) θ_slerp ← θ_init + slerp(δ)
        geometry.append(warp.task_vector_geometry(init, policies, options.merge_by))
        init = warp.interpolate(init, merged, options.eta)  # (3) θ_init ← (1−η) θ_init + η θ_slerp
        if options.keep_runs:
            kept |= {f"iteration-{iteration}-run-{m}": theta for m, theta in enumerate(policies, 1)}
    return sft, merged, init, kept, geometry


def save_policies(task, sft, policies, options, folder):
    """Each {name: weights} as a dense model; with LoRA also as what it is, an adapter of rank I·M·r on θ_sft.

    The task's policy is a place to put the weights in, and left without adapters.
    """
    if options.lora_r:
        for name, weights in policies.items():
            set_adapters(task.policy, sft, weights, options.iterations * options.runs * options.lora_r)
            save_adapter(task.policy, folder / f"{name}_adapter", task.tokenizer)
    merge_lora(task.policy)
    for name, weights in policies.items():
        set_weights(task.policy, weights)
        save_model(task.policy, task.tokenizer, folder / name)


def print_geometry(geometry, options):
    """The angles of the task vectors, and μT."""
    for iteration, groups in enumerate(geometry, 1):
        if groups["angle_degrees"] is not None:  # None for M = 1
            angle, ratio = ("{median:.3g} ({min:.2g} to {max:.2g})".format(**spread) for spread in groups.values())
            print(f"iteration {iteration}, task vectors by {options.merge_by}: angle {angle}°, norm ratio {ratio}")
    print(f"μT = {options.mu * options.steps:g}, in the paper 50 to 90: at 1 the anchor goes 1/e of a linear drift")


@one_line_errors
def main(argv=None):
    options = parse_options(WarpOptions, argv)
    device = resolve_device(options)
    log = RunLog(options, parallel.join(options.answers, runs=options.runs))
    prepare_world([options.prompts, options.policy, *options.reward_model, *named_judges(options.judges).values()])
    task = load_task(options, device)

    with log.running():
        sft, merged, init, kept, geometry = train_warp(task, options, log)
        if not log.writes:
            return
        save_policies(task, sft, {"model": init, "merged": merged, **kept}, options, log.folder)

        front, columns = sweep_front(task, options, sft, merged)
        last_init, _ = judge_weights(task, options, sft, init)
        names = [*task.cheap_judges, "kl"]
        plot_metrics(log.metrics(), names, log.folder / "steps.png", options.steps)
        plot_front({f"lr {options.lr:g}": front}, list(task.judges), log.folder / "front.png")
        print("\nThe front (1−η) θ_sft + η θ_slerp, and model/, the last θ_init, on held-out prompts\n")
        print(format_table([*front, {"eta": "model/", **last_init}]))
        samples = print_samples({"before": columns[0], "after": columns[-1]})
        print()
        print_geometry(geometry, options)
        log.finish(front=front, model=last_init, samples=samples, geometry=geometry, mu_T=options.mu * options.steps)


if __name__ == "__main__":
    main()
