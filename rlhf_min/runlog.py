"""What a run leaves behind, run.json, metrics.jsonl (a line a step) and summary.json, and how it is resumed."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from tqdm import tqdm

from .checkpoint import RandomState, fingerprint, load_checkpoint, restore, save_checkpoint, snapshot, whole
from .errors import Stopped, UserError, explain
from .options import TrainingOptions
from .sources import read_json


def git_commit():
    """The commit of the code that runs, or None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class RunLog:
    """The folder of a run and what is written to it: nothing before `running`, when all input has been read.

    `<folder>/checkpoint/` holds what --resume continues from; it is gone when the run has finished.
    """

    def __init__(self, options):
        self.options, self.folder = options, options.folder()
        self.save_every = options.save_every if isinstance(options, TrainingOptions) else 0
        self._checkpoints = self.folder / "checkpoint"
        self._start = self._last_step = time.perf_counter()
        self._saved = None  # the state of the loop that was interrupted, until that loop has taken it
        self._in_step = self._stop = False
        self._bar = self._metrics = None

    @contextlib.contextmanager
    def running(self, **inputs):
        """`with log.running(...):` make the folder and run.json, or go on in them; an error says how to go on.

        inputs: models and data, whose fingerprints must be those of the interrupted run.
        """
        how_to_go_on = ""
        try:
            self._begin({name: fingerprint(value) for name, value in inputs.items()})
            if self.save_every:
                how_to_go_on = f"; to go on: python {self.options.script} --out {self.folder} --resume"
            with self._signals():
                yield
        except (Exception, KeyboardInterrupt) as error:
            known = explain(error)
            if known is None:
                raise
            raise type(known)(f"{known}{how_to_go_on}") from None
        finally:
            for handle in (self._bar, self._metrics):
                if handle is not None:
                    with contextlib.suppress(OSError):  # what a full disk did not take cannot be flushed now either
                        handle.close()

    def _begin(self, inputs):
        versions = {"python": platform.python_version()}
        versions |= {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
        run = {
            "script": self.options.script,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "options": dataclasses.asdict(self.options) | {"out": str(self.folder)},
            "inputs": inputs,
            "commit": git_commit(),
            "versions": versions,
            "threads": torch.get_num_threads(),
        }
        if (self.folder / "run.json").exists():
            self._compare(read_json(self.folder / "run.json"), run)
        else:
            self._write("run.json", run)
        self._metrics = open(self.folder / "metrics.jsonl", "ab")  # noqa: SIM115
        self._lock()
        if (self._checkpoints / "state.pt").exists():
            self._load_state()
        self._metrics.truncate(self._saved["metrics_bytes"] if self._saved else 0)  # what follows is done again

    def _compare(self, begun, run):
        before = begun["inputs"] if isinstance(begun.get("inputs"), dict) else {}
        differ = [name for name, value in run["inputs"].items() if before.get(name) != value]
        if differ:
            raise UserError(f"--resume: {', '.join(differ)}: not what the run in {self.folder} began with; "
                            "put it back, or begin a new run")  # fmt: skip
        if any(begun.get(key) != run[key] for key in ("commit", "versions", "threads")):
            print(f"note: commit, versions or threads are not those in {self.folder}/run.json; figures may differ in "
                  "their last digits", file=sys.stderr)  # fmt: skip

    def _lock(self):
        """UserError where another process writes this run. The lock dies with its process."""
        with contextlib.suppress(ImportError):  # Windows has no fcntl
            import fcntl

            try:
                fcntl.flock(self._metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.folder} belongs to a run that is going on; wait for it, or stop it") from None

    def _load_state(self):
        saved = load_checkpoint(self._checkpoints / "state.pt", self.options.device)
        missing = [name for name in saved["kept"] if not (self._checkpoints / name).exists()]
        if missing:
            raise UserError(f"{self._checkpoints}/{missing[0]} is missing; remove {self._checkpoints} to begin anew")
        if self._metrics.tell() < saved["metrics_bytes"]:
            raise UserError(f"{self.folder}/metrics.jsonl has lost lines that the checkpoint knows; begin a new run")
        self._start -= saved["seconds"]
        self._saved = saved
        print(f"resumed: {saved['title']}, after step {saved['step']}")

    @contextlib.contextmanager
    def _signals(self):
        """Ctrl-C or SIGTERM in a step lets the step finish and be saved; a second one stops at once."""

        def stop(number, frame):
            if not self._in_step or self._stop:
                raise KeyboardInterrupt
            self._stop = True
            print("\nfinishing this step, to save it; once more stops at once", file=sys.stderr)

        if not self.save_every or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _write(self, name, values):
        with whole(self.folder / name) as new:
            new.write_text(json.dumps(values, indent=2) + "\n", encoding="ascii")

    def progress(self, title, steps, state=None):
        """Yield 1, ..., `steps` under a progress bar on stderr, with checkpoints of `state()`; see checkpoint.py.

        A resumed run puts the saved state back into `state()` and goes on with the step behind it.
        """
        done = 0
        if state and self._saved and self._saved["title"] == title:
            done = self._saved["step"]
            restore(state() | {"random": RandomState()}, self._saved["state"])
            self._saved = None
        self._last_step = time.perf_counter()
        self._bar = tqdm(desc=title, initial=done, total=steps, mininterval=0.5, dynamic_ncols=True)
        for step in range(done + 1, steps + 1):
            self._in_step = True
            yield step
            self._bar.update()
            due = self.save_every and (step % self.save_every == 0 or step == steps)
            if state and due:
                self._save(title, step, state())
            self._in_step = False
            if self._stop:
                if state and not due:
                    self._save(title, step, state())
                raise Stopped(f"stopped after step {step} of {steps}, {title}")
        self._bar.close()

    def _save(self, title, step, state):
        os.fsync(self._metrics.fileno())
        save_checkpoint(
            self._checkpoints / "state.pt", title=title, step=step, metrics_bytes=self._metrics.tell(),
            kept=[path.name for path in self._checkpoints.glob("*.pt")], seconds=time.perf_counter() - self._start,
            state=snapshot(state | {"random": RandomState()}),
        )  # fmt: skip

    def once(self, name, make, *args):
        """make(*args), or what it returned before the run was interrupted: tensors, numbers, texts, in dicts, lists."""
        path = self._checkpoints / f"{name}.pt"
        if path.exists():
            return load_checkpoint(path, self.options.device)["value"]
        value = make(*args)
        if self.save_every:
            save_checkpoint(path, value=value)
        return value

    def step(self, show=("loss",), **metrics):
        """Write a line of metrics.jsonl; names in `show` go behind the progress bar, too."""
        now = time.perf_counter()
        metrics["step_seconds"], self._last_step = round(now - self._last_step, 4), now
        self._metrics.write(json.dumps(_finite(metrics)).encode() + b"\n")
        self._metrics.flush()
        if self._bar is not None:
            self._bar.set_postfix({name: f"{metrics[name]:.3f}" for name in show}, refresh=False)

    def metrics(self):
        """All lines written so far."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text("ascii").splitlines()]

    def finish(self, **summary):
        """Write summary.json, and say where everything is."""
        summary["wall_seconds"] = round(time.perf_counter() - self._start, 1)
        self._write("summary.json", _finite(summary))
        shutil.rmtree(self._checkpoints, ignore_errors=True)
        print(f"written to {self.folder}/: {', '.join(sorted(path.name for path in self.folder.iterdir()))}")


def _finite(value):
    """JSON has no NaN: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
