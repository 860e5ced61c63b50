"""Several processes, as torchrun starts them, against one: the same weights, the same gradients, one run's files."""

import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch

import train_warp
from rlhf_min import pretrain
from rlhf_min.support import parallel, runlog
from tests.kills import results, run_script

SAMPLING = "--batch-size 8 --num-eval-prompts 4 --max-length 16 --lr 1e-3 --save-every 2"
SIDE_BY_SIDE = f"{SAMPLING} --steps 3 --runs 3 --lora-r 2 --keep-runs"
GRADIENTS = []


def record(function):
    """clip_grad_norm_ that keeps the gradients it is given, which a step follows."""

    def recording(parameters, *args, **kwargs):
        GRADIENTS.append(torch.cat([p.grad.flatten() for p in parameters]).clone())
        return function(parameters, *args, **kwargs)

    return recording


def dying(function, call):
    """The function, at whose `call`-th call the process ends."""
    calls = iter(range(1, call))
    return lambda *args, **kwargs: function(*args, **kwargs) if next(calls, None) else os._exit(9)


def process(folder, number, count, port, script, argv, log, death):
    """One of `count` processes of a job: what torchrun sets, then the script."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    torch.nn.utils.clip_grad_norm_ = record(torch.nn.utils.clip_grad_norm_)
    if death and number == death[0]:
        owner = runlog.RunLog if death[1] == "step" else runlog
        setattr(owner, death[1], dying(getattr(owner, death[1]), death[2]))
    try:
        run_script(folder, script, argv, f"{log}.{number}.out")
    finally:
        torch.save(GRADIENTS, f"{log}.{number}.gradients")


def job(out, count, script, flags, death=None):
    """Run a script in `count` processes, of which `death` = (number, function, call) dies; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # torch is imported already
    argv = [*flags.split(), "--out", str(out)]
    processes = [context.Process(target=process, args=(os.getcwd(), i, count, port, script, argv, f"{out}.log", death))
                 for i in range(count)]  # fmt: skip
    for child in processes:
        child.start()
    for child in processes:
        child.join(100)
    return [child.exitcode for child in processes]


@pytest.fixture(scope="module")
def one_process(world):
    """The results of WARP in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        train_warp.main([*SIDE_BY_SIDE.split(), "--out", "runs/one-process"])
    return results(world / "runs/one-process")


SHARED = {
    "train_reinforce": f"{SAMPLING} --steps 3 --num-generations 2 --baseline leave-one-out",
    "train_rm": "--batch-size 16 --epochs 1 --accept-weak --max-length 64 --eval-every 4",
    "train_warp": f"{SAMPLING} --steps 3 --iterations 1 --runs 1",  # one process more than runs
}


@pytest.mark.parametrize("script", SHARED)
def test_gradients_of_a_shared_batch(in_world, tmp_path, script):
    """Two processes with half a batch each take the steps of one with all of it: the same gradients to 1e-6."""
    assert job(tmp_path / "one", 1, script, SHARED[script]) == [0]
    assert job(tmp_path / "two", 2, script, SHARED[script]) == [0, 0]
    one, first, second = (torch.load(tmp_path / f"{log}.gradients") for log in ("one.log.0", "two.log.0", "two.log.1"))
    assert len(one) == len(first) == len(second) >= 3
    torch.testing.assert_close(first[0], one[0], atol=1e-6, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    for a, b in zip(*(results(tmp_path / out)["metrics.jsonl"] for out in ("one", "two")), strict=True):
        assert a | {"grad_norm": 0} == pytest.approx(b | {"grad_norm": 0}, abs=2e-3)


def test_a_process_that_dies(in_world, one_process, tmp_path, capsys):
    """The others end with a line that names the command; as many as before then go on to the end of the run."""
    run, log = tmp_path / "run", Path(f"{tmp_path}/run.log.0.out")
    assert job(run, 2, "train_warp", SIDE_BY_SIDE, death=(1, "step", 5)) == [2, 9]  # step 2 of iteration 2
    error = log.read_text().splitlines()[-1]
    assert error.startswith("error: another process of this run has stopped")
    assert error.endswith(f"torchrun --nproc-per-node 2 train_warp.py --out {run} --resume")
    with pytest.raises(SystemExit, match="2"):
        train_warp.main(["--out", str(run), "--resume"])
    assert "the run has 2 processes, not 1" in capsys.readouterr().err
    assert job(run, 2, "train_warp", "--resume", death=(0, "write_json", 2))[0] == 9  # just before summary.json
    assert "resumed: iteration 2 run 3, after step 3" in log.read_text()
    assert job(run, 2, "train_warp", "--resume") == [0, 0]
    assert results(run) == one_process


def test_what_cannot_be_shared(in_world, tmp_path, monkeypatch, capsys):
    """A script for one process, and a batch that cannot be divided evenly, are refused."""
    assert job(tmp_path / "run", 2, "train_reinforce", f"{SAMPLING} --batch-size 6 --num-generations 2") == [2, 2]
    message = "error: --batch-size gives a step 6 rows, no multiple of the 2 processes that share it times 2 answers"
    assert message in Path(f"{tmp_path}/run.log.0.out").read_text()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match="2"):
        pretrain.main(["--out", str(tmp_path / "other")])
    assert "runs in one process; start it without torchrun" in capsys.readouterr().err


def test_processes_dealt_to_runs(monkeypatch):
    """Of five processes and two teams, 0, 2, 4 share the first, 1 and 3 the second; every process makes both groups."""
    made = []
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(parallel.dist, "new_group", lambda ranks, timeout: made.append(ranks))
    monkeypatch.setenv("WORLD_SIZE", "5")
    shares, runs = [], []
    for number in range(5):
        monkeypatch.setenv("RANK", str(number))
        team = parallel.join(12, runs=2)
        shares.append((team.number, team.share(list(range(12)))))
        runs.append(list(team.deal(5)))
    assert made == [[0, 2, 4], [1, 3]] * 5
    assert shares == [(0, [0, 1, 2, 3]), (1, [0, 1, 2, 3, 4, 5]), (0, [4, 5, 6, 7]), (1, [6, 7, 8, 9, 10, 11]),
                      (0, [8, 9, 10, 11])]  # fmt: skip
    assert runs == [[1, 3, 5], [2, 4]] * 2 + [[1, 3, 5]]
    assert parallel.ALONE.share([1, 2]) == [1, 2] and list(parallel.ALONE.deal(3)) == [1, 2, 3]


def test_mean_of_gradients(monkeypatch):
    """The sum over the team, divided by its size, takes each gradient's place; a parameter without one is left out."""
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in ((2, 3), (1,), (2,))]
    weights[0].grad, weights[2].grad = torch.arange(6.0).view(2, 3), torch.tensor([6.0, 8.0])
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda flat, group: flat.mul_(4))  # the other has three times it
    team = parallel.Team()
    team.size = 2
    team.mean_gradients(weights)
    assert weights[0].grad.tolist() == [[0, 2, 4], [6, 8, 10]]
    assert weights[1].grad is None
    assert weights[2].grad.tolist() == [12, 16]
