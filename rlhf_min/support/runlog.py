"""What a run leaves behind, run.json, metrics.jsonl (a line a step) and summary.json, and how it is resumed."""

import contextlib
import dataclasses
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import tokenizers
import torch
import transformers
from tqdm import tqdm

from . import parallel
from .errors import Stopped, UserError, explain
from .files import lock, read_json, whole, write_json

SHOWN = {"loss", "accuracy", "reward", "kl"}


def reporter(name, folder, team, options):
    """A function of (metrics, step) that logs numbers with TensorBoard or Weights & Biases."""
    if name == "wandb":
        import wandb

        run = f"{folder.name} {team}".strip()
        wandb.init(project="rlhf_min", name=run, dir=folder, config=dataclasses.asdict(options))
        return lambda metrics, step: wandb.log(metrics, step=step)
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / team)
    return lambda metrics, step: [writer.add_scalar(name, value, step) for name, value in metrics.items()]


class RandomState:
    """torch's global random generators, which dropout draws from."""

    def state_dict(self):
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def load_state_dict(self, state):
        torch.set_rng_state(state["cpu"].cpu())
        for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda.cpu(), device)


def snapshot(state):
    """A state, {name: what a step changes}, as torch.save takes it: an object gives its state_dict."""
    if isinstance(state, dict):
        return {name: snapshot(value) for name, value in state.items()}
    return state.state_dict() if hasattr(state, "state_dict") else state


@torch.no_grad()
def restore(state, saved):
    """Put a snapshot back where it was taken: into the tensors, dictionaries and objects of `state`, in place."""
    for name, value in saved.items():
        target = state.get(name)
        if isinstance(target, dict):
            restore(target, value)
        elif isinstance(target, torch.Tensor):
            target.copy_(value)
        elif hasattr(target, "load_state_dict"):
            target.load_state_dict(value)
        else:
            state[name] = value


def save_checkpoint(path, **values):
    """Write {name: tensors, numbers, texts, in dictionaries, lists and tuples}."""
    with whole(path) as new, open(new, "wb") as file:  # a file that torch opens would not say that the disk is full
        torch.save(values, file)


def load_checkpoint(path, device="cpu"):
    """What save_checkpoint wrote, or None where there is no file. No code in it can run."""
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None


@contextlib.contextmanager
def delayed_interrupts():
    """A list that the first Ctrl-C or SIGTERM is put into, so that a step can be finished; a second stops at once."""
    received = []

    def handler(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)
        os.write(2, b"\nfinishing this step, to save it; once more stops at once\n")  # print is not reentrant

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            if before[number] is not signal.SIG_IGN:  # what a shell starts with & ignores SIGINT
                signal.signal(number, handler)
        yield received
    finally:
        for number in before:
            signal.signal(number, before[number])


class RunLog:
    """The folder of a run and what is written to it. Nothing is written before `running`, when all input has been read.

    `<folder>/checkpoint/` holds what --resume continues from; it is gone when the run has finished. Of a team of
    processes the first one writes its steps. Of several teams, each writes a file of its own in checkpoint/.
    """

    def __init__(self, options, team=parallel.ALONE):
        if parallel.world_size() > 1 and team is parallel.ALONE:
            raise UserError(f"{options.script} runs in one process; start it without torchrun")
        self.options, self.team, self.writes = options, team, parallel.rank() == 0
        self.save_every = getattr(options, "save_every", 0)
        self.folder = Path(options.out) if options.out else next_folder(options.script)
        check_folder(self.folder, getattr(options, "resume", None))
        self.folder = Path(parallel.gather_objects(str(self.folder))[0])
        self._checkpoints = self.folder / "checkpoint"
        one_team = self.folder / "metrics.jsonl"
        self._metrics = one_team if team.count == 1 else self._checkpoints / f"metrics-{team.number}.jsonl"
        self._state = self._checkpoints / f"state-{team.number}.pt"
        self._start = self._last_step = time.perf_counter()
        self._saved = None  # the state of the loop that was interrupted, until a loop begins
        self._bar = self._lines = None
        self._report, self._written = None, 0

    @contextlib.contextmanager
    def running(self):
        """`with log.running():` make the folder and run.json, or go on in them; an interrupt says how to go on."""
        try:
            self._begin()
            yield
        except (Exception, KeyboardInterrupt) as error:
            known = explain(error)
            if known is None or (known is error and not isinstance(known, Stopped)) or not self.save_every:
                raise
            n = parallel.world_size()
            python = "python" if n == 1 else f"torchrun --nproc-per-node {n}"
            command = f"{python} {self.options.script} --out {self.folder} --resume"
            raise type(known)(f"{known}; to go on: {command}") from None
        finally:
            for handle in filter(None, (self._bar, self._lines)):
                with contextlib.suppress(OSError):  # what a full disk did not take cannot be flushed now either
                    handle.close()

    def _begin(self):
        """Make the folder and run.json, or read what the next loop goes on with."""
        versions = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
        run = {
            "script": self.options.script,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "options": dataclasses.asdict(self.options) | {"out": str(self.folder)},
            "commit": git_commit(),
            "versions": {"python": platform.python_version(), **versions},
            "threads": torch.get_num_threads(),
            "processes": parallel.world_size(),
        }
        path = self.folder / "run.json"
        if path.exists():
            begun = read_json(path)
            if begun["processes"] != run["processes"]:
                raise UserError(f"--resume: the run has {begun['processes']} processes, not {run['processes']}")
            run = begun | {"resumed": [*begun.get("resumed", []), {key: run[key] for key in ("commit", "threads")}]}
        elif self.writes:
            write_json(path, run)  # before any other file: without it, a folder is no run to resume
        self._metrics.parent.mkdir(parents=True, exist_ok=True)
        if self.team.index == 0 and hasattr(self.options, "resume"):  # evaluate.py has no steps
            self._lines = open(self._metrics, "ab")  # noqa: SIM115
            lock(self._lines)
        self._saved = load_checkpoint(self._state)
        if self.writes and "resumed" in run:
            write_json(path, run)
        if self._lines:
            self._lines.truncate(self._saved["metrics_bytes"] if self._saved else 0)  # what follows is done again
            if self.options.report_to:
                team = "" if self.team.count == 1 else f"team-{self.team.number}"  # else their lines would mix
                self._report = reporter(self.options.report_to, self.folder, team, self.options)
                self._written = len(self.metrics())
        if self._saved:
            self._start -= self._saved["seconds"]
        if self._saved and self.team.index == 0:
            print(f"resumed: {self._saved['title']}, after step {self._saved['step']}")

    def progress(self, title, steps, state):
        """Yield 1, ..., `steps` under a progress bar on stderr, with checkpoints of `state()`: what a step changes.

        A resumed run puts the saved state back into `state()` and goes on with the step behind it.
        """
        done, saved, self._saved = 0, self._saved, None
        if saved and saved["title"] == title:
            done = saved["step"]
            restore(state() | {"random": RandomState()}, saved["state"] | {"random": saved["random"][self.team.index]})
        self._last_step = time.perf_counter()
        quiet = True if self.team.index else None  # None: shown where stderr is a terminal
        self._bar = tqdm(desc=title, initial=done, total=steps, mininterval=0.5, dynamic_ncols=True, disable=quiet)
        alone = self.save_every and parallel.world_size() == 1  # of several processes each would finish another step
        with delayed_interrupts() if alone else contextlib.nullcontext() as interrupts:
            for step in range(done + 1, steps + 1):
                yield step
                self._bar.update()
                if self.save_every and (interrupts or step == steps or step % self.save_every == 0):
                    self._save(title=title, step=step, state=snapshot(state()))
                if interrupts:
                    raise Stopped(f"stopped after step {step} of {steps}, {title}")
        self._bar.close()

    def _save(self, **values):
        random = parallel.gather_objects(RandomState().state_dict(), self.team)
        if self.team.index == 0:
            seconds = time.perf_counter() - self._start
            save_checkpoint(self._state, **values, metrics_bytes=self._lines.tell(), seconds=seconds, random=random)

    def once(self, name, make, *args):
        """make(*args), or what it returned before the run was interrupted: tensors, numbers, texts, in dicts, lists."""
        path = self._checkpoints / f"{name}.pt"
        saved = load_checkpoint(path, self.options.device)
        if saved:
            return saved["value"]
        value = make(*args)
        if self.save_every and self.team.index == 0:
            save_checkpoint(path, value=value)
        return value

    def step(self, **metrics):
        """Write a line of metrics.jsonl; the names in SHOWN go behind the progress bar, too."""
        now = time.perf_counter()
        metrics["step_seconds"], self._last_step = round(now - self._last_step, 4), now
        if self._lines:
            self._lines.write(json.dumps(_finite(metrics)).encode() + b"\n")
            self._lines.flush()
        if self._report:
            self._written += 1
            self._report({key: value for key, value in metrics.items() if not isinstance(value, list)}, self._written)
        self._bar.set_postfix({name: f"{metrics[name]:.3f}" for name in SHOWN & metrics.keys()}, refresh=False)

    def metrics(self):
        """All lines, of all teams, in the order in which one process would have written them."""
        texts = [path.read_text("ascii") for path in self._metrics.parent.glob("metrics*.jsonl")]
        rows = [json.loads(line) for text in texts for line in text.splitlines()]
        return sorted(rows, key=lambda row: (row.get("iteration", 0), row.get("run", 0), row["step"]))

    def finish(self, **summary):
        """Write summary.json, and say where everything is."""
        if self.team.count > 1:
            with whole(self.folder / "metrics.jsonl") as new:
                new.write_text("".join(json.dumps(row) + "\n" for row in self.metrics()), "ascii")
        summary["wall_seconds"] = round(time.perf_counter() - self._start, 1)
        write_json(self.folder / "summary.json", _finite(summary))
        shutil.rmtree(self._checkpoints, ignore_errors=True)
        print(f"written to {self.folder}/: {', '.join(sorted(path.name for path in self.folder.iterdir()))}")


def next_folder(script):
    """The first of runs/<script>-1, runs/<script>-2, ... that is free."""
    name = re.split("[./]", script.removesuffix(".py"))[-1].removeprefix("train_")
    return next(folder for n in count(1) if not (folder := Path("runs", f"{name}-{n}")).exists())


def check_folder(folder, resume):
    """UserError unless the folder is free, or holds a run to resume. A finished run is left alone, with exit code 0."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out {folder} cannot be made: {there} is no folder that can be written")
    begun = resume and (folder / "run.json").exists()
    if begun and (folder / "summary.json").exists():
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)  # it was killed at the very end
        print(f"the run in {folder} has finished: nothing to resume")
        raise SystemExit(0)
    if not begun and any(not path.name.endswith(".new") for path in folder.glob("*")):  # .new: half written
        remedy = "name a new folder" + (", or add --resume" if resume is False else "")
        raise UserError(f"--out {folder} holds another run or other files; {remedy}")


def git_commit():
    """The commit of the code that runs, or None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):  # no git
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def _finite(value):
    """JSON has no NaN: a number that is not finite becomes null."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)
