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


def free_folder(out, script):
    """`out` if nothing is there, else UserError; without `out` the first free runs/<script>-N."""
    if not out:
        numbers = (n for n in range(1, 10**6) if not Path("runs", f"{script}-{n}").exists())
        return Path("runs", f"{script}-{next(numbers)}")
    folder = Path(out)
    for path in (folder, *folder.parents):
        if path.is_file():
            raise UserError(f"--out {out} cannot be made: {path} is a file; name a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--out {out} holds another run or other files; name a new folder, or remove that one")
    return folder


def git_commit():
    """The commit of the code that runs, or None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class RunLog:
    """The folder of a run and what is written to it: nothing before `begin`, when all input has been read."""

    def __init__(self, script, options):
        self.script, self.options = script, options
        self.folder = free_folder(options.out, script)
        self.start = time.perf_counter()
        self._bar = None

    def begin(self):
        """Make the folder and write run.json."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.folder} cannot be made: {error.strerror}") from None
        versions = {"python": platform.python_version()}
        versions |= {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
        run = {
            "script": self.script,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "options": dataclasses.asdict(self.options) | {"out": str(self.folder)},
            "commit": git_commit(),
            "versions": versions,
            "threads": torch.get_num_threads(),
        }
        self._write("run.json", run)
        self._metrics = open(self.folder / "metrics.jsonl", "w", encoding="ascii", buffering=1)  # noqa: SIM115

    def _write(self, name, values):
        (self.folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="ascii")

    def progress(self, iterable, title):
        """Iterate with a progress bar on stderr; `step` shows its first figures behind it."""
        self._bar = tqdm(iterable, desc=title, mininterval=0.5, dynamic_ncols=True)
        return self._bar

    def step(self, show=("loss",), **metrics):
        """Write a line of metrics.jsonl; names in `show` go behind the progress bar, too."""
        self._metrics.write(json.dumps(_finite(metrics)) + "\n")
        if self._bar is not None:
            self._bar.set_postfix({name: f"{metrics[name]:.3f}" for name in show}, refresh=False)

    def metrics(self):
        """All lines written so far."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text("ascii").splitlines()]

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
