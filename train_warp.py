"""WARP (Ramé et al., 2406.16768): three weight averages around REINFORCE.

    python train_warp.py --lr 1e-4                          # the embedded world: offline, two minutes on two cores

This file is Algorithm 1 and nothing else: the mathematics is in rlhf_min/reinforce.py and rlhf_min/warp.py. The policy
gradient is REINFORCE with a moving-average baseline (Back to Basics, 2402.14740), the M runs of an iteration come one
after the other, and learning rate, batch and T are a student report's. README.md numbers all departures from the paper.
"""

from dataclasses import dataclass

import torch

import train_rm
from rlhf_min import toy, warp
from rlhf_min.data import batches, load_prompts, split_prompts
from rlhf_min.errors import one_line_errors
from rlhf_min.evaluation import format_table, load_judges, sweep_front
from rlhf_min.models import eos_token_ids, get_weights, load_policy, save_model, set_weights, trained_weights
from rlhf_min.options import RunOptions, option, parse_options
from rlhf_min.plots import plot_front, plot_metrics
from rlhf_min.precision import Optimizer, autocast, resolve_device
from rlhf_min.reinforce import MovingAverageBaseline, kl_estimate, policy_gradient_loss, shaped_reward
from rlhf_min.rollout import decode_completions, sample, token_logprobs
from rlhf_min.runlog import RunLog


@dataclass
class WarpOptions(RunOptions):
    """Train a policy with WARP; the defaults are the WARP report's."""

    policy: str = option(toy.POLICY, "θ_sft: a run folder, a transformers folder or a hub name")
    reward_model: str = option(toy.REWARD_MODEL, "a classifier with one label, or package.module.function")
    judges: list = option([], "further judges of the front, name=spec (the embedded world has gold and fluency)")
    prompts: str = option(toy.PROMPTS, "lines with 'prompt', or with 'text', whose first tokens are the prompt")
    prompt_tokens: int = option(10, "tokens of a 'text' that make a prompt", low=1)
    eval_prompts: str = option("", "prompts of the front (default: some of --prompts are held out)")
    num_eval_prompts: int = option(256, "how many prompts of the front", low=3)
    iterations: int = option(2, "I: rounds of train, merge, interpolate", low=1)
    runs: int = option(2, "M: policies an iteration", low=1)
    steps: int = option(100, "T: optimizer steps a policy", low=1)
    lr: float = option(1e-5, "AdamW learning rate", low=0)
    warmup_steps: int = option(0, "steps of linear warm-up in each run", low=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", low=0)
    batch_size: int = option(64, "prompts, and answers, a step", low=1)
    beta: float = option(0.1, "β: weight of the KL to the EMA anchor in the reward", low=0)
    mu: float = option(0.01, "μ: rate of the EMA anchor", low=0, high=1)
    eta: float = option(0.5, "η: how far the next θ_init goes from θ_init to θ_slerp", low=0, high=1)
    merge_by: str = option("block", "tensors that share a SLERP angle", choices=["block", "tensor", "model"])
    temperature: float = option(0.7, "of sampling and scoring", low=0.01)
    max_length: int = option(64, "tokens of prompt and answer", low=2)
    seed: int = option(42, "seed of prompts and sampling; every run derives its own", low=0, high=2**31 - 1)


def train_policy(policy, tokenizer, reward_model, prompts, init, sft, options, log, iteration, run):
    """The inner loop of Algorithm 1: T steps of REINFORCE from θ_init against the EMA of the run's own weights."""
    set_weights(policy, init)  # θ^m ← θ_init
    anchor = init  # θ^m_ema ← θ_init
    baseline = MovingAverageBaseline()
    optimizer = Optimizer(policy.parameters(), options.lr, policy.device, options.precision, options.warmup_steps,
                          max_grad_norm=options.max_grad_norm)  # fmt: skip
    seed = options.seed * 1_000_003 + iteration * 1_009 + run  # another order and other samples for every run
    generator = torch.Generator().manual_seed(seed)
    stream = batches(prompts, options.batch_size, generator)
    eos = eos_token_ids(policy, tokenizer)
    title = f"iteration {iteration}/{options.iterations} run {run}/{options.runs}"

    for step in log.progress(range(1, options.steps + 1), title):
        # y ~ π_θ(·|x), and r(x, y)
        batch = next(stream)
        with autocast(policy.device, options.precision):
            rollout = sample(policy, [prompt.tokens for prompt in batch], options.max_length, options.temperature, eos,
                             tokenizer.pad_token_id, generator)  # fmt: skip
        completions = decode_completions(tokenizer, rollout)
        reward, sigma = reward_model([prompt.text for prompt in batch], completions, rollout.ended)  # (B,), (B,)

        # log π(y_t | x, y_<t) under the policy, its anchor and, only to be watched, SFT; a region of its own, because
        # some versions of torch would reuse the weights that sample() cast, and those have no gradient
        with autocast(policy.device, options.precision):
            logprobs = token_logprobs(policy, rollout, options.temperature)  # (B, T)
            with torch.no_grad():
                anchor_logprobs = token_logprobs(policy, rollout, options.temperature, anchor)  # (B, T)
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
            baseline.update(shaped)
            anchor = warp.ema_update(anchor, trained_weights(policy), options.mu)

        kl = kl_estimate(logprobs.detach(), sft_logprobs, rollout.mask)  # (B,), noisy; the tables have prefix_kl
        log.step(**{
            "iteration": iteration, "run": run, "step": step, "reward": reward.mean().item(),
            "reward_std": reward.std(correction=0).item(), "sigma": sigma.mean().item(), "kl": kl.mean().item(),
            "anchor_kl": anchor_kl.mean().item(), "baseline": b, "advantage": advantage.mean().item(),
            "entropy": -logprobs.detach()[rollout.mask].mean().item(),  # per token; kl is per answer
            "completions/mean_length": rollout.mask.sum(-1).float().mean().item(),
            "completions/clipped_ratio": 1 - rollout.ended.float().mean().item(),
            "grad_norm": grad_norm, "learning_rate": optimizer.lr,
        }, show=["reward", "kl"])  # fmt: skip
    return get_weights(policy)


def train_warp(policy, tokenizer, reward_model, prompts, options, log):
    """Algorithm 1. Returns (θ_sft, last θ_slerp, last θ_init, geometry of the task vectors by iteration)."""
    sft = init = get_weights(policy)  # θ_init ← θ_sft
    geometry = []
    for iteration in range(1, options.iterations + 1):
        policies = [
            train_policy(policy, tokenizer, reward_model, prompts, init, sft, options, log, iteration, run)
            for run in range(1, options.runs + 1)
        ]
        merged = warp.merge(init, policies, options.merge_by)  # θ_slerp ← slerp(θ_init, {θ^m}, λ = 1/M)
        geometry.append(warp.task_vector_geometry(init, policies, options.merge_by))
        init = warp.interpolate(init, merged, options.eta)  # θ_init ← (1−η) θ_init + η θ_slerp
    return sft, merged, init, geometry


def report(front, samples, geometry, options):
    """What the run prints last: the front, three answers before and after, the angles, μT."""
    names = [name for name in front[0] if not name.endswith("_se")]
    print("\nThe front: (1−η) θ_sft + η θ_slerp on held-out prompts\n\n" + format_table(front, names))
    for row in samples:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        print(f"\nprompt  {prompt}\nbefore  {row['before'].strip()}\nafter   {row['after'].strip()}")
    for iteration, spread in enumerate(geometry, 1):
        if spread["angle_degrees"] is not None:  # None for M = 1
            angle, ratio = spread["angle_degrees"], spread["norm_ratio"]
            print(f"\niteration {iteration}: angle of the task vectors {angle['median']:.0f}° ({angle['min']:.0f}° to "
                  f"{angle['max']:.0f}°), norm ratio {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) "
                  f"by {options.merge_by}", end="")  # fmt: skip
    print(f"\n\nμT = {options.mu * options.steps:g}, in the paper 50 to 90: how often the anchor is renewed in a run")


@one_line_errors
def main(argv=None):
    options = parse_options(WarpOptions, argv)
    device = resolve_device(options)
    log = RunLog("warp", options)
    train_rm.prepare_inputs([options.prompts, options.eval_prompts], [options.policy, options.reward_model])
    if options.prompts == toy.PROMPTS:
        options.judges = options.judges or toy.JUDGES
    policy, tokenizer = load_policy(options.policy, device, options.max_length)
    judges = load_judges([f"reward={options.reward_model}", *options.judges], device)
    prompts, eval_prompts = (load_prompts(file, tokenizer, options.prompt_tokens, options.max_length) if file else []
                             for file in (options.prompts, options.eval_prompts))  # fmt: skip
    generator = torch.Generator().manual_seed(options.seed)
    prompts, eval_prompts = split_prompts(prompts, eval_prompts, options.num_eval_prompts, generator)
    log.begin()

    sft, merged, init, geometry = train_warp(policy, tokenizer, judges["reward"], prompts, options, log)

    front, columns = sweep_front(policy, tokenizer, eval_prompts, judges, options, sft, merged)
    for name, weights in (("model", init), ("merged", merged)):
        set_weights(policy, weights)
        save_model(policy, tokenizer, log.folder / name)
    series = lambda row: f"iteration {row['iteration']} run {row['run']}"
    plot_metrics(log.metrics(), ["reward", "kl"], log.folder / "steps.png", series=series)
    plot_front({f"lr {options.lr:g}": front}, list(judges), log.folder / "front.png")
    samples = [{"prompt": prompt, "before": before, "after": after} for prompt, before, after in
               zip(columns[0]["prompt"][:3], columns[0]["completion"], columns[-1]["completion"])]  # fmt: skip
    report(front, samples, geometry, options)
    log.finish(front=front, samples=samples, geometry=geometry, mu_T=options.mu * options.steps)


if __name__ == "__main__":
    main()
