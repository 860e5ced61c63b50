"""Several processes, as torchrun starts them, against one: the same weights, the same gradients, one run's files."""

import importlib
import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch

import rlhf_min.pretrain
import train_reinforce
import train_warp
from rlhf_min import parallel
from rlhf_min.errors import UserError
from rlhf_min.parallel import ALONE, Team
from tests.kills import results

SAMPLING = "--batch-size 8 --num-eval-prompts 4 --max-length 16 --lr 1e-3 --save-every 2"
GRADIENTS = []


def record(function):
    """clip_grad_norm_ that keeps what it is given, which is what a step goes by."""

    def recording(parameters, *args, **kwargs):
        parameters = list(parameters)
        GRADIENTS.append(torch.cat([p.grad.flatten() for p in parameters]).clone())
        return function(parameters, *args, **kwargs)

    return recording


def process(folder, number, count, port, script, argv, log, dies_at):
    """One of `count` processes of a job: what torchrun sets, then the script."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count),
                   "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    os.chdir(folder)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{number}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    torch.set_num_threads(1)
    from rlhf_min import plots
    from rlhf_min.runlog import RunLog

    plots._pyplot = lambda: None
    torch.nn.utils.clip_grad_norm_ = record(torch.nn.utils.clip_grad_norm_)
    if dies_at and number == count - 1:
        step, calls = RunLog.step, []
        RunLog.step = lambda *args, **kwargs: os._exit(9) if len(calls) == dies_at - 1 else (
            calls.append(1), step(*args, **kwargs))  # fmt: skip
    try:
        importlib.import_module(script).main(argv)
    finally:
        torch.save(GRADIENTS, f"{log}.{number}.gradients")


def job(tmp_path, count, script, flags, out, dies_at=0):
    """Run a script in `count` processes; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_reinforce", "train_warp"])
    argv, log = [*flags.split(), "--out", str(tmp_path / out)], str(tmp_path / out) + ".log"
    processes = [context.Process(target=process, args=(os.getcwd(), i, count, port, script, argv, log, dies_at))
                 for i in range(count)]  # fmt: skip
    for child in processes:
        child.start()
    for child in processes:
        child.join(100)
    return [child.exitcode for child in processes]


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return sorted(rows, key=lambda row: (row.get("iteration", 0), row.get("run", 0), row["step"]))


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


@pytest.mark.processes
@pytest.mark.parametrize(("runs", "flags"), [(2, "--lora-r 2"), (3, "")])
def test_runs_of_warp_side_by_side(in_world, tmp_path, runs, flags):
    """Each run on one process: merged weights, front and metrics are those of one process, to the bit."""
    flags = f"{SAMPLING} --steps 3 --iterations {4 - runs} --runs {runs} {flags}"
    train_warp.main([*flags.split(), "--out", str(tmp_path / "one")])
    assert job(tmp_path, 2, "train_warp", flags, "two") == [0, 0]
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    one["metrics.jsonl"].sort(key=lambda row: (row["iteration"], row["run"], row["step"]))
    two["metrics.jsonl"].sort(key=lambda row: (row["iteration"], row["run"], row["step"]))
    assert one == two
    assert not (tmp_path / "two/checkpoint").exists()


@pytest.mark.processes
@pytest.mark.parametrize("script", ["train_reinforce", "train_rm", "train_warp"])
def test_gradients_of_a_shared_batch(in_world, tmp_path, script):
    """Two processes with half a batch each take the steps of one with all of it: the same gradients to 1e-6."""
    flags = {
        "train_reinforce": f"{SAMPLING} --steps 3 --num-generations 2 --baseline leave-one-out",
        "train_rm": "--batch-size 16 --epochs 1 --accept-weak --max-length 64 --eval-every 4",
        "train_warp": f"{SAMPLING} --steps 3 --iterations 1 --runs 1",  # one process more than runs
    }[script]
    assert job(tmp_path, 1, script, flags, "one") == [0]
    assert job(tmp_path, 2, script, flags, "two") == [0, 0]
    one, first, second = (torch.load(tmp_path / f"{log}.gradients") for log in ("one.log.0", "two.log.0", "two.log.1"))
    assert len(one) == len(first) == len(second) >= 3
    torch.testing.assert_close(first[0], one[0], atol=1e-6, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    clock = "step_seconds", "grad_norm"
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two")):
        assert without(a, *clock) == pytest.approx(without(b, *clock), abs=2e-3)


@pytest.mark.processes
def test_a_process_that_dies(in_world, tmp_path, capsys):
    """The others end with a sentence that names the command, and as many as before go on to the end of the run."""
    flags = f"{SAMPLING} --steps 5 --iterations 1"
    assert job(tmp_path, 2, "train_warp", flags, "alone") == [0, 0]
    assert job(tmp_path, 2, "train_warp", flags, "run", dies_at=4) == [2, 9]
    error = Path(f"{tmp_path}/run.log.0.err").read_text().splitlines()[-1]
    assert error.startswith("error: process 0: another process of this job has stopped")
    assert error.endswith(f"torchrun --nproc-per-node 2 train_warp.py --out {tmp_path}/run --resume")
    with pytest.raises(SystemExit, match="2"):
        train_warp.main([*flags.split(), "--out", str(tmp_path / "run"), "--resume"])
    assert "is one of 2 processes, not 1; start as many" in capsys.readouterr().err
    assert job(tmp_path, 2, "train_warp", f"{flags} --resume", "run") == [0, 0]
    assert "resumed: iteration 1/1 run 1/2, after step 2" in Path(f"{tmp_path}/run.log.0.out").read_text()
    assert results(tmp_path / "run") == results(tmp_path / "alone")


@pytest.mark.processes
@pytest.mark.parametrize(("script", "message"), [(rlhf_min.pretrain, "start it without torchrun"),
                                                 (train_reinforce, "must be a multiple of")])  # fmt: skip
def test_what_cannot_be_shared(in_world, tmp_path, monkeypatch, capsys, script, message):
    """A script for one process, and a batch that does not come out even, are refused."""
    if script is rlhf_min.pretrain:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(SystemExit, match="2"):
            script.main(["--out", str(tmp_path / "run")])
        assert message in capsys.readouterr().err
        return
    assert job(tmp_path, 2, "train_reinforce", f"{SAMPLING} --batch-size 7", "run") == [2, 2]
    assert message in Path(f"{tmp_path}/run.log.0.err").read_text()


def test_shares_of_a_team(monkeypatch):
    """Parts are in order and disjoint, whoever is in the team; who is alone has all."""
    team = Team()
    team.size, rows = 3, list(range(6))
    shares = []
    for team.index in range(3):
        shares.append(team.share(rows))
    assert shares == [[0, 1], [2, 3], [4, 5]]
    assert ALONE.share(rows) == rows
    with pytest.raises(UserError, match="multiple of the 3 processes that share it times 4 answers"):
        team.check(9, k=4)
    team.check(12, k=4)


def test_processes_dealt_to_runs(monkeypatch):
    """Five processes and two runs: 0, 2, 4 share the first, 1 and 3 the second; every process makes both groups."""
    made = []
    monkeypatch.setattr(parallel.dist, "new_group", lambda ranks, timeout: made.append(ranks))
    for number, (run, index, size) in enumerate([(0, 0, 3), (1, 0, 2), (0, 1, 3), (1, 1, 2), (0, 2, 3)]):
        monkeypatch.setenv("WORLD_SIZE", "5")
        monkeypatch.setenv("RANK", str(number))
        team = parallel.team_of_run(2)
        assert (team.number, team.count, team.index, team.size) == (run, 2, index, size)
    assert made == [[0, 2, 4], [1, 3]] * 5


def test_mean_of_gradients(monkeypatch):
    """The sum over the team, divided by its size, in each parameter's place; what has no gradient is left out."""
    weights = [
        torch.nn.Parameter(torch.zeros(2, 3)),
        torch.nn.Parameter(torch.zeros(1)),
        torch.nn.Parameter(torch.zeros(2)),
    ]
    weights[0].grad, weights[2].grad = torch.arange(6.0).view(2, 3), torch.tensor([6.0, 8.0])
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda flat, group: flat.mul_(4))  # two others with 1 and 2 of it
    team = Team()
    team.size = 2
    team.mean_gradients(weights)
    assert weights[0].grad.tolist() == [[0, 2, 4], [6, 8, 10]]
    assert weights[1].grad is None
    assert weights[2].grad.tolist() == [12, 16]
