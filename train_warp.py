"""WARP (Ramé et al., 2406.16768): three weight averages around REINFORCE.

    python train_warp.py --lr 1e-4                          # the embedded world: offline, two minutes on two cores
    torchrun --nproc-per-node 2 train_warp.py --lr 1e-4     # the two runs of an iteration side by side

train_policy and train_warp are Algorithm 1; the mathematics is in rlhf_min/reinforce.py and rlhf_min/warp.py. The
policy gradient is REINFORCE with a moving-average baseline (Back to Basics, 2402.14740), and learning rate, batch and T
are a student report's. README.md numbers all departures.
"""

from dataclasses import dataclass
from typing import ClassVar

from rlhf_min.errors import one_line_errors
from rlhf_min.options import PolicyOptions, option, parse_options, refuse_mistakes


@dataclass
class WarpOptions(PolicyOptions):
    """Train a policy with WARP; the defaults are the WARP report's."""

    script: ClassVar[str] = "train_warp.py"
    parallel: ClassVar[bool] = True

    iterations: int = option(2, "I: rounds of train, merge, interpolate", low=1)
    runs: int = option(2, "M: policies per iteration", low=1)
    lr: float = option(1e-5, "AdamW learning rate", low=0)
    beta: float = option(0.1, "β: weight of the KL to the EMA anchor in the reward", low=0)
    mu: float = option(0.01, "μ: rate of the EMA anchor", low=0, high=1)
    eta: float = option(0.5, "η: how far the next θ_init goes from θ_init to θ_slerp", low=0, high=1)
    merge_by: str = option("block", "tensors that share a SLERP angle", choices=["block", "tensor", "model"])


if __name__ == "__main__":  # a mistake is told before torch takes its seconds to import
    refuse_mistakes(WarpOptions)

import torch

import train_rm  # which makes what is missing of the embedded world
from rlhf_min import parallel, warp
from rlhf_min.batches import Batches
from rlhf_min.evaluation import format_table, print_samples, sweep_front
from rlhf_min.inputs import load_inputs
from rlhf_min.lora import lora_disabled, merge_lora, reset_lora, save_adapter, set_adapters
from rlhf_min.models import dense_weights, eos_token_ids, get_weights, save_model, set_weights, trained_weights
from rlhf_min.plots import plot_front, plot_metrics
from rlhf_min.precision import Optimizer, autocast, resolve_device
from rlhf_min.reinforce import MovingAverageBaseline, kl_estimate, policy_gradient_loss, shaped_reward, step_metrics
from rlhf_min.rollout import decode_completions, sample, token_logprobs
from rlhf_min.runlog import RunLog


def train_policy(policy, tokenizer, judge, prompts, init, sft, options, log, iteration, run):
    """The inner loop of Algorithm 1: T steps of REINFORCE from θ_init against the EMA of the run's own weights."""
    team = log.team  # who share a batch
    seed = options.seed * 1_000_003 + iteration * 1_009 + run  # another order and other samples for every run
    generator = torch.Generator().manual_seed(seed)
    set_weights(policy, init)  # θ^m ← θ_init
    reset_lora(policy, generator)  # with adapters: ΔW = 0
    anchor = get_weights(policy)  # θ^m_ema ← θ_init; with adapters, the average of A and B
    baseline = MovingAverageBaseline()
    optimizer = Optimizer(policy.parameters(), options.lr, policy.device, options.precision, options.warmup_steps,
                          max_grad_norm=options.max_grad_norm, team=team)  # fmt: skip
    stream = Batches(prompts, options.batch_size, generator)
    eos = eos_token_ids(policy, tokenizer)
    title = f"iteration {iteration}/{options.iterations} run {run}/{options.runs}"
    state = lambda: {"policy": trained_weights(policy), "anchor": anchor, "baseline": vars(baseline),
                     "optimizer": optimizer, "stream": stream}  # what --resume goes on with  # fmt: skip

    for step in log.progress(title, options.steps, state):
        # y ~ π_θ(·|x), and r(x, y)
        batch = next(stream)
        with autocast(policy.device, options.precision):
            rollout = sample(policy, [prompt.tokens for prompt in batch], options.max_length, options.temperature, eos,
                             tokenizer.pad_token_id, generator, team)  # fmt: skip
        completions, texts = decode_completions(tokenizer, rollout), [prompt.text for prompt in team.share(batch)]
        reward, sigma = judge(texts, completions, rollout.ended)  # (B,), (B,)

        # log π(y_t | x, y_<t) under the policy, its anchor and, only to be watched, SFT; a region of its own, because
        # some versions of torch would reuse the weights that sample() cast, and those have no gradient
        with autocast(policy.device, options.precision):
            logprobs = token_logprobs(policy, rollout, options.temperature)  # (B, T)
            with torch.no_grad():
                anchor_logprobs = token_logprobs(policy, rollout, options.temperature, anchor)  # (B, T)
                with lora_disabled(policy):
                    sft_logprobs = token_logprobs(policy, rollout, options.temperature, sft)  # (B, T)

        # r_β = r − β log[ π_θ(y|x) / π_ema(y|x) ],  A = r_β − b
        anchor_kl = kl_estimate(logprobs.detach(), anchor_logprobs, rollout.mask)  # (B,)
        shaped = shaped_reward(reward, anchor_kl, options.beta)  # (B,)
        b = baseline.value
        advantage = shaped - b  # (B,)

        # θ^m ← Opt(θ^m, A ∇ log π),  then  θ^m_ema ← (1−μ) θ^m_ema + μ θ^m
        optimizer.backward(policy_gradient_loss(logprobs, advantage, rollout.mask))
        grad_norm, moved = optimizer.step()
        if moved:  # False where float16 overflowed and the step was skipped
            baseline.update(team.gather(shaped))
            anchor = warp.ema_update(anchor, trained_weights(policy), options.mu)

        kl = kl_estimate(logprobs.detach(), sft_logprobs, rollout.mask)  # (B,), noisy; the tables have prefix_kl
        metrics = step_metrics(team, rollout, logprobs, reward=reward, sigma=sigma, kl=kl, anchor_kl=anchor_kl,
                               advantage=advantage)  # fmt: skip
        log.step(iteration=iteration, run=run, step=step, **metrics, baseline=b, grad_norm=grad_norm,
                 learning_rate=optimizer.lr, show=["reward", "kl"])  # fmt: skip
    return dense_weights(policy)


def train_runs(policy, tokenizer, judge, prompts, init, sft, options, log, iteration, first):
    """The weights of runs `first`, `first` + 1, ...: one run for each team of processes, side by side.

    Where fewer runs are left than teams, some have none and wait.
    """
    run, policies = first + log.team.number, []
    if run <= options.runs:
        weights = train_policy(policy, tokenizer, judge, prompts, init, sft, options, log, iteration, run)
    else:
        for _ in log.progress("waits", options.steps, dict):
            pass
    for other in range(first, min(first + log.team.count, options.runs + 1)):
        policies.append(weights if other == run else {name: torch.empty_like(tensor) for name, tensor in init.items()})
        parallel.send_weights(policies[-1], source=other - first)  # the first process of the team that trained it
    return policies


def train_warp(policy, tokenizer, judge, prompts, options, log):
    """Algorithm 1. Returns (θ_sft, last θ_slerp, last θ_init, geometry of the task vectors by iteration)."""
    sft = init = dense_weights(policy)  # θ_init ← θ_sft
    geometry = []
    for iteration in range(1, options.iterations + 1):
        policies = []
        for first in range(1, options.runs + 1, log.team.count):  # one process: run after run
            policies += log.once(f"iteration-{iteration}-run-{first}", train_runs, policy, tokenizer, judge,
                                 prompts, init, sft, options, log, iteration, first)  # fmt: skip
        merged = warp.merge(init, policies, options.merge_by)  # θ_slerp ← slerp(θ_init, {θ^m})
        geometry.append(warp.task_vector_geometry(init, policies, options.merge_by))
        init = warp.interpolate(init, merged, options.eta)  # θ_init ← (1−η) θ_init + η θ_slerp
    return sft, merged, init, geometry


def save_policies(policy, tokenizer, sft, policies, options, folder):
    """Each {name: weights} as a dense model; with LoRA also as what it is, an adapter of rank I·M·r on θ_sft.

    The policy is a place to put the weights in, and left without adapters.
    """
    if options.lora_r:
        for name, weights in policies.items():
            set_adapters(policy, sft, weights, options.iterations * options.runs * options.lora_r)
            save_adapter(policy, folder / f"{name}_adapter", tokenizer)
    merge_lora(policy)
    for name, weights in policies.items():
        set_weights(policy, weights)
        save_model(policy, tokenizer, folder / name)


def print_geometry(geometry, options):
    """The angles of the task vectors, and μT."""
    for iteration, groups in enumerate(geometry, 1):
        if groups["angle_degrees"] is not None:  # None for M = 1
            angle, ratio = groups["angle_degrees"], groups["norm_ratio"]
            print(f"\niteration {iteration}: angle of the first two task vectors {angle['median']:.0f}° "
                  f"({angle['min']:.0f}° to {angle['max']:.0f}°), norm ratio {ratio['median']:.2f} "
                  f"({ratio['min']:.2f} to {ratio['max']:.2f}) by {options.merge_by}", end="")  # fmt: skip
    print(f"\n\nμT = {options.mu * options.steps:g}, in the paper 50 to 90: how often the anchor is renewed in a run")


@one_line_errors
def main(argv=None):
    options = parse_options(WarpOptions, argv)
    options.check()
    device = resolve_device(options)
    parallel.join()
    log = RunLog(options)
    log.team = parallel.team_of_run(options.runs)
    log.team.check(options.batch_size)
    parallel.one_a_machine(train_rm.prepare_inputs, options.files(), options.model_names())
    policy, tokenizer, judges, prompts, eval_prompts = load_inputs(options, device)

    with log.running():
        sft, merged, init, geometry = train_warp(policy, tokenizer, judges["reward"], prompts, options, log)
        if log.writes:
            save_policies(policy, tokenizer, sft, {"model": init, "merged": merged}, options, log.folder)
        merge_lora(policy)
        front, columns = sweep_front(policy, tokenizer, eval_prompts, judges, options, sft, merged)
        if not log.writes:
            return

        series = lambda row: f"iteration {row['iteration']} run {row['run']}"
        plot_metrics(log.metrics(), ["reward", "kl"], log.folder / "steps.png", series=series)
        plot_front({f"lr {options.lr:g}": front}, list(judges), log.folder / "front.png")
        print("\nThe front: (1−η) θ_sft + η θ_slerp on held-out prompts\n\n" + format_table(front))
        samples = print_samples(columns[0], columns[-1])
        print_geometry(geometry, options)
        log.finish(front=front, samples=samples, geometry=geometry, mu_T=options.mu * options.steps)


if __name__ == "__main__":
    main()
