"""What a run leaves behind, run.json, metrics.jsonl (a line a step) and summary.json, and how it is resumed."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import secrets
import shlex
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

from . import parallel
from .checkpoint import RandomState, load_checkpoint, pack, restore, save_checkpoint, snapshot, unpack
from .errors import Stopped, UserError, explain
from .files import read_json, write_json
from .resume import check_inputs, check_state, fingerprints


def git_commit():
    """The commit of the code that runs, or None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class RunLog:
    """The folder of a run and what is written to it: nothing before `running`, when all input has been read.

    `<folder>/checkpoint/` holds what --resume continues from; it is gone when the run has finished. Of several
    processes all call it alike, and the first one writes; what the others have to say reaches it with a checkpoint.
    """

    def __init__(self, options):
        self.writes = parallel.rank() == 0
        self.team = parallel.ALONE  # the processes that share this one's steps, whose first one logs them
        self._pending = []  # lines that have not reached the first process
        self.options, self.save_every = options, options.save_every
        self._start = self._last_step = time.perf_counter()
        self._saved = None  # the state of the loop that was interrupted, until a loop begins
        self._in_step = self._stop = False
        self._bar = self._lines = self._lock = None

    @contextlib.contextmanager
    def running(self):
        """`with log.running():` make the folder and run.json, or go on in them; an error says how to go on."""
        how_to_go_on = ""
        try:
            parts = self._begin() if self.writes else None
            self._saved = unpack(parallel.to_each(parts))
            if self.save_every and self.writes:
                folder, count = shlex.quote(str(self.folder)), parallel.world_size()
                python = (
                    "python" if count == 1 else f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', count)}"
                )
                how_to_go_on = f"; to go on as it is: {python} {self.options.script} --out {folder} --resume"
            with self._signals():
                yield
        except (Exception, KeyboardInterrupt) as error:
            known = explain(error)
            if known is None:
                raise
            raise type(known)(f"{known}{how_to_go_on}") from None
        finally:
            for handle in (self._bar, self._lines):
                if handle is not None:
                    with contextlib.suppress(OSError):  # what a full disk did not take cannot be flushed now either
                        handle.close()
            if self._lock is not None:
                os.close(self._lock)

    def _begin(self):
        """Make the folder or go on in it; returns what the loop of each process goes on with, None in a new run."""
        self.folder = self.options.folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock_folder()
        self._checkpoints = self.folder / "checkpoint"
        versions = {"python": platform.python_version()}
        versions |= {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
        machine = {"commit": git_commit(), "versions": versions, "threads": torch.get_num_threads(),
                   "device": self.options.device, "processes": parallel.world_size()}  # fmt: skip
        inputs = fingerprints(self.options)
        run = {
            "id": secrets.token_hex(8),  # which its checkpoints have, too
            "script": self.options.script,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "options": dataclasses.asdict(self.options) | {"out": str(self.folder)},
            "inputs": inputs,
            **machine,
        }
        path = self.folder / "run.json"
        if path.exists():
            run = read_json(path)
            self._compare(run, inputs, machine)
        self._id = run.get("id")
        offset, parts = self._load_state(run)
        write_json(path, run)
        self._lines = open(self.folder / "metrics.jsonl", "ab")  # noqa: SIM115
        self._lines.truncate(offset)  # what follows is done again
        return parts

    def _lock_folder(self):
        """UserError where another process writes this run. The lock dies with its process."""
        with contextlib.suppress(ImportError):  # Windows has no fcntl
            import fcntl

            self._lock = os.open(self.folder, os.O_RDONLY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.folder} belongs to a run that is going on; wait for it, or stop it") from None
            except OSError:  # a file system without locks
                pass

    def _compare(self, run, inputs, machine):
        """UserError for inputs other than those that `run` began with; its machine may be another, which it notes."""
        if not self.options.resume:
            raise UserError(f"{self.folder} was taken by another run a moment ago; name another --out")
        check_inputs(self.folder, run, inputs)
        resumed = run["resumed"] = run["resumed"] if isinstance(run.get("resumed"), list) else []
        last = resumed[-1] if resumed and isinstance(resumed[-1], dict) else run
        resumed.append(machine)
        if any(last.get(key) != value for key, value in machine.items()):
            print(f"note: commit, versions, threads or device are not those in {self.folder}/run.json; figures may "
                  "differ in their last digits", file=sys.stderr)  # fmt: skip

    def _load_state(self, run):
        """(size of metrics.jsonl at the last checkpoint, each process's state, which its next loop takes)"""
        if check_state(self.folder, run) is None:
            if self.options.resume:
                print(f"nothing to resume in {self.folder}: the run begins with its first step")
            return 0, [None] * parallel.world_size()
        saved = load_checkpoint(self._checkpoints / "state.pt")
        self._start -= saved["seconds"]
        print(f"resumed: {saved['title']}, after step {saved['step']}")
        return saved["metrics_bytes"], saved["parts"]

    @contextlib.contextmanager
    def _signals(self):
        """Ctrl-C or SIGTERM in a step lets the step finish and be saved; a second one stops at once.

        Of several processes each would finish another step, so they stop at once.
        """

        def stop(number, frame):
            if not self._in_step or self._stop or parallel.world_size() > 1:
                raise KeyboardInterrupt
            self._stop = True
            os.write(2, b"\nfinishing this step, to save it; once more stops at once\n")  # print is not reentrant

        if not self.save_every or threading.current_thread() is not threading.main_thread():
            yield
            return
        # what a shell script starts with & ignores SIGINT
        heeded = [number for number in (signal.SIGINT, signal.SIGTERM)
                  if signal.getsignal(number) is not signal.SIG_IGN]  # fmt: skip
        before = {number: signal.signal(number, stop) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def progress(self, title, steps, state=None):
        """Yield 1, ..., `steps` under a progress bar on stderr, with checkpoints of `state()`; see checkpoint.py.

        A resumed run puts the saved state back into `state()` and goes on with the step behind it. Several processes
        must count to the same `steps`.
        """
        done, saved, self._saved = 0, self._saved, None
        if state and saved and saved["title"] == title:
            done = saved["step"]
            restore(state() | {"random": RandomState()}, saved["state"])
        self._last_step = time.perf_counter()
        self._bar = tqdm(desc=title, initial=done, total=steps, mininterval=0.5, dynamic_ncols=True,
                         disable=None if self.writes else True)  # fmt: skip
        for step in range(done + 1, steps + 1):
            self._in_step = True
            yield step
            self._bar.update()
            if state and self.save_every and (self._stop or step == steps or step % self.save_every == 0):
                self._save(title, step, state())
            elif step == steps:
                self._collect()
            self._in_step = False
            if self._stop:
                raise Stopped(f"stopped after step {step} of {steps}, {title}")
        self._bar.close()

    def _save(self, title, step, state):
        self._collect()
        part = {"title": title, "step": step, "state": snapshot(state | {"random": RandomState()})}
        parts = parallel.to_first(pack(part)) if parallel.world_size() > 1 else [part]
        if self.writes:
            os.fsync(self._lines.fileno())
            about = {
                "run": self._id,
                "title": title, "step": step, "metrics_bytes": self._lines.tell(), "processes": len(parts),
                "finished": [path.name for path in self._checkpoints.glob("*.pt") if path.name != "state.pt"],
                "seconds": time.perf_counter() - self._start,
            }  # fmt: skip
            save_checkpoint(self._checkpoints / "state.pt", about, parts=parts)

    def _collect(self):
        """Write the lines of all processes."""
        lines, self._pending = parallel.to_first(self._pending), []
        if self.writes:
            self._lines.writelines(line for part in lines for line in part)
            self._lines.flush()

    def once(self, name, make, *args):
        """make(*args), or what it returned before the run was interrupted: tensors, numbers, texts, in dicts, lists."""
        path = self._checkpoints / f"{name}.pt" if self.writes else None
        if parallel.from_first(self.writes and path.exists()):
            saved = load_checkpoint(path, self.options.device) if self.writes else None
            if parallel.world_size() > 1:
                saved = unpack(parallel.from_first(pack(saved) if self.writes else None), self.options.device)
            RandomState().load_state_dict(saved["random"])
            return saved["value"]
        value = make(*args)
        if self.save_every and self.writes:
            about = {"run": self._id, "metrics_bytes": self._lines.tell()}
            save_checkpoint(path, about, value=value, random=snapshot(RandomState()))
        return value

    def step(self, show=("loss",), **metrics):
        """Write a line of metrics.jsonl; names in `show` go behind the progress bar, too."""
        now = time.perf_counter()
        metrics["step_seconds"], self._last_step = round(now - self._last_step, 4), now
        if self.team.index == 0:
            self._pending.append(json.dumps(_finite(metrics)).encode() + b"\n")
        if parallel.world_size() == 1:
            self._collect()
        if self._bar is not None:
            self._bar.set_postfix({name: f"{metrics[name]:.3f}" for name in show}, refresh=False)

    def metrics(self):
        """All lines written so far."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text("ascii").splitlines()]

    def finish(self, **summary):
        """Write summary.json, and say where everything is."""
        summary["wall_seconds"] = round(time.perf_counter() - self._start, 1)
        write_json(self.folder / "summary.json", _finite(summary))
        shutil.rmtree(self._checkpoints, ignore_errors=True)
        print(f"written to {self.folder}/: {', '.join(sorted(path.name for path in self.folder.iterdir()))}")


def _finite(value):
    """JSON has no NaN: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
