"""A run survives: interrupted anywhere, by anything, and resumed, it ends with the bytes of one that was left alone."""

import contextlib
import errno
import functools
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import numpy
import pytest
import torch

import rlhf_min.pretrain
import train_reinforce
import train_rm
import train_warp
from rlhf_min import checkpoint, files, runlog
from rlhf_min.batches import Batches
from rlhf_min.checkpoint import RandomState, load_checkpoint, restore, save_checkpoint, snapshot
from rlhf_min.errors import UserError
from rlhf_min.files import whole
from rlhf_min.lora import add_lora, save_adapter
from rlhf_min.models import save_model
from rlhf_min.options import parse_options
from rlhf_min.precision import Optimizer
from rlhf_min.resume import check_inputs, check_state, fingerprints, read_about
from tests.kills import results, run_quietly, survive

SAMPLING = "--batch-size 4 --num-eval-prompts 4 --max-length 13 --lr 1e-3 --save-every 2"
RUNS = {
    "rm": (train_rm, "--epochs 3 --batch-size 40 --lora-r 2 --lora-dropout 0.1 --save-every 2 --eval-every 3 "
                     "--accept-weak"),
    "reinforce": (train_reinforce, f"{SAMPLING} --steps 5"),
    "warp": (train_warp, f"{SAMPLING} --steps 3"),
    "lora-warp": (train_warp, f"{SAMPLING} --steps 3 --lora-r 2"),
    "pretrain": (rlhf_min.pretrain, "--epochs 1 --batch-size 64 --save-every 2 --width 32"),
}  # fmt: skip


class Crash(BaseException):
    """What nothing catches: the process is gone, as far as the run can tell."""


def run(name, out, *flags):
    module, own = RUNS[name]
    module.main([*own.split(), *flags, "--out", str(out)])


def resume(name, out, *flags):
    run(name, out, *flags, "--resume")


@pytest.fixture(scope="session")
def left_alone(world):
    """{name: results} of every run, undisturbed."""

    @functools.cache
    def make(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(world)
            patch.setattr("rlhf_min.plots._pyplot", lambda: None)
            run(name, f"runs/alone-{name}")
        return results(world / f"runs/alone-{name}")

    return make


@pytest.fixture(autouse=True)
def _terminal():
    """Ctrl-C as in a terminal, also where the tests run in the background, where SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def crash_at(patch, owner, name, moment, before=True, error=None):
    """Let a function fail at its `moment`-th call, before or after it does its work."""
    function, calls = getattr(owner, name), [0]

    def failing(*args, **kwargs):
        calls[0] += 1
        if calls[0] == moment and before:
            raise error or Crash
        value = function(*args, **kwargs)
        if calls[0] == moment:
            raise error or Crash
        return value

    patch.setattr(owner, name, failing)


@contextlib.contextmanager
def disturbed(*disturbance, **how):
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, *disturbance, **how)
        yield


def one_line(capsys):
    """The one line on stderr that says how it ended, apart from progress bars."""
    lines = capsys.readouterr().err.replace("\r", "\n").split("\n")
    lines = [line for line in lines if line.startswith(("error: ", "stopped"))]
    assert len(lines) == 1
    return lines[0]


def refused(capsys, name, out, *flags):
    """The line that a command ends with, and its exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(name, out, *flags)
    assert stop.value.code == 2
    return one_line(capsys)


# files that are whole or not there


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    """Until the new content is whole the old one stays, and what an earlier kill left half-written is no obstacle."""
    path = tmp_path / "deep" / "file"
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".file.new").mkdir()
    with whole(path) as new:
        new.write_text("old")
        assert not path.exists()
    with pytest.raises(KeyError), whole(path) as new:
        new.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_a_folder_is_replaced_when_it_is_complete(tmp_path):
    """The same for a model's folder: nothing of the old one is left in the new one."""
    path = tmp_path / "model"
    for name in ("first", "second"):
        with whole(path) as new:
            new.mkdir()
            (new / name).write_text(name)
    assert [file.name for file in path.iterdir()] == ["second"]
    with pytest.raises(Crash), whole(path) as new:
        new.mkdir()
        raise Crash
    with disturbed(os, "replace", 2, error=OSError()), pytest.raises(OSError), whole(path) as new:
        new.mkdir()  # the old one is aside already when the new one cannot take its name
    assert [file.name for file in path.iterdir()] == ["second"] and list(tmp_path.iterdir()) == [path]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """fsync of the file comes before the rename, that of its folder after it: a power cut leaves old or new."""
    order = []
    monkeypatch.setattr(files, "_sync", lambda path: order.append(path.name))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("rename"), replace(*paths)))
    with whole(tmp_path / "file") as new:
        new.write_text("text")
    assert order == [".file.new", "rename", tmp_path.name]


# the state


def test_a_checkpoint_is_restored_in_place(tmp_path):
    """Tensors keep their identity, dictionaries get their numbers back, objects are given to load_state_dict."""
    generator = torch.Generator().manual_seed(1)
    weights, numbers, stream = {"w": torch.ones(2)}, {"total": 3.5, "count": 2}, Batches([1, 2, 3], 2, generator)
    next(stream)
    state = {"weights": weights, "numbers": numbers, "stream": stream, "kept": {}}
    save_checkpoint(tmp_path / "c.pt", state=snapshot(state))
    expected = [next(stream) for _ in range(4)]
    tensor = weights["w"]
    tensor.zero_()
    numbers.update(total=0.0, count=0)
    state["kept"]["validation"] = 1
    restore(state, load_checkpoint(tmp_path / "c.pt", "cpu")["state"])
    assert weights["w"] is tensor and tensor.tolist() == [1.0, 1.0]
    assert numbers == {"total": 3.5, "count": 2}
    assert [next(stream) for _ in range(4)] == expected


def test_all_random_generators_are_restored(tmp_path):
    """A reward function may draw from random, numpy or torch; all three go on where they were."""
    draw = lambda: (
        random.random(),
        random.gauss(0, 1),
        numpy.random.rand(),
        numpy.random.normal(),
        torch.rand(3).tolist(),
    )
    draw()
    save_checkpoint(tmp_path / "c.pt", random=snapshot(RandomState()))
    expected = draw()
    draw()
    restore({"random": RandomState()}, {"random": load_checkpoint(tmp_path / "c.pt", "cpu")["random"]})
    assert draw() == expected


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_optimizer_goes_on_where_it_was(tmp_path, precision):
    """T55: moments, warm-up, decay and loss scale: ten steps are five and, from a checkpoint, five; one overflows."""

    def begin():
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(3))
        return weight, Optimizer([weight], 0.1, torch.device("cpu"), precision, 2, 10, weight_decay=0.1)

    def steps(weight, optimizer, numbers):
        history = []
        for i in numbers:
            optimizer.backward((weight - i).square().sum() * (1e36 if i == 3 and precision == "fp16" else 1))
            history.append((*optimizer.step(), optimizer.lr, weight.tolist(), optimizer.scaler.get_scale()))
        return history

    weight, optimizer = begin()
    whole_run = steps(weight, optimizer, range(10))
    weight, optimizer = begin()
    first = steps(weight, optimizer, range(5))
    save_checkpoint(tmp_path / "c.pt", state=snapshot({"weight": {"w": weight.detach()}, "optimizer": optimizer}))
    weight, optimizer = begin()
    state = {"weight": {"w": weight}, "optimizer": optimizer}
    restore(state, load_checkpoint(tmp_path / "c.pt", "cpu")["state"])
    assert repr(first + steps(weight, optimizer, range(5, 10))) == repr(whole_run)
    assert [moved for _, moved, *_ in whole_run].count(False) == (precision == "fp16")


def test_fingerprints_are_those_of_the_files(tmp_path, monkeypatch, tiny_policy, tiny_tokenizer):
    """SHA-256 of the data and of all that is read of a model, an adapter's base included; of what is not here, none."""
    monkeypatch.chdir(tmp_path)
    tiny_policy.config._name_or_path = "base"
    save_model(tiny_policy, tiny_tokenizer, tmp_path / "base")
    save_adapter(add_lora(tiny_policy, r=2, alpha=4), tmp_path / "run/model", tiny_tokenizer)
    for path in ("run/model/notes.txt", "base/other.safetensors"):  # which no loader reads
        Path(path).write_text("of no account")
    Path("base/vocab.json").mkdir()
    Path("p.jsonl").write_text('{"prompt": "a"}\n')
    flags = "--prompts p.jsonl --eval-prompts owner/name --policy run --reward-model rlhf_min.toy.gold_judge"
    options = parse_options(train_warp.WarpOptions, flags.split())
    found = fingerprints(options)
    assert found["p.jsonl"] == {"p.jsonl": hashlib.sha256(b'{"prompt": "a"}\n').hexdigest()}
    weights = Path("base/model.safetensors").read_bytes()
    assert found["base"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    shared = {"tokenizer.json", "tokenizer_config.json"}
    assert found["run"].keys() == {"adapter_config.json", "adapter_model.safetensors", *shared}
    assert found["base"].keys() == {"config.json", "generation_config.json", "model.safetensors", *shared}
    assert found.keys() == {"p.jsonl", "run", "base"}
    check_inputs("out", {"inputs": found}, found)
    Path("base/tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"base: tokenizer\.json: not what the run in out began with"):
        check_inputs("out", {"inputs": found}, fingerprints(options))
    Path("base/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"base: tokenizer\.json: not what the run in out began with"):
        check_inputs("out", {"inputs": found}, fingerprints(options))
    check_inputs("out", {"inputs": found | {"later": {"config.json": "0"}}}, found)  # that is not here at all
    begun = {"inputs": {"owner/name": {"config.json": "0"}}}
    check_inputs("out", begun, {"owner/name": {"config.json": "0", "generation_config.json": "1"}})  # downloaded since


def test_what_a_checkpoint_says_of_itself_is_read_without_torch(tmp_path):
    """read_about has it back, and no file that is cut off passes for a whole one."""
    about = {"title": "θ", "step": 7, "metrics_bytes": 2**40, "processes": 1, "finished": ["a"], "seconds": 0.5}
    save_checkpoint(tmp_path / "c.pt", about, parts=[{"w": torch.randn(30)}])
    assert {name: read_about(tmp_path / "c.pt")[name] for name in about} == about
    save_checkpoint(tmp_path / "other.pt", about | {"format": "another program"})
    with pytest.raises(UserError, match="it has another format"):
        read_about(tmp_path / "other.pt")
    whole_file = (tmp_path / "c.pt").read_bytes()
    for length in range(0, len(whole_file), 13):
        (tmp_path / "c.pt").write_bytes(whole_file[:length])
        with pytest.raises(UserError, match="is not a whole checkpoint"):
            read_about(tmp_path / "c.pt")


def test_what_a_checkpoint_says_of_itself_must_go_with_the_run(tmp_path):
    """check_state: None before the first checkpoint; then all fields as RunLog writes them, of this run, or refused."""
    run, state, metrics = {"id": "1f"}, tmp_path / "checkpoint" / "state.pt", tmp_path / "metrics.jsonl"
    about = {"run": "1f", "title": "θ", "step": 7, "metrics_bytes": 3, "processes": 1, "finished": ["a.pt"],
             "seconds": 2}  # fmt: skip
    assert check_state(tmp_path, run) is None
    save_checkpoint(state, about)
    save_checkpoint(state.with_name("a.pt"), {"run": "1f", "metrics_bytes": 3})
    metrics.write_bytes(b"{}\n{}")
    assert check_state(tmp_path, run | {"resumed": [{}]}).items() >= about.items()
    for wrong, fragment in (
        ({"processes": 2}, "one of 2 processes, not 1"),
        ({"finished": ["gone.pt"]}, "gone.pt is missing"),
        ({"finished": ["state.pt", 3]}, "3 is missing"),
        ({"finished": [["a.pt"]]}, "is missing"),
        ({"finished": ["../metrics.jsonl"]}, "is missing"),
        ({"metrics_bytes": -1}, "has lost lines"),
        ({"seconds": 10**400}, "it is not the state of a run"),
        ({"seconds": float("nan")}, "it is not the state of a run"),
        ({"metrics_bytes": 5}, None),
        ({"metrics_bytes": 6}, "has lost lines"),
        ({"metrics_bytes": 4}, "is not as the run left it"),
        ({"run": None}, "it is one of another run"),
        ({"run": "2f"}, "it is one of another run"),
        *(({name: odd}, "it is not the state of a run") for name in about if name != "run" for odd in (None, {}, b"")),
    ):
        save_checkpoint(state, {name: value for name, value in (about | wrong).items() if value != b""})  # left out
        with pytest.raises(UserError, match=fragment) if fragment else contextlib.nullcontext():
            check_state(tmp_path, run)
    state.unlink()
    with pytest.raises(UserError, match=r"state\.pt is missing"):  # the finished run's lines would be cut off
        check_state(tmp_path, run)
    save_checkpoint(state.with_name("a.pt"), {"run": "1f", "metrics_bytes": 0})
    assert check_state(tmp_path, run) is None  # an evaluation before the first step
    save_checkpoint(state.with_name("a.pt"), {"run": "2f"})
    with pytest.raises(UserError, match=r"a\.pt is not a whole checkpoint of this program \(it is one of another run"):
        check_state(tmp_path, run)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), OSError(errno.EIO, "I/O error")])
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_broken(tmp_path, error):
    """No memory, or a disk that fails: nobody is told to remove a file that may be whole."""
    save_checkpoint(tmp_path / "c.pt", value=1)
    with disturbed(checkpoint.torch, "load", 1, error=error), pytest.raises(type(error)):
        load_checkpoint(tmp_path / "c.pt")


class Trap:
    """Unpickled, it would make the folder `executed`."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_inside_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    """A file of the right format with a program in it is no checkpoint."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "c.pt", value=Trap())
    with pytest.raises(UserError, match="is not a whole checkpoint of this program"):
        load_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "c.pt", weights_only=False)
    assert (tmp_path / "executed").exists()  # it would have


# crashes


MOMENTS = [
    ("rm", runlog.RunLog, "step", 3), ("rm", checkpoint.torch, "save", 2), ("rm", train_rm, "save_model", 1),
    ("reinforce", runlog.RunLog, "step", 4), ("reinforce", train_reinforce, "judge_policy", 2),
    ("reinforce", runlog, "save_checkpoint", 3), ("warp", runlog.RunLog, "step", 2), ("warp", runlog.RunLog, "step", 5),
    ("warp", runlog, "save_checkpoint", 3), ("warp", train_warp, "save_policies", 1),
    ("warp", train_warp, "sweep_front", 1),
    ("lora-warp", runlog.RunLog, "step", 9), ("lora-warp", train_warp, "save_adapter", 2),
    ("pretrain", runlog.RunLog, "step", 3),
]  # fmt: skip


@pytest.mark.parametrize("case", MOMENTS, ids=lambda case: f"{case[0]}-{case[2]}-{case[3]}")
def test_a_crash_loses_nothing(in_world, left_alone, tmp_path, case):
    """Whatever the process was doing when it died, the resumed run ends as one that was left alone, to the byte."""
    name, owner, function, moment = case
    expected = left_alone(name)
    before = MOMENTS.index(case) % 2 == 0
    with disturbed(owner, function, moment, before=before), pytest.raises(Crash):
        run(name, tmp_path / "run")
    resume(name, tmp_path / "run")
    assert results(tmp_path / "run") == expected


def test_a_crash_before_the_first_checkpoint_begins_anew(in_world, left_alone, tmp_path):
    """The lines that were written before are not kept twice."""
    with disturbed(runlog.RunLog, "step", 2), pytest.raises(Crash):
        run("reinforce", tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").exists() and not (tmp_path / "run/checkpoint/state.pt").exists()
    resume("reinforce", tmp_path / "run")
    assert results(tmp_path / "run") == left_alone("reinforce")


def test_nothing_finished_is_done_twice(in_world, tmp_path, monkeypatch):
    """After three runs of WARP and a checkpoint in the fourth, resuming takes what is left of the fourth: one step."""
    with disturbed(runlog.RunLog, "step", 12), pytest.raises(Crash):
        run("warp", tmp_path / "run")
    steps = []
    step = Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda self: (steps.append(1), step(self))[1])
    resume("warp", tmp_path / "run")
    assert len(steps) == 1


class Child:
    """A process as tests/kills.py starts it, but forked from one that has imported the scripts and done nothing."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_reinforce", "train_warp"])

    def __init__(self, *args):
        self.process = self.context.Process(target=run_quietly, args=args)
        self.process.start()
        self.kill = self.process.kill

    def poll(self):
        return self.process.exitcode

    def wait(self):
        self.process.join()
        self.returncode = self.process.exitcode
        return self.returncode


@pytest.mark.processes
@pytest.mark.parametrize("name", ["rm", "reinforce", "warp"])
def test_kill_9(in_world, left_alone, tmp_path, name):
    """SIGKILL at random moments and while a file is being written; tests/kills.py does it 20 times."""
    module, flags = RUNS[name]
    argv = [*flags.split(), "--out", str(tmp_path / "run"), "--resume"]
    start = lambda: Child(str(in_world), module.__name__, argv)
    steps = len(left_alone(name)["metrics.jsonl"])
    kills, _ = survive(start, tmp_path / "run", 4, steps, begin_seconds=0.2, step_seconds=0.02, rng=random.Random(name))
    assert kills >= 3  # the last one may come when all is done
    assert results(tmp_path / "run") == left_alone(name)


def test_a_float16_step_that_overflows_is_resumed_like_any_other(in_world, tmp_path):
    """T55: a GradScaler skip moves the loss scale, and nothing else; a run that is interrupted behind it repeats."""
    for out in ("alone", "run"):
        with disturbed(runlog.RunLog, "step", 4 if out == "run" else 99), contextlib.suppress(Crash):
            run("reinforce", tmp_path / out, "--precision", "fp16", "--max-length", "24")
    resume("reinforce", tmp_path / "run", "--precision", "fp16", "--max-length", "24")
    assert results(tmp_path / "run") == results(tmp_path / "alone")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert None in [json.loads(line)["grad_norm"] for line in lines[:3]]  # JSON has no infinity


# signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(in_world, left_alone, tmp_path, capsys, monkeypatch, number):
    """The step in which it comes is finished and saved; the command that is printed goes on."""
    begun = []
    score = train_reinforce.policy_gradient_loss
    monkeypatch.setattr(train_reinforce, "policy_gradient_loss",
                        lambda *inputs: (begun.append(1), len(begun) == 3 and os.kill(os.getpid(), number),
                                         score(*inputs))[2])  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        run("reinforce", tmp_path / "run")
    assert stop.value.code == 130 and len(begun) == 3
    message = one_line(capsys)
    command = f"python train_reinforce.py --out {tmp_path / 'run'} --resume"
    assert "stopped after step 3 of 5" in message and message.endswith(f"to go on as it is: {command}")
    assert load_checkpoint(tmp_path / "run/checkpoint/state.pt")["step"] == 3
    monkeypatch.undo()
    monkeypatch.chdir(in_world)
    train_reinforce.main(command.split()[2:])
    assert results(tmp_path / "run") == left_alone("reinforce")


def test_a_signal_that_is_ignored_stays_ignored(in_world, left_alone, tmp_path, monkeypatch):
    """Under nohup, or in the background of a script, a Ctrl-C in the terminal is for others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    score = train_reinforce.policy_gradient_loss
    monkeypatch.setattr(train_reinforce, "policy_gradient_loss",
                        lambda *inputs: (os.kill(os.getpid(), signal.SIGINT), score(*inputs))[1])  # fmt: skip
    run("reinforce", tmp_path / "run")
    assert results(tmp_path / "run") == left_alone("reinforce")


def test_a_second_ctrl_c_stops_at_once(in_world, left_alone, tmp_path, capsys, monkeypatch):
    """Within the step, which is lost; what was saved before is not. Outside the loop the first one does."""

    def twice(*inputs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train_reinforce, "policy_gradient_loss", twice)
    with pytest.raises(SystemExit) as stop:
        run("reinforce", tmp_path / "run")
    assert stop.value.code == 130 and "stopped; to go on as it is: python" in one_line(capsys)
    monkeypatch.undo()
    monkeypatch.chdir(in_world)

    def once(*inputs):
        os.kill(os.getpid(), signal.SIGINT)
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_reinforce, "summarise", once)
        with pytest.raises(SystemExit):
            resume("reinforce", tmp_path / "run")
    resume("reinforce", tmp_path / "run")
    assert results(tmp_path / "run") == left_alone("reinforce")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# faults


@contextlib.contextmanager
def files_up_to(size):
    """No file can grow beyond `size` bytes: what a full disk is to a program, with another errno."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("moment, size", [(1, 20_000), (3, 20_000), (2, 500)], ids=["first", "third", "metrics"])
def test_a_full_disk(in_world, left_alone, tmp_path, capsys, monkeypatch, moment, size):
    """While a checkpoint or a line of metrics is written: one line; the checkpoint before it is whole and goes on."""
    step, calls = runlog.RunLog.step, []
    with contextlib.ExitStack() as stack:

        def limited(self, **metrics):
            calls.append(1)
            if len(calls) == moment:
                stack.enter_context(files_up_to(size))
            step(self, **metrics)

        monkeypatch.setattr(runlog.RunLog, "step", limited)
        message = refused(capsys, "reinforce", tmp_path / "run")
    assert "File too large" in message and message.endswith("--resume")
    checkpoints = tmp_path / "run/checkpoint"
    assert not list(checkpoints.glob("*.new"))
    if (checkpoints / "state.pt").exists():
        load_checkpoint(checkpoints / "state.pt", "cpu")
    monkeypatch.undo()
    monkeypatch.chdir(in_world)
    resume("reinforce", tmp_path / "run")
    assert results(tmp_path / "run") == left_alone("reinforce")


def test_a_full_disk_at_the_end(in_world, left_alone, tmp_path, capsys):
    """The model cannot be written, in safetensors' own words; the trained weights are in the checkpoint."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with disturbed(train_warp, "save_policies", 1, error=full):
        assert "No space left on device" in refused(capsys, "warp", tmp_path / "run")
    resume("warp", tmp_path / "run")
    assert results(tmp_path / "run") == left_alone("warp")


def test_safetensors_on_a_full_disk(tmp_path, tiny_policy, tiny_tokenizer):
    """What safetensors raises there has no errno, and is a sentence all the same; the old model stays."""
    from rlhf_min.errors import explain
    from rlhf_min.models import load_policy, save_model

    save_model(tiny_policy, tiny_tokenizer, tmp_path / "model")
    with files_up_to(10_000), pytest.raises(Exception) as caught:
        save_model(tiny_policy, tiny_tokenizer, tmp_path / "model")
    assert "File too large" in str(explain(caught.value))
    load_policy(str(tmp_path / "model"), "cpu", 32)


def test_a_folder_that_cannot_be_written(in_world, tmp_path, capsys, monkeypatch):
    """A read-only folder or disk is named before any training."""
    for kind in (errno.EROFS, errno.EACCES):
        denied = OSError(kind, os.strerror(kind), "there")
        with disturbed(Path, "mkdir", 1, error=denied), disturbed(train_warp, "train_policy", 1):
            assert os.strerror(kind) in refused(capsys, "warp", tmp_path / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(in_world, tmp_path, capsys):
    """The same with a real folder."""
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "Permission denied" in refused(capsys, "warp", tmp_path / "closed/run")


FAULTS = {
    "a loss that is NaN": ("policy_gradient_loss", "the loss is nan"),
    "no memory on the device": ("token_logprobs", "out of memory: lower --batch-size or --max-length"),
    "no memory": ("sample", "out of memory: lower --batch-size or --max-length"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_middle(in_world, left_alone, tmp_path, capsys, fault):
    """One line with the remedy, the last checkpoint intact; when the cause is gone the run goes on from there."""
    function, fragment = FAULTS[fault]
    with pytest.MonkeyPatch.context() as patch:
        if fault == "a loss that is NaN":
            loss, calls = train_reinforce.policy_gradient_loss, []
            patch.setattr(train_reinforce, function, lambda logprobs, *others: (
                calls.append(1), loss(logprobs * (float("nan") if len(calls) == 4 else 1), *others))[1])  # fmt: skip
        else:
            error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore.")
            error = error if "device" in fault else RuntimeError("DefaultCPUAllocator: can't allocate memory: you ...")
            crash_at(patch, train_reinforce, function, 6 if function == "token_logprobs" else 4, error=error)
        message = refused(capsys, "reinforce", tmp_path / "run")
    assert fragment in message and message.endswith(f"python train_reinforce.py --out {tmp_path / 'run'} --resume")
    assert load_checkpoint(tmp_path / "run/checkpoint/state.pt", "cpu")["step"] == 2
    resume("reinforce", tmp_path / "run")
    assert results(tmp_path / "run") == left_alone("reinforce")


def test_a_reward_function_that_fails(in_world, tmp_path, capsys, monkeypatch):
    """Its error is said with its place, and when it is mended the run goes on; one that draws at random repeats."""
    source = "import random\ncalls = []\ndef f(prompts, completions, **columns):\n    calls.append(1)\n"
    values = "    return [random.random() + len(c) for c in completions]\n"
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = ["--reward-model", "rewards.f", "--seed", "5"]

    def load(text):
        (tmp_path / "rewards.py").write_text(source + text)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        monkeypatch.delitem(__import__("sys").modules, "rewards", raising=False)

    load(values)
    random.seed(0)
    run("reinforce", tmp_path / "alone", *flags)
    for fault, fragment in (
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("return [float('nan')] * 4", "returned nan"),
    ):
        load(f"    if len(calls) == 5: {fault}\n" + values)
        random.seed(0)
        message = refused(capsys, "reinforce", tmp_path / fragment[:5], *flags)
        assert fragment in message and message.endswith("--resume")
        load(values)
        random.seed(1)
        resume("reinforce", tmp_path / fragment[:5], *flags)
        assert results(tmp_path / fragment[:5]) == results(tmp_path / "alone")


def test_random_rewards_repeat_before_the_first_checkpoint(in_world, tmp_path, monkeypatch):
    """The evaluation before training is not done again; nor are the numbers drawn again that its reward drew."""
    text = "import random\ndef f(prompts, completions, **columns):\n    return [random.random() for _ in completions]\n"
    (tmp_path / "dice.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, moment in (("reinforce", 1), ("warp", 4)):
        for out in ("alone", "run"):
            random.seed(0)
            with disturbed(runlog.RunLog, "step", moment if out == "run" else 99), contextlib.suppress(Crash):
                run(name, tmp_path / name / out, "--reward-model", "dice.f")
        random.seed(1)
        resume(name, tmp_path / name / "run", "--reward-model", "dice.f")
        assert results(tmp_path / name / "run") == results(tmp_path / name / "alone")


# what --resume refuses


@pytest.fixture
def interrupted(in_world, tmp_path):
    """A run of REINFORCE that stopped after step 3, with a checkpoint of step 2."""
    with disturbed(runlog.RunLog, "step", 4), pytest.raises(Crash):
        run("reinforce", tmp_path / "run")
    return tmp_path / "run"


def test_only_what_does_not_change_the_result_may_differ(interrupted, left_alone, capsys):
    """The line names every option that differs, with both values; without options those of the run hold."""
    message = refused(
        capsys, "reinforce", interrupted, "--resume", "--lr", "3e-4", "--seed", "1", "--prompts", "p.jsonl"
    )
    for part in (
        "--lr is 0.001 there, not 0.0003",
        "--seed is 42 there, not 1",
        "--prompts is 'runs/toy/prompts.jsonl'",
    ):
        assert part in message
    train_reinforce.main(["--out", str(interrupted), "--resume", "--save-every", "1", "--device", "auto"])
    assert results(interrupted) == left_alone("reinforce")


def test_a_config_file_is_compared_too(interrupted, capsys):
    """An option of the --config file that differs is named like a flag."""
    (interrupted.parent / "c.yaml").write_text("beta: 0.5\n")
    message = refused(capsys, "reinforce", interrupted, "--resume", "--config", str(interrupted.parent / "c.yaml"))
    assert "--beta is 0.05 there, not 0.5" in message


def test_other_data_under_the_same_name(interrupted, in_world, capsys):
    """A file or a model that changed since then is named, and nothing is overwritten."""
    prompts, before = in_world / "runs/toy/prompts.jsonl", results(interrupted)
    text = prompts.read_text()
    try:
        prompts.write_text("".join(text.splitlines(keepends=True)[1:]))
        assert "prompts.jsonl: not what the run" in refused(capsys, "reinforce", interrupted, "--resume")
    finally:
        prompts.write_text(text)
    assert results(interrupted) == before


@pytest.mark.parametrize("size", [0, -1000])
def test_a_truncated_checkpoint_is_named(interrupted, left_alone, capsys, size):
    """Nothing is lost by trying; without the folder of checkpoints the run begins anew."""
    state = interrupted / "checkpoint/state.pt"
    state.write_bytes(state.read_bytes()[:size])
    before = results(interrupted)
    message = refused(capsys, "reinforce", interrupted, "--resume")
    assert f"{state} is not a whole checkpoint" in message and f"remove the folder {state.parent}" in message
    assert results(interrupted) == before
    shutil.rmtree(state.parent)
    resume("reinforce", interrupted)
    assert results(interrupted) == left_alone("reinforce")


def test_lost_lines_and_lost_runs_are_noticed(in_world, tmp_path, capsys):
    """metrics.jsonl cut short, or a finished run of WARP removed: named, before anything is done twice."""
    with disturbed(runlog.RunLog, "step", 6), pytest.raises(Crash):
        run("warp", tmp_path / "run")
    finished, metrics = tmp_path / "run/checkpoint/iteration-1-run-1.pt", tmp_path / "run/metrics.jsonl"
    finished.rename(tmp_path / "aside")
    assert f"{finished} is missing" in refused(capsys, "warp", tmp_path / "run", "--resume")
    (tmp_path / "aside").rename(finished)
    os.truncate(metrics, 100)
    assert "metrics.jsonl has lost lines" in refused(capsys, "warp", tmp_path / "run", "--resume")


def test_two_processes_do_not_write_one_run(interrupted, left_alone, capsys):
    """A second --resume while the first is at work is refused, and leaves it alone."""
    seen, step = [], runlog.RunLog.step

    def second(self, **metrics):
        seen.append(refused(capsys, "reinforce", interrupted, "--resume"))
        step(self, **metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runlog.RunLog, "step", second)
        resume("reinforce", interrupted)
    assert len(seen) == 3 and all("belongs to a run that is going on" in line for line in seen)
    assert results(interrupted) == left_alone("reinforce")


def test_two_runs_begun_at_once_get_folders_of_their_own(tmp_path, monkeypatch):
    """The free name is taken when the run begins, not minutes before; without --resume no other run is gone on with."""
    monkeypatch.chdir(tmp_path)
    options = train_rm.parse_options(train_rm.RewardModelOptions, [])
    first, second = runlog.RunLog(options), runlog.RunLog(options)
    with first.running():
        pass
    with second.running():
        assert (str(first.folder), str(second.folder)) == ("runs/rm-1", "runs/rm-2")
    third = runlog.RunLog(options)
    monkeypatch.setattr(options, "folder", lambda: first.folder)  # another process was faster by a moment
    with pytest.raises(UserError, match="runs/rm-1 was taken by another run"), third.running():
        pass


def test_a_resumed_run_says_where_it_was_resumed(interrupted, monkeypatch, capsys):
    """run.json keeps what the run began with, and adds commit, versions, threads and device of every resumption."""
    begun = json.loads((interrupted / "run.json").read_text())
    monkeypatch.setattr(runlog, "git_commit", lambda: "another")
    resume("reinforce", interrupted)
    run = json.loads((interrupted / "run.json").read_text())
    assert [machine["commit"] for machine in run.pop("resumed")] == ["another"] and run == begun
    assert "note: commit, versions, threads or device are not those" in capsys.readouterr().err


def test_a_refused_reward_model_is_not_finished_by_asking_again(in_world, tmp_path, capsys):
    """`train_rm.py --resume && train_reinforce.py` must not go on without a model."""
    resume("rm", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    assert "has finished without a model" in refused(capsys, "rm", tmp_path / "run", "--resume")


def test_resume_begins_where_there_is_nothing_and_leaves_what_is_finished(in_world, left_alone, tmp_path, capsys):
    """So one command in a loop brings a run to its end; other folders are refused."""
    resume("rm", tmp_path / "new")
    (tmp_path / "new/checkpoint").mkdir()  # killed between the summary and the end
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "new").rglob("*") if path.name != "checkpoint"}
    with pytest.raises(SystemExit) as stop:
        resume("rm", tmp_path / "new")
    assert stop.value.code == 0 and "has finished: nothing to resume" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "new").rglob("*")} == before
    assert results(tmp_path / "new") == left_alone("rm")
    assert "is not that of a run of train_warp.py" in refused(capsys, "warp", tmp_path / "new", "--resume")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("precious")
    assert "holds another run or other files" in refused(capsys, "rm", tmp_path / "other", "--resume")


def test_the_clock_goes_on(in_world, tmp_path, monkeypatch):
    """wall_seconds of a resumed run counts the time up to its last checkpoint; at the end no checkpoint is left."""
    with disturbed(runlog.RunLog, "step", 4), pytest.raises(Crash):
        run("reinforce", tmp_path / "run")
    path = tmp_path / "run/checkpoint/state.pt"
    parts = load_checkpoint(path, "cpu")["parts"]
    save_checkpoint(path, read_about(path) | {"seconds": 1000.0}, parts=parts)
    resume("reinforce", tmp_path / "run")
    assert 1000 < json.loads((tmp_path / "run/summary.json").read_text())["wall_seconds"] < 1100
    assert not path.parent.exists()


def test_no_checkpoints_on_request(in_world, left_alone, tmp_path):
    """--save-every 0 writes none, and gives the same result."""
    saved = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runlog, "save_checkpoint", lambda *args, **values: saved.append(args))
        run("reinforce", tmp_path / "run", "--save-every", "0")
    assert saved == [] and results(tmp_path / "run") == left_alone("reinforce")
