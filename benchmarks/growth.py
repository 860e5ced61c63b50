"""How the cost grows: seconds of a WARP run's step against batch, answer length, width and M, as a table and a plot.

    python benchmarks/growth.py --out runs/growth

One factor at a time is doubled, the others stay at 32 answers of 32 tokens, width 128 and one run; a GPT-2 of four
blocks with random weights, whose answers hardly ever end early, and a reward model of the same shape. A step is what
train_warp.py does: rollout, reward, log-probs under policy, anchor and θ_sft, update, EMA; for M it is an iteration of
M runs of ten steps, and their merge. `power` is the exponent p of seconds ∝ factor^p from the line above: 1 is linear.
"""

import math
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import GPT2ForSequenceClassification

import train_warp
from benchmarks.speed import gpt2, tokenizer_of
from rlhf_min import parallel, warp
from rlhf_min.data import Prompt
from rlhf_min.errors import one_line_errors
from rlhf_min.evaluation import format_table
from rlhf_min.models import get_weights
from rlhf_min.options import RunOptions, option, parse_options
from rlhf_min.plots import draw
from rlhf_min.precision import resolve_device
from rlhf_min.reward_model import RewardModel
from rlhf_min.runlog import RunLog

VOCABULARY, PROMPT = 4096, 10
FACTORS = {
    "batch": [8, 16, 32, 64, 128],
    "answer": [8, 16, 32, 64, 128],
    "width": [64, 128, 256, 512],
    "M": [1, 2, 4, 8],
}
MIDDLE = {"batch": 32, "answer": 32, "width": 128}


@dataclass
class GrowthOptions(RunOptions):
    """Measure how the time of a step grows with batch, answer length, width and M."""

    script: ClassVar[str] = "benchmarks/growth.py"

    repeats: int = option(5, "steps that are timed, after two that are not", low=1)
    threads: int = option(0, "threads of the process; 0 takes one a core", low=0)


class Clock:
    """In place of a RunLog: the seconds of each step."""

    def __init__(self):
        self.team, self.seconds = parallel.ALONE, []

    def progress(self, title, steps, state):
        """1, ..., steps"""
        for step in range(1, steps + 1):
            start = time.perf_counter()
            yield step
            self.seconds.append(time.perf_counter() - start)

    def step(self, **metrics):
        """Nothing is written."""


def time_step(setting, options):
    """Seconds of a step, the median, or with M in `setting` of M runs of ten steps and their merge."""
    shape = {"n_layer": 4, "n_embd": setting["width"], "n_head": setting["width"] // 32, "vocab_size": VOCABULARY}
    policy, tokenizer = gpt2(shape).to(options.device), tokenizer_of(VOCABULARY)
    judge = gpt2(shape, GPT2ForSequenceClassification, num_labels=1).to(options.device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY - 2, (2 * setting["batch"], PROMPT), generator=generator).tolist()
    prompts = [Prompt(row, tokenizer.decode(row)) for row in ids]
    steps, runs = options.repeats + 2, setting.get("M", 1)
    flags = f"--batch-size {setting['batch']} --steps {steps} --max-length {PROMPT + setting['answer']} "
    warp_options = parse_options(train_warp.WarpOptions, (flags + f"--precision {options.precision}").split())
    init, clock = get_weights(policy), Clock()
    arguments = policy, tokenizer, RewardModel(judge, tokenizer), prompts, init, init, warp_options, clock, 1
    policies = [train_warp.train_policy(*arguments, run) for run in range(1, runs + 1)]
    step = statistics.median(clock.seconds[i] for i in range(len(clock.seconds)) if i % steps >= 2)
    if "M" not in setting:
        return step
    start = time.perf_counter()
    warp.merge(init, policies)
    return sum(clock.seconds) * 10 / steps + time.perf_counter() - start


def plot_growth(rows, path):
    """Seconds over each factor, in double logarithms, where a straight line of slope 1 is linear growth."""

    def fill(panel, factor):
        values, seconds = zip(*((row["value"], row["seconds"]) for row in rows if row["factor"] == factor))
        panel.loglog(values, seconds, "o-", label="measured")
        panel.loglog(values, [seconds[-1] * value / values[-1] for value in values], ":", label="linear")
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_xticks(values, map(str, values))
        panel.minorticks_off()
        panel.set(xlabel=factor, ylabel="seconds")

    draw(list(dict.fromkeys(row["factor"] for row in rows)), fill, path, (3.6, 3.4))


@one_line_errors
def main(argv=None):
    options = parse_options(GrowthOptions, argv)
    options.check()
    resolve_device(options)
    torch.set_num_threads(options.threads or os.cpu_count())
    log, rows = RunLog(options), []
    with log.running():
        for factor, values in FACTORS.items():
            above = None
            for value in values:
                seconds = time_step(MIDDLE | {factor: value}, options)
                power = math.log(seconds / above[1]) / math.log(value / above[0]) if above else math.nan
                above = value, seconds
                rows.append({"factor": factor, "value": value, "seconds": seconds, "power": power})
                print(rows[-1], flush=True)
        text = format_table(rows)
        print("\n" + text)
        (log.folder / "table.md").write_text(text + "\n", encoding="utf-8")
        plot_growth(rows, log.folder / "growth.png")
        log.finish(rows=rows)


if __name__ == "__main__":
    main()
