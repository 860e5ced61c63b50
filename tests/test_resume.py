"""A run survives: interrupted anywhere, by anything, and resumed, it ends with the bytes of one that was left alone."""

import contextlib
import functools
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
from types import SimpleNamespace

import pytest
import torch

import train_reinforce
import train_rm
import train_warp
from rlhf_min import pretrain
from rlhf_min.support import runlog
from rlhf_min.support.batches import Batches
from rlhf_min.support.errors import explain
from rlhf_min.support.files import whole
from rlhf_min.support.models import load_plain_model, save_model
from rlhf_min.support.precision import Optimizer
from rlhf_min.support.runlog import RandomState, RunLog, load_checkpoint, restore, save_checkpoint, snapshot
from tests.kills import results, run_script, survive

SAMPLING = "--batch-size 4 --num-eval-prompts 4 --max-length 13 --lr 1e-3 --save-every 2"
RM = "--epochs 3 --batch-size 40 --lora-r 2 --lora-dropout 0.1 --save-every 2 --eval-every 3 --accept-weak"
RUNS = {
    "rm": (train_rm, RM),
    "reinforce": (train_reinforce, f"{SAMPLING} --steps 5 --eval-every 1 --keep best --beta 100"),
    "fp16": (train_reinforce, f"{SAMPLING} --steps 5 --precision fp16 --max-length 24"),
    "warp": (train_warp, f"{SAMPLING} --steps 3 --runs 1"),
    "lora-warp": (train_warp, f"{SAMPLING} --steps 3 --iterations 1 --lora-r 2 --keep-runs"),
    "pretrain": (pretrain, "--epochs 1 --batch-size 64 --save-every 2 --width 32"),
}


class Crash(BaseException):
    """What nothing catches: as far as the run can tell, the process is gone."""


def run(name, out, *flags):
    module, own = RUNS[name]
    module.main([*own.split(), *flags, "--out", str(out)])


@pytest.fixture(scope="module")
def left_alone(world):
    """The results of a run by its name, undisturbed."""

    @functools.cache
    def make(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(world)
            run(name, f"runs/alone-{name}")
        return results(world / f"runs/alone-{name}")

    return make


@pytest.fixture(autouse=True)
def _terminal():
    """Ctrl-C as in a terminal, also where the tests run in the background and SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def disturbed(owner, name, moment, then, before=True):
    """Let `then` happen at the `moment`-th call of a function, before or after it does its work."""
    function, calls = getattr(owner, name), []

    def disturbing(*args, **kwargs):
        calls.append(1)
        if len(calls) == moment and before:
            then()
        value = function(*args, **kwargs)
        if len(calls) == moment and not before:
            then()
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, disturbing)
        yield calls


def fail(error):
    """A function that raises this error."""

    def failing():
        raise error

    return failing


def ends(capsys, code, name, out, *flags):
    """Run to the exit code `code`; returns the last line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(name, out, *flags)
    assert stop.value.code == code
    return capsys.readouterr().err.splitlines()[-1]


def check_resumed(name, out, left_alone):
    """The resumed run ends with the bytes of one that was left alone."""
    run(name, out, "--resume")
    assert results(out) == left_alone(name)


def load_state(out):
    return load_checkpoint(out / "checkpoint/state-0.pt")


def test_files_and_folders_are_replaced_when_they_are_complete(tmp_path):
    """Until the new content is whole the old one stays, and what an earlier kill left half-written is no obstacle."""
    file, folder = tmp_path / "deep/file", tmp_path / "deep/model"
    (tmp_path / "deep/.file.new").mkdir(parents=True)
    for name in ("first", "second"):
        with whole(file) as new_file, whole(folder) as new_folder:
            new_file.write_text(name)
            new_folder.mkdir()
            (new_folder / name).touch()
    with pytest.raises(Crash), whole(file) as new_file, whole(folder) as new_folder:
        new_file.write_text("half")
        new_folder.mkdir()
        raise Crash
    assert file.read_text() == "second" and [path.name for path in folder.iterdir()] == ["second"]
    assert {*file.parent.iterdir()} == {file, folder}


def test_a_checkpoint_is_restored_in_place(tmp_path):
    """Tensors keep their identity, dictionaries get their numbers back, and objects and generators go on."""
    weights, numbers = {"w": torch.ones(2)}, {"total": 3.5, "count": 2}
    stream = Batches([1, 2, 3], 2, torch.Generator().manual_seed(1))
    next(stream)
    state = {"weights": weights, "numbers": numbers, "stream": stream, "kept": {}, "random": RandomState()}
    save_checkpoint(tmp_path / "c.pt", state=snapshot(state))
    draw = lambda: [next(stream) for _ in range(4)] + torch.rand(3).tolist()
    expected, tensor = draw(), weights["w"]
    tensor.zero_()
    numbers.update(total=0.0, count=0)
    restore(state, load_checkpoint(tmp_path / "c.pt")["state"])
    assert weights["w"] is tensor and tensor.tolist() == [1.0, 1.0]
    assert numbers == {"total": 3.5, "count": 2} and draw() == expected


class Trap:
    """Unpickled, it would make the folder `executed`."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_inside_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    """A file with a program in it is no checkpoint."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "c.pt", value=Trap())
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "c.pt", weights_only=False)
    assert (tmp_path / "executed").exists()  # it would have


MOMENTS = [  # run, function, which call of it, before or after its work, steps that the checkpoint has by then
    ("rm", RunLog, "step", 3, "before", 2),
    ("rm", torch, "save", 2, "after", 2),
    ("reinforce", runlog, "lock", 1, "before", 0),
    ("reinforce", RunLog, "step", 2, "after", 0),
    ("reinforce", runlog, "save_checkpoint", 2, "before", 2),
    ("reinforce", train_reinforce, "sweep_front", 1, "after", 5),
    ("fp16", RunLog, "step", 4, "after", 2),
    ("warp", RunLog, "step", 5, "before", 3),
    ("warp", runlog, "save_checkpoint", 6, "after", 6),  # a run of 3 steps saves after step 2, after step 3, and itself
    ("lora-warp", RunLog, "step", 6, "before", 5),
    ("lora-warp", train_warp, "save_adapter", 2, "after", 6),
    ("pretrain", RunLog, "step", 3, "before", 2),
]


@pytest.mark.parametrize("case", MOMENTS, ids=lambda case: f"{case[0]}-{case[2]}-{case[3]}")
def test_a_crash_loses_nothing(in_world, left_alone, tmp_path, case):
    """Whenever a process dies, the resumed run ends as one that was left alone, and repeats no step that was saved."""
    name, owner, function, moment, when, saved = case
    with disturbed(owner, function, moment, fail(Crash), before=when == "before"), pytest.raises(Crash):
        run(name, tmp_path / "run")
    metrics = left_alone(name)["metrics.jsonl"]
    with disturbed(Optimizer, "step", 0, None) as steps:
        check_resumed(name, tmp_path / "run", left_alone)
    assert len(steps) == len(metrics) - saved
    overflows = [row["grad_norm"] for row in metrics[:3]].count(None)  # JSON has no infinity
    assert (overflows > 0) == (name == "fp16")


def child(*args):
    """A process as tests/kills.py starts it, but forked from this one, which has imported torch already."""
    process = multiprocessing.get_context("fork").Process(target=run_script, args=args)
    process.start()
    wait = lambda: process.join() or process.exitcode
    return SimpleNamespace(poll=lambda: process.exitcode, wait=wait, kill=process.kill)


def test_kill_9(in_world, left_alone, tmp_path):
    """SIGKILL at random moments and while a file is being written does no harm; tests/kills.py kills 20 times."""
    argv = [*RUNS["warp"][1].split(), "--out", str(tmp_path / "run"), "--resume"]
    start = lambda: child(str(in_world), "train_warp", argv)
    kills, _ = survive(start, tmp_path / "run", 2, 6, begin_seconds=0.2, step_seconds=0.02, rng=random.Random(0))
    assert kills >= 1  # the last one may come when all is done
    assert results(tmp_path / "run") == left_alone("warp")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(in_world, left_alone, tmp_path, capsys, number):
    """The step in which it comes is finished and saved; the command that is printed goes on."""
    out = tmp_path / "run"
    interrupt = lambda: os.kill(os.getpid(), number)
    with disturbed(train_reinforce, "token_logprobs", 5, interrupt) as calls:  # two a step: policy and reference
        message = ends(capsys, 130, "reinforce", out)
    command = f"train_reinforce.py --out {out} --resume"
    assert message == f"stopped after step 3 of 5, REINFORCE; to go on: python {command}" and len(calls) == 6
    assert load_state(out)["step"] == 3
    train_reinforce.main(command.split()[1:])
    assert results(out) == left_alone("reinforce")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_stops_at_once(in_world, left_alone, tmp_path, capsys):
    """The step is lost, but not what was saved before; a Ctrl-C outside of the loop stops at once, too."""
    interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)
    twice = lambda: (interrupt(), interrupt())
    for owner, name, then in ((RunLog, "step", twice), (train_reinforce, "sweep_front", interrupt)):
        with disturbed(owner, name, 1, then):
            message = ends(capsys, 130, "reinforce", tmp_path / "run", "--resume")
        assert message.startswith("stopped; to go on: python train_reinforce.py")
    check_resumed("reinforce", tmp_path / "run", left_alone)


def test_a_signal_that_is_ignored_stays_ignored(in_world, left_alone, tmp_path):
    """Under nohup, or in the background of a shell's script, a Ctrl-C in the terminal is for others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with disturbed(RunLog, "step", 3, lambda: os.kill(os.getpid(), signal.SIGINT)):
        run("reinforce", tmp_path / "run")
    assert results(tmp_path / "run") == left_alone("reinforce")


@contextlib.contextmanager
def files_up_to(size):
    """No file can grow beyond `size` bytes, which is what a full disk does to a program."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("moment, size", [(1, 20_000), (3, 20_000), (2, 500)], ids=["first", "third", "metrics"])
def test_a_full_disk(in_world, left_alone, tmp_path, capsys, moment, size):
    """It ends a run with one line while a checkpoint or metrics are written, and the checkpoint before is whole."""
    with files_up_to(size) as limit, disturbed(RunLog, "step", moment, limit):
        message = ends(capsys, 2, "reinforce", tmp_path / "run")
    assert "File too large" in message and message.endswith("--resume")
    assert not list(tmp_path.glob("run/checkpoint/*.new"))
    assert (load_state(tmp_path / "run") or {"step": 0})["step"] == moment // 3 * 2
    check_resumed("reinforce", tmp_path / "run", left_alone)


def test_a_model_on_a_full_disk(tmp_path, tiny_policy, tiny_tokenizer):
    """Safetensors' error is explained in one line, and the old model stays."""
    save_model(tiny_policy, tiny_tokenizer, tmp_path / "model")
    with files_up_to(10_000) as limit, pytest.raises(Exception) as caught:
        limit()
        save_model(tiny_policy, tiny_tokenizer, tmp_path / "model")
    assert "File too large" in str(explain(caught.value))
    load_plain_model(type(tiny_policy), str(tmp_path / "model"))


def test_resume_begins_where_there_is_nothing_and_leaves_what_is_finished(in_world, left_alone, tmp_path, capsys):
    """So one command in a loop brings a run to its end; a folder with other files is refused."""
    out = tmp_path / "new"
    check_resumed("rm", out, left_alone)
    (out / "checkpoint").mkdir()  # killed between the summary and the end
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "checkpoint"}
    with pytest.raises(SystemExit, match="0"):
        run("rm", out, "--resume")
    assert "has finished: nothing to resume" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("precious")
    assert "holds another run or other files" in ends(capsys, 2, "rm", tmp_path / "other", "--resume")


def test_two_processes_do_not_write_one_run(in_world, left_alone, tmp_path, capsys):
    """While a run is written, a second one that would go on with it is refused, and the first one ends unharmed."""
    out, said = tmp_path / "run", []
    second = lambda: said.append(ends(capsys, 2, "reinforce", out, "--resume"))
    with disturbed(RunLog, "step", 4, second):
        run("reinforce", out)
    assert "metrics.jsonl: another process is writing this run" in said[0]
    assert results(out) == left_alone("reinforce")


def test_the_clock_goes_on_and_run_json_keeps_the_beginning(in_world, tmp_path):
    """The seconds up to the last checkpoint count in wall_seconds, and run.json lists where it was resumed."""
    out = tmp_path / "run"
    with disturbed(RunLog, "step", 4, fail(Crash)), pytest.raises(Crash):
        run("reinforce", out)
    begun = json.loads((out / "run.json").read_text())
    save_checkpoint(out / "checkpoint/state-0.pt", **(load_state(out) | {"seconds": 1000.0}))
    with disturbed(runlog, "git_commit", 1, lambda: None):
        run("reinforce", out, "--resume")
    assert 1000 < json.loads((out / "summary.json").read_text())["wall_seconds"] < 1100
    assert not (out / "checkpoint").exists()
    ended = json.loads((out / "run.json").read_text())
    assert len(ended.pop("resumed")) == 1 and ended == begun
