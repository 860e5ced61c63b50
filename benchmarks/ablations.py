"""What does each part of WARP do, and is WARP better than plain REINFORCE? On the embedded world, over seeds.

    pip install -e '.[plots,bench]'
    python benchmarks/ablations.py --seeds 5 --out runs/ablations  # three hours on two cores; goes on where it stopped

The centre has lr 3e-4, T = 100 steps, I = M = 2, β = .1, μ = .01, η = .5, which are 400 steps. Most arms change one
thing of it. A seed has a reward model and samples of its own; θ_sft and the held-out prompts are the same for all. An
arm ends in weights θ, for WARP its last θ_slerp, and its front is (1−η) θ_sft + η θ. Arms are compared by what no
policy was trained on, the gold score, at the same KL to θ_sft: on the front, between its points, linearly in the KL.

A difference to the centre is paired by seed. Its interval is Student's t over seeds; the p-values of the contrasts in
CONTRASTS, which were named before any run, are corrected by Holm's method. `A/A` is the centre with other samples: it
shows how large a difference chance makes.

Runs are kept in <out>/seed-N/ under a name made of their settings and first weights, so that arms share them.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

import train_reinforce
import train_rm
import train_warp
from benchmarks.baselines import refuse
from rlhf_min import toy, warp
from rlhf_min.evaluation import judge_weights, load_task, sweep_front
from rlhf_min.support import parallel
from rlhf_min.support.errors import UserError, one_line_errors
from rlhf_min.support.files import read_json, whole, write_json
from rlhf_min.support.models import get_weights, set_weights
from rlhf_min.support.options import option, parse_options
from rlhf_min.support.precision import resolve_device
from rlhf_min.support.runlog import git_commit

SHARED = "lr seed batch_size gradient_accumulation_steps max_length temperature device precision max_grad_norm".split()
ETAS = (0.25, 0.5, 0.75, 1.0)
MUS, BETAS = (0.01, 0.05, 0.1, 0.5), (0.05, 0.1, 0.2)
FEW = 200  # training pairs of the worse reward model; the usual one has 2,000
CENTRE = "centre"
CONTRASTS = [  # the arms whose difference to the centre is tested
    "A/A", "REINFORCE, β 0.1, 4T steps", "REINFORCE, β 0.2, 4T steps", "anchor θ_sft", "anchor θ_init", "no anchor",
    "EMAs merged", "M = 1", "M = 4", "I = 1", "I = 3", "I = 1, 2T steps", "η = 0.3", "η = 1", "μ = 0.05", "μ = 0.1",
    "μ = 0.5",
]  # fmt: skip


@dataclass
class AblationOptions(train_warp.WarpOptions):
    """Ablations of WARP, and REINFORCE at equal steps, on the embedded world."""

    script: ClassVar[str] = "benchmarks/ablations.py"

    seeds: int = option(8, "repetitions, each with a reward model of its own", low=2)
    workers: int = option(2, "processes of one thread each", low=1)
    lr: float = option(3e-4, "AdamW learning rate", low=0)

    def check(self):
        refuse(self, "iterations", "runs", "eta", "anchor", "merge", "merge_by", "keep_runs", "seed", "reward_model",
               "reward_weights", "resume", "save_every", "report_to", "eval_every", "lora_r")  # fmt: skip
        super().check()


class Recorder:
    """In place of a RunLog: keeps the weights of the policy and of its EMA after every `every` steps."""

    team = parallel.ALONE

    def __init__(self, every):
        self.every, self.kept = every, {}  # {steps: {"policy": weights, "ema": weights}}

    def progress(self, title, steps, state):
        for step in range(1, steps + 1):
            yield step
            if step % self.every == 0:
                copy = lambda weights: {name: w.detach().clone() for name, w in weights.items()}
                self.kept[step] = {kind: copy(state()[kind]) for kind in ("policy", "ema") if kind in state()}

    def step(self, **metrics):
        """A metrics line, which nobody reads."""


class Seed:
    """One repetition: its reward model, its policy, and the runs that have been trained so far."""

    def __init__(self, seed, options, pairs=toy.TRAIN_PAIRS):
        device, self.folder = resolve_device(options), Path(options.out) / f"seed-{seed}"
        reward_model = self.folder / f"reward_model-{Path(pairs).stem}"
        if not (reward_model / "summary.json").exists():
            flags = f"--data {pairs} --eval-data {toy.EVAL_PAIRS} --seed {seed} --device {options.device} --resume"
            train_rm.main([*flags.split(), "--accept-weak", "--out", str(reward_model)])
        self.options = dataclasses.replace(options, seed=seed, reward_model=[str(reward_model)])
        self.task = load_task(dataclasses.replace(self.options, seed=0), device)
        self.sft = get_weights(self.task.policy)

    def trained(self, train, init, steps, **settings):
        """{"policy": weights, "ema": weights} of a run from θ_init after `steps` steps, made or found.

        train(recorder) trains it. Its name is made of what it depends on, but for its length.
        """
        text = json.dumps([self.options.reward_model, self.options.steps, settings], sort_keys=True)
        digest = hashlib.sha256(text.encode())
        for weight in init.values():
            digest.update(weight.numpy().tobytes())
        path = self.folder / f"{digest.hexdigest()[:16]}.pt"
        kept = torch.load(path) if path.exists() else {}
        if steps not in kept:
            recorder = Recorder(self.options.steps)
            train(recorder)
            kept = recorder.kept
            with whole(path) as new:
                torch.save(kept, new)
        return kept[steps]

    def reinforce(self, steps, beta):
        """The weights of REINFORCE from θ_sft."""
        shared = {name: getattr(self.options, name) for name in SHARED}
        options = train_reinforce.ReinforceOptions(**shared, steps=steps, beta=beta)
        set_weights(self.task.policy, self.sft)
        train = lambda recorder: train_reinforce.train_policy(self.task, self.sft, options, recorder)
        return self.trained(train, self.sft, steps, script="reinforce", beta=beta, **shared)["policy"]

    def run(self, init, iteration, number, stream=0, **changes):
        """Run m of an iteration of WARP, {"policy": θ^m, "ema": θ^m_ema}. Another stream has other samples."""
        options = dataclasses.replace(self.options, seed=self.options.seed + 1000 * stream, **changes)
        inputs = self.task, init, self.sft, options
        train = lambda recorder: train_warp.train_policy(*inputs, recorder, iteration, number)
        settings = {name: getattr(options, name) for name in (*SHARED, "beta", "mu", "anchor")}
        settings |= {"iteration": iteration, "run": number}
        return self.trained(train, init, options.steps, script="warp", **settings)

    def warp(self, iterations=2, runs=2, eta=0.5, kind="policy", **changes):
        """The last θ_slerp of WARP, whose runs end in their policies, or with kind="ema" in their anchors."""
        init = self.sft
        for iteration in range(1, iterations + 1):
            policies = [self.run(init, iteration, m, **changes)[kind] for m in range(1, runs + 1)]
            merged = warp.merge(init, policies)
            init = warp.interpolate(init, merged, eta)
        return merged


# Groups of arms: {arm: (optimizer steps of all its runs, weights)}; T: steps of a run of the centre


def centre_arms(seed, T):
    """The centre, the centre with other samples, longer runs in place of a second iteration, and EMAs merged."""
    longer = seed.warp(1, 2, steps=2 * T)  # first: the centre finds its first runs among their beginnings
    arms = {CENTRE: seed.warp(), "A/A": seed.warp(stream=1), "I = 1, 2T steps": longer}
    return {arm: (4 * T, weights) for arm, weights in (arms | {"EMAs merged": seed.warp(kind="ema")}).items()}


def reinforce_arms(seed, T):
    """Plain REINFORCE at the centre's number of steps and twice as many, with both anchors."""
    arms = {}
    for beta in BETAS:
        for n in (8, 4):
            arms[f"REINFORCE, β {beta}, {n}T steps"] = n * T, seed.reinforce(n * T, beta)
        arms[f"REINFORCE, EMA anchor, β {beta}, 4T steps"] = 4 * T, seed.warp(1, 1, steps=4 * T, beta=beta)
    return arms


def merge_arms(seed, T):
    """One merge of the same four runs, in four ways, and the first of them alone."""
    policies = [seed.run(seed.sft, 1, m)["policy"] for m in (1, 2, 3, 4)]
    merge = lambda *how: (4 * T, warp.merge(seed.sft, policies, *how))
    arms = {f"four runs, slerp by {by}": merge(by) for by in ("block", "tensor", "model")}
    return arms | {"four runs, linear": merge("block", "linear"), "one of the four runs": (T, policies[0])}


def count_arms(seed, T):
    """How many runs, how many iterations, and how far the next θ_init goes."""
    arms = {f"M = {m}": (2 * m * T, seed.warp(runs=m)) for m in (1, 4)}
    arms |= {f"I = {i}": (2 * i * T, seed.warp(i)) for i in (1, 3)}
    return arms | {f"η = {eta:g}": (4 * T, seed.warp(eta=eta)) for eta in (0.3, 1.0)}


def anchor_arms(seed, T):
    """What the KL is measured to; θ_init is an EMA that never moves."""
    changes = {"anchor θ_sft": {"anchor": "sft"}, "anchor θ_init": {"mu": 0.0}, "no anchor": {"beta": 0.0}}
    return {arm: (4 * T, seed.warp(**change)) for arm, change in changes.items()}


def mu_arms(seed, T):
    """The rate of the EMA."""
    return {f"μ = {mu:g}": (4 * T, seed.warp(mu=mu)) for mu in MUS[1:]}


def grid_arms(seed, T):
    """μ × β in one iteration: does the KL follow β (1−μ)/μ?"""
    return {f"I = 1, μ {mu:g}, β {beta:g}": (2 * T, seed.warp(1, mu=mu, beta=beta)) for mu in MUS for beta in BETAS}


def weak_arms(seed, T):
    """A worse reward model: trained on a tenth of the pairs."""
    few = seed.folder / "few_pairs.jsonl"
    with whole(few) as new:
        new.write_text("".join(Path(toy.TRAIN_PAIRS).read_text().splitlines(keepends=True)[:FEW]))
    weak = Seed(seed.options.seed, seed.options, str(few))
    return {f"{FEW} pairs, WARP": (4 * T, weak.warp()),
            f"{FEW} pairs, REINFORCE, β 0.1, 4T steps": (4 * T, weak.reinforce(4 * T, 0.1))}  # fmt: skip


def longer_arms(seed, T):
    """Where WARP might pay after all: more iterations, longer runs, more weight on the KL."""
    return {"I = 4": (8 * T, seed.warp(4)), "2T steps": (8 * T, seed.warp(steps=2 * T)),
            "β = 0.2": (4 * T, seed.warp(beta=0.2))}  # fmt: skip


GROUPS = {"centre": centre_arms, "merge": merge_arms, "count": count_arms, "anchor": anchor_arms, "mu": mu_arms,
          "reinforce": reinforce_arms, "grid": grid_arms, "weak": weak_arms,
          "longer": longer_arms}  # fmt: skip


def judge_group(group, number, options):
    """Train and judge a group of arms at one seed: a row for each arm."""
    seed, rows = Seed(number, options), []
    judge = dataclasses.replace(seed.options, seed=0)  # the same random numbers for every arm
    for arm, (steps, weights) in GROUPS[group](seed, options.steps).items():
        front, _ = sweep_front(seed.task, judge, seed.sft, weights, ETAS)
        rows.append({"arm": arm, "seed": number, "steps": steps, "front": front})
    if group == "centre":
        row, _ = judge_weights(seed.task, judge, seed.sft, seed.sft)
        rows.append({"arm": "θ_sft", "seed": number, "steps": 0, "front": [{"eta": 1.0, **row}]})
    return rows


def work(job):
    """A file with the rows of one name at one seed; what has been done is left alone. Returns its path.

    UserError for what was done with other options.
    """
    make_rows, name, seed, options = job
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "seeds", "workers")}
    path = Path(options.out) / f"{re.sub(r'[^a-zA-Z0-9]+', '_', name)}-{seed}.json"
    if not path.exists():
        torch.set_num_threads(1)
        write_json(path, {"commit": git_commit(), "options": settings, "rows": make_rows(name, seed, options)})
        print(f"{name}, seed {seed}: done", flush=True)
    if read_json(path).get("options") != settings:
        raise UserError(f"{path} was made with other options; name another --out")
    return path


def run_all(options, make_rows, names):
    """make_rows(name, seed, options) for all names and seeds in --workers processes, then <out>/results.json."""
    Path(options.out).mkdir(parents=True, exist_ok=True)
    train_rm.prepare_world([options.prompts, options.policy, toy.EVAL_PAIRS])
    jobs = [(make_rows, name, seed, options) for name in names for seed in range(1, options.seeds + 1)]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        results = [read_json(path) for path in pool.imap(work, jobs)]
    command = f"python {options.script} " + " ".join(sys.argv[1:])
    save_results(Path(options.out) / "results.json", command, results)  # a copy of it belongs into docs/results/


def save_results(path, command, results, threads=1):
    """A result file, a line a row, from [{"commit", "rows"}]."""
    rows = [row for result in results for row in result["rows"]]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    head = {"command": command, "commits": sorted({result["commit"] for result in results}),
            "machine": f"{platform.machine()}, {versions}, threads of a run: {threads}",
            "seeds": sorted({row["seed"] for row in rows})}  # fmt: skip
    lines = [json.dumps(json.loads(json.dumps(row), parse_float=lambda x: round(float(x), 6))) for row in rows]
    text = json.dumps(head)[:-1] + ', "rows": [\n' + ",\n".join(lines) + "\n]}\n"
    path.write_text(text, "utf-8")


@one_line_errors
def main(argv=None):
    options = parse_options(AblationOptions, argv)
    options.out = options.out or "runs/ablations"
    run_all(options, judge_group, GROUPS)


if __name__ == "__main__":
    main()
