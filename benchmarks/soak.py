"""Does a long run stay flat? Memory and step time of 20,000 steps of WARP on the embedded world, and their metrics.

    python benchmarks/soak.py --out runs/soak

The memory is the resident set that Linux reports of the process, read every second. The first iteration is the warm-up.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_rm
from rlhf_min import toy
from rlhf_min.errors import UserError, one_line_errors
from rlhf_min.evaluation import format_table
from rlhf_min.options import RunOptions, option, parse_options
from rlhf_min.runlog import RunLog


@dataclass
class SoakOptions(RunOptions):
    """Run WARP for long, and watch it from outside."""

    script: ClassVar[str] = "benchmarks/soak.py"

    iterations: int = option(10, "I: rounds of train, merge, interpolate", low=2)
    runs: int = option(2, "M: policies an iteration", low=1)
    steps: int = option(1000, "T: optimizer steps, of each policy", low=2)
    batch_size: int = option(8, "answers a step", low=1)


def resident_mib(pid):
    """MiB of memory that a process holds, or None where it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return pages * 4096 / 2**20


def watch(command, metrics, steps):
    """Run a command; [(steps done, MiB)] once a second while it trains, up to the last of `steps`."""
    samples, done, size = [], 0, 0
    with subprocess.Popen(command) as process:
        try:
            while process.poll() is None:
                memory = resident_mib(process.pid)
                if metrics.exists():
                    with open(metrics, "rb") as file:
                        file.seek(size)
                        new = file.read()
                    done, size = done + new.count(b"\n"), size + len(new)
                if 0 < done < steps and memory:
                    samples.append((done, memory))
                time.sleep(1)
        finally:
            process.terminate()
    if process.returncode:
        raise UserError(f"the run ended with exit code {process.returncode}; its message stands above")
    return samples


def by_iteration(samples, rows, options):
    """A row per iteration: range of the memory, time of a step; other programs disturb the fastest ones least."""
    table, length = [], options.runs * options.steps
    for iteration in range(1, options.iterations + 1):
        memory = [mib for done, mib in samples if (iteration - 1) * length < done <= iteration * length]
        seconds = [row["step_seconds"] for row in rows if row["iteration"] == iteration]
        table.append({
            "iteration": iteration, "steps": len(seconds), "MiB, least": min(memory, default=float("nan")),
            "MiB, most": max(memory, default=float("nan")), "ms a step, median": 1000 * statistics.median(seconds),
            "ms, fastest 10 %": 1000 * statistics.quantiles(seconds, n=10)[0],
            "ms, slowest 1 %": 1000 * statistics.quantiles(seconds, n=100)[-1],
        })  # fmt: skip
    return table


@one_line_errors
def main(argv=None):
    options = parse_options(SoakOptions, argv)
    options.check()
    log = RunLog(options)
    train_rm.prepare_inputs([toy.PROMPTS], [toy.REWARD_MODEL])
    with log.running():
        run = log.folder / "warp"
        flags = f"--lr 1e-4 --iterations {options.iterations} --runs {options.runs} --steps {options.steps} "
        flags += f"--batch-size {options.batch_size} --device {options.device} --precision {options.precision}"
        command = [sys.executable, Path(__file__).parents[1] / "train_warp.py", *flags.split(), "--out", run]
        samples = watch(command, run / "metrics.jsonl", options.iterations * options.runs * options.steps)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        positions = [(row["iteration"], row["run"], row["step"]) for row in rows]
        iterations, runs, steps = (range(1, n + 1) for n in (options.iterations, options.runs, options.steps))
        complete = positions == [(i, m, t) for i in iterations for m in runs for t in steps]
        table = by_iteration(samples, rows, options)
        warm = [mib for done, mib in samples if done > options.runs * options.steps]
        middle = statistics.median(warm)
        spread = max(max(warm) / middle - 1, 1 - min(warm) / middle)
        text = format_table(table)
        text += f"\n\n{len(rows)} steps, metrics {'complete' if complete else 'INCOMPLETE'}; "
        text += f"after the first iteration {middle:.0f} MiB ± {100 * spread:.1f} %"
        print("\n" + text)
        (log.folder / "table.md").write_text(text + "\n", encoding="utf-8")
        log.finish(rows=table, complete=complete, memory_mib=middle, memory_spread=spread)


if __name__ == "__main__":
    main()
