"""What a run leaves behind: run.json, metrics.jsonl (a line a step), summary.json."""

import dataclasses
import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from tqdm import tqdm

from .errors import UserError


def new_folder(out, script):
    """`out` if it is free, else UserError; without `out` the first free runs/<script>-N."""
    if out:
        folder = Path(out)
        if (folder / "run.json").exists() or (folder.is_dir() and any(folder.iterdir())):
            raise UserError(f"--out {out} holds another run or other files; name a new folder, or remove that one")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {out} is a file; name a new folder")
    else:
        numbers = (n for n in range(1, 10**6) if not Path("runs", f"{script}-{n}").exists())
        folder = Path("runs", f"{script}-{next(numbers)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made: {error.strerror}") from None
    return folder


def git_commit():
    """The commit of the code that runs, or None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class RunLog:
    """The folder of a run and what is written to it."""

    def __init__(self, script, options):
        self.folder = new_folder(options.out, script)
        self.start = time.perf_counter()
        run = {
            "script": script,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "options": dataclasses.asdict(options) | {"out": str(self.folder)},
            "seed": options.seed,
            "commit": git_commit(),
            "versions": {
                "python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__, "tokenizers": tokenizers.__version__,
            },
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        self._write("run.json", run)
        self._metrics = open(self.folder / "metrics.jsonl", "w", encoding="ascii", buffering=1)  # noqa: SIM115
        self._bar = None

    def _write(self, name, values):
        (self.folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="ascii")

    def progress(self, iterable, title):
        """Iterate with a progress bar on stderr; `step` shows its first figures behind it."""
        self._bar = tqdm(iterable, desc=title, mininterval=0.5, dynamic_ncols=True)
        return self._bar

    def step(self, show=(), **metrics):
        """Write a line of metrics.jsonl; names in `show` go behind the progress bar, too."""
        self._metrics.write(json.dumps(metrics) + "\n")
        if self._bar is not None:
            shown = show or ["loss"]
            self._bar.set_postfix({name: f"{metrics[name]:.3f}" for name in shown if name in metrics}, refresh=False)

    def metrics(self):
        """All lines written so far."""
        self._metrics.flush()
        return [json.loads(line) for line in open(self.folder / "metrics.jsonl", encoding="ascii")]

    def finish(self, **summary):
        """Write summary.json, and say where everything is."""
        summary["wall_seconds"] = round(time.perf_counter() - self.start, 1)
        self._write("summary.json", _finite(summary))
        self._metrics.close()
        print(f"written to {self.folder}/: {', '.join(sorted(path.name for path in self.folder.iterdir()))}")


def _finite(value):
    """JSON has no NaN: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
