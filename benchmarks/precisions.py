"""Do bf16, and fp16 with a GradScaler, train to the same reward as fp32? Three runs of REINFORCE, and their curves.

    python benchmarks/precisions.py --out runs/precisions                          # the embedded world
    python benchmarks/precisions.py --device cuda --policy openai-community/gpt2 --reward-model runs/rm \
        --prompts data/imdb/train.jsonl.gz --out runs/precisions

All options are train_reinforce.py's; the three runs are in the folder's fp32/, bf16/ and fp16/. The table is of the
last fifth of the steps, and of the held-out prompts, whose answers are sampled in the run's own precision.
"""

import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_reinforce
from rlhf_min.errors import UserError, one_line_errors
from rlhf_min.evaluation import format_table
from rlhf_min.options import parse_options
from rlhf_min.plots import plot_metrics
from rlhf_min.precision import resolve_device
from rlhf_min.runlog import RunLog

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass
class PrecisionOptions(train_reinforce.ReinforceOptions):
    """Train with REINFORCE in fp32, bf16 and fp16."""

    script: ClassVar[str] = "benchmarks/precisions.py"
    parallel: ClassVar[bool] = False

    def check(self):
        super().check()
        if self.resume:
            raise UserError("--resume: this is three runs; resume one of them with train_reinforce.py")


@one_line_errors
def main(argv=None):
    options = parse_options(PrecisionOptions, argv)
    options.check()
    resolve_device(options)
    options.save_every = 0
    log, rows, metrics = RunLog(options), [], []
    with log.running():
        for precision in PRECISIONS:
            run = log.folder / precision
            flags = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(options).items()
                     if not isinstance(value, bool | list) and value != ""]  # fmt: skip
            lists = [word for name, value in asdict(options).items() if isinstance(value, list) and value
                     for word in (f"--{name.replace('_', '-')}", *value)]  # fmt: skip
            train_reinforce.main([*flags, *lists, "--precision", precision, "--out", str(run)])
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            metrics += [line | {"precision": precision} for line in lines]
            last = lines[-max(1, len(lines) // 5) :]
            means = {name: statistics.fmean(line[name] for line in last) for name in ("reward", "kl", "step_seconds")}
            skipped = sum(line["grad_norm"] is None for line in lines)
            after = json.loads((run / "summary.json").read_text())["after"]
            held_out = {f"held-out {name}": after[name] for name in ("reward", "kl")}
            held_out["held-out reward_se"] = after["reward_se"]
            rows.append({"precision": precision, **means, "skipped steps": skipped, **held_out})
        text = format_table(rows)
        print("\n" + text)
        (log.folder / "table.md").write_text(text + "\n", encoding="utf-8")
        plot_metrics(metrics, ["reward", "kl"], log.folder / "precisions.png", series=lambda row: row["precision"])
        log.finish(rows=rows)


if __name__ == "__main__":
    main()
