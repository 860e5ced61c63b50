"""All that a GPU should show, in one command: is it right, how fast is it, and what do half precisions give?

    pip install -e '.[test]' -e '.[bench]' -e '.[plots]'
    python benchmarks/gpu.py --out runs/gpu --seconds 540
    python benchmarks/gpu.py --out runs/gpu-toy --device cpu --toy       # a rehearsal, minutes

The stages run in the order of their worth, each in a process of its own with its own limit. A stage that would not fit
into the seconds that are left is skipped. What is done is kept: `results.jsonl` (a row a line), `curves.jsonl` and
curves.png (reward over steps in three precisions), profile.txt, log.txt, and table.md, which is printed last.
"""

import contextlib
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import distributed as dist
from transformers.models.llama import modeling_llama

import train_reinforce
from benchmarks import speed
from rlhf_min import rollout
from rlhf_min.evaluation import format_table
from rlhf_min.lora import add_lora
from rlhf_min.support import gpu_step, plots
from rlhf_min.support.errors import UserError, one_line_errors
from rlhf_min.support.options import RunOptions, option, parse_options
from rlhf_min.support.precision import autocast, resolve_device
from rlhf_min.support.runlog import git_commit

ROOT = Path(__file__).resolve().parents[1]
TOY = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 256}  # a rehearsal's GPT-2
CUDA_TESTS = ["tests/test_cuda.py", "tests/test_gpu_step.py", "tests/test_rollout.py", "tests/test_lora.py"]


def synchronize(options):
    """Wait for what the GPU still has to do."""
    if options.device != "cpu":
        torch.cuda.synchronize()


def seconds_of(work, options, repeats=20):
    """The median seconds of work(), after two calls that are not counted."""
    taken = []
    for _ in range(2 + repeats):
        synchronize(options)
        start = time.perf_counter()
        work()
        synchronize(options)
        taken.append(time.perf_counter() - start)
    return sorted(taken[2:])[repeats // 2]


# Stages: each yields rows


def facts(options):
    """The machine, and what it can reach: the largest product, and reading the largest tensor."""
    name = platform.processor() if options.device == "cpu" else torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    yield {"row": "machine", "card": name, **versions, "commit": git_commit()}
    n, count = (256, 10**6) if options.toy else (8192, 10**9)
    for dtype in (torch.bfloat16, torch.float32):  # float32 as TF32, as resolve_device sets it
        a = torch.randn(n, n, device=options.device, dtype=dtype)
        yield {"row": f"product {n}³ {dtype}", "TFLOP/s": 2 * n**3 / seconds_of(lambda: a @ a, options) / 1e12}  # noqa: B023
    x = torch.ones(count, device=options.device)
    yield {"row": f"sum of {4 * count / 1e9:g} GB", "GB/s": 4 * count / seconds_of(x.sum, options) / 1e9}


def right(options):
    """The tests that need a GPU, and those of what it speeds up."""
    environment = os.environ | ({} if options.device == "cpu" else {"TEST_CUDA": "1"})
    tests = CUDA_TESTS[: 1 if options.toy else None]
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--tb=short", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-6000:])
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    yield {"row": "tests", "exit code": done.returncode, **counts}


def speed_rows(*names):
    """A stage of rows of benchmarks/speed.py."""

    def stage(options):
        for name in ["toy"] if options.toy else names:
            flags = f"--repeats {1 if options.toy else 5} --threads 1 "
            flags += f"--device {options.device} --precision {options.precision}"
            yield speed.table_row(name, *speed.measure(name, parse_options(speed.SpeedOptions, flags.split())))

    return stage


def small_policy(options, lora_r=0):
    """SmolLM2's shape with random weights, whose answers do not end."""
    policy = (speed.gpt2(TOY) if options.toy else speed.smollm2(30)).to(options.device)
    policy.generation_config.eos_token_id, policy.generation_config.pad_token_id = [-1], 0
    return add_lora(policy, lora_r, 32.0) if lora_r else policy


def sampling_turn(policy, options, length=128):
    """A function that samples 64 answers of `length` tokens."""
    count, length = (2, 8) if options.toy else (64, length)
    prompts, uniform = [[5] * speed.PROMPT] * count, torch.rand(count, speed.PROMPT + length)

    def turn():
        with autocast(policy.device, options.precision):
            rollout.sample(policy, prompts, uniform, speed.TEMPERATURE)

    return turn


def compiled_step():
    """LlamaModel.forward, compiled where it makes a recorded step whose keys and values have their places."""
    plain = modeling_llama.LlamaModel.forward
    compiled = torch.compile(plain)

    def forward(self, *args, **kwargs):
        step = kwargs.get("cache", kwargs.get("past_key_values"))  # the latter before transformers 5.24
        recorded = isinstance(step, gpu_step.Step) and step.keys
        return (compiled if recorded else plain)(self, *args, **kwargs)

    return forward


def replay_seconds():
    """What the CPU needs to launch the graph of a step, and what the GPU needs to run it: the larger one decides."""
    (step,) = gpu_step.STEPS.values()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):  # behind the answers there is room for so many tokens
        step.graph.replay()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    return {"launch, s": (launched - start) / 20, "replay, s": (time.perf_counter() - start) / 20}


def ablations(*names):
    """A stage: seconds to sample 64 × 128 tokens with one thing changed, and GB that a token must read at least."""

    def stage(options):
        for name in names:
            gpu_step.STEPS.clear()
            gpu_step.REFUSED.clear()
            with contextlib.ExitStack() as patches:
                if name == "compiled step":
                    patches.enter_context(mock.patch.object(modeling_llama.LlamaModel, "forward", compiled_step()))
                if name == "plain loop":
                    patches.enter_context(mock.patch.object(gpu_step, "decode", lambda *inputs: None))
                policy = small_policy(options, 16 if name == "LoRA r 16" else 0)
                row = {"row": f"sample, {name}", "ours, s": seconds_of(sampling_turn(policy, options), options, 3)}
            if gpu_step.STEPS and options.device != "cpu":
                row |= replay_seconds()
            weights = sum(p.numel() for p in policy.parameters()) * (4 if options.precision == "fp32" else 2)
            row |= {"graph": speed.graph(), "read per token, GB": weights / 1e9}
            yield row | {"compiled": torch._dynamo.utils.counters["stats"]["unique_graphs"]}  # 1 is the whole step

    return stage


def profile(options):
    """The kernels of sampling with SmolLM2's shape, and those of a REINFORCE step of GPT-2 small, longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [] if options.device == "cpu" else [torch.profiler.ProfilerActivity.CUDA]

    def a_step(turns):
        step = speed.ReinforceStep(TOY if options.toy else speed.SMALL, 4 if options.toy else 64)
        with tempfile.TemporaryDirectory() as folder:
            step.build(folder)
            step.ours(folder, options, turns)

    def sampling(turns):
        turns.take(sampling_turn(small_policy(options), options, 16))  # a token has a thousand kernels

    for name, work in {"sampling": sampling, "a step": a_step}.items():
        yield {"row": f"profile of {name}"} | profiled(name, work, activities, options)


def profiled(name, work, activities, options):
    """Profile the fourth turn of work(turns), its last, into profile.txt."""
    profiler, count = torch.profiler.profile(activities=activities), itertools.count(1)

    def before_a_turn():
        n = next(count)
        if n == 4:
            profiler.start()
        if n == 5:
            profiler.stop()
            raise EOFError

    with contextlib.suppress(EOFError):
        work(speed.Turns(SimpleNamespace(send=print, recv=before_a_turn), options))
    # of the GPU's events only kernels: not their callers on the CPU, nor the names of regions, such as AdamW's
    cpu = torch.autograd.DeviceType.CPU
    kernels = [e for e in profiler.key_averages() if e.device_type != cpu and not e.is_user_annotation]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    lines = [f"{e.self_device_time_total / 1e3:9.3f} ms {e.count:6} {e.key}" for e in kernels]
    with open(options.out / "profile.txt", "a") as file:
        print(name, *lines, sep="\n", file=file)
    seconds = sum(event.self_device_time_total for event in kernels) / 1e6
    return {"kernels": sum(event.count for event in kernels), "device, s": seconds}


def precisions(options):
    """REINFORCE on the embedded world in three precisions: the same reward?"""
    curves = {}
    for precision in ("fp32", "bf16", "fp16"):
        out = options.out / f"run-{precision}"
        flags = f"--precision {precision} --device {options.device} --resume --out {out}"
        flags += " --steps 3 --batch-size 4 --num-eval-prompts 4" if options.toy else ""
        start = time.perf_counter()
        if not (out / "summary.json").exists():
            train_reinforce.main(flags.split())
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        curves[precision] = [(row["step"], row["reward"]) for row in rows]
        with open(options.out / "curves.jsonl", "a") as file:
            file.writelines(json.dumps({"precision": precision, **row}) + "\n" for row in rows)
        after = json.loads((out / "summary.json").read_text())["after"]
        steps = sorted(row["step_seconds"] for row in rows)
        yield {"row": f"train, {precision}", "reward": after["reward"], "reward_se": after["reward_se"],
               "kl": after["kl"], "skipped": sum(row["grad_norm"] is None for row in rows),
               "ours, s": steps[len(steps) // 2], "wall, s": time.perf_counter() - start,
               "graph": speed.graph()}  # fmt: skip

    def fill(panel, name):
        for precision, points in curves.items():
            panel.plot(*zip(*points), label=precision, linewidth=1)
        panel.set(xlabel="step", ylabel=name)

    plots.draw(["reward"], fill, options.out / "curves.png", (6.0, 4.0))


def nccl(options):
    """One process's nccl (or gloo) sums its own tensor: does the engine of torchrun start here?"""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo" if options.device == "cpu" else "nccl")
    x = torch.ones(8 if options.toy else 10**8, device=options.device)
    dist.all_reduce(x)
    yield {"row": "nccl", "sum": x.mean().item(), "backend": dist.get_backend()}
    dist.destroy_process_group()


STAGES = {  # name: (what it does, its seconds; it is stopped after half as many again), in the order of their worth
    "facts": (facts, 25),
    "right": (right, 70),
    "sampling": (speed_rows("sample-smollm2"), 70),
    "profile": (profile, 75),
    "step": (speed_rows("step-gpt2-64"), 100),
    "precisions": (precisions, 110),
    "ablations": (ablations("graph", "LoRA r 16", "plain loop"), 60),
    "lora": (speed_rows("lora-pass", "reward-lora"), 90),
    "merge": (speed_rows("merge"), 45),
    "nccl": (nccl, 25),
    "compiled": (ablations("graph", "compiled step"), 180),  # Inductor takes a minute or two
}


def run_stage(options):
    """The stage in this process; its rows go to results.jsonl as they come."""
    resolve_device(options)
    with open(options.out / "results.jsonl", "a") as file:
        for row in STAGES[options.stage][0](options):
            print(json.dumps(row), flush=True)
            file.write(json.dumps({"stage": options.stage} | row) + "\n")
            file.flush()


def table(options):
    """results.jsonl as a table a stage, for people."""
    path, text = options.out / "results.jsonl", ""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [{key: row[key] for key in row if key != "stage"} for row in rows if row["stage"] == stage]
        text += f"\n{stage}\n\n{format_table(mine)}\n"
    (options.out / "table.md").write_text(text, encoding="utf-8")
    return text


@dataclass
class GpuOptions(RunOptions):
    """Measure what a GPU should show."""

    script: ClassVar[str] = "benchmarks/gpu.py"

    seconds: int = option(540, "for all stages together", low=1)
    stages: list = option(list(STAGES), f"of {', '.join(STAGES)}")
    toy: bool = option(False, "tiny models: a rehearsal")
    stage: str = option("", "used by the command itself: this stage, in this process")

    def check(self):
        for name in [*self.stages, self.stage or "facts"]:
            if name not in STAGES:
                raise UserError(f"{name}: there is no such stage; there are {', '.join(STAGES)}")


@one_line_errors
def main(argv=None):
    options = parse_options(GpuOptions, argv)
    options.out = Path(options.out or "runs/gpu").resolve()
    options.out.mkdir(parents=True, exist_ok=True)  # results of earlier calls stay in it
    if options.stage:
        return run_stage(options)
    deadline = time.monotonic() + options.seconds
    for name in options.stages:
        limit, left = STAGES[name][1], deadline - time.monotonic()
        row = {"stage": name, "row": name}
        if limit > left + 5:
            row["failed"] = f"skipped: {limit} s, and {left:.0f} are left"
        else:
            command = [sys.executable, __file__, "--stage", name, *(sys.argv[1:] if argv is None else argv)]
            with open(options.out / "log.txt", "a") as log:
                print(f"\n== {name}", file=log, flush=True)
                try:
                    code = subprocess.run(command, stdout=log, stderr=log, timeout=min(limit * 1.5, left)).returncode
                    row["failed"] = f"exit code {code}; see log.txt" if code else None
                except subprocess.TimeoutExpired as error:
                    row["failed"] = f"stopped after {error.timeout:.0f} s"
        if row.get("failed"):
            with open(options.out / "results.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        print(f"{name}: {row.get('failed') or 'done'}, {deadline - time.monotonic():.0f} s left", flush=True)
    print(table(options))


if __name__ == "__main__":
    main()
