"""Does a run survive kill -9? Kill each script 20 times, resume it, and compare with a run that was left alone.

    python tests/kills.py [train_rm.py train_reinforce.py train_warp.py rlhf_min.pretrain]

The kills are spread over the run, at random moments; half of them wait until a file is being written. Weights,
metrics.jsonl and summary.json must be equal to the byte, except for fields that end in `seconds`; the exit code is 1
where they are not. It takes ten minutes.
"""

import contextlib
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KILLS = 20
SAMPLING = "--batch-size 16 --num-eval-prompts 32 --lr 1e-3 --save-every 3"
COMMANDS = {
    "train_rm.py": "--epochs 16 --lora-r 4 --lora-dropout 0.1 --save-every 3 --eval-every 20 --accept-weak",
    "train_reinforce.py": f"{SAMPLING} --steps 800",
    "train_warp.py": f"{SAMPLING} --steps 120 --lora-r 4",
    "rlhf_min.pretrain": "--epochs 4 --batch-size 32 --save-every 3",
}


def without_seconds(value):
    """A JSON value without what a clock measured."""
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if not key.endswith("seconds")}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def results(folder):
    """{file: content} of what must be equal."""
    found = {}
    for path in (path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".png"):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            found[name] = [without_seconds(json.loads(line)) for line in path.read_text().splitlines()]
        elif name == "summary.json":
            found[name] = without_seconds(json.loads(path.read_text()))
        elif name != "run.json":
            found[name] = path.read_bytes()
    return found


def run_script(folder, script, argv, log=os.devnull):
    """Run a script's main in this process, which a test has forked for it; its output goes to the file `log`."""
    import torch

    from rlhf_min.support import plots

    os.chdir(folder)
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)  # not pytest's
    torch.set_num_threads(1)
    plots.draw = lambda *args: None
    importlib.import_module(script).main(argv)


def half_written(folder):
    """The files and folders that the run is writing, or was writing when it was killed."""
    with contextlib.suppress(FileNotFoundError):  # it got its name just now
        return {(path, path.stat().st_ctime_ns) for path in Path(folder).rglob("*.new")}
    return set()


def kill_one(process, folder, steps, seconds, while_writing):
    """kill -9 when `steps` are done and `seconds` have passed, or at the first write after that.

    Returns (killed, while writing).
    """
    stale, end = half_written(folder), None
    metrics = Path(folder, "metrics.jsonl")
    while process.poll() is None:
        if end is None and (metrics.read_bytes().count(b"\n") if metrics.exists() else 0) >= steps:
            end = time.monotonic() + seconds
        if end and time.monotonic() > end and (not while_writing or half_written(folder) - stale):
            process.kill()
            process.wait()
            return True, bool(half_written(folder) - stale)
        time.sleep(0.0005)
    return False, False


def survive(start, folder, kills, steps, begin_seconds, step_seconds, rng):
    """Start, kill, start again, ... over a run of `steps`; then let it finish. Returns (kills, kills while writing).

    A quarter of the kills comes while a process begins, which takes `begin_seconds`; the last one after the last step.
    """
    counts = []
    for i in range(kills):
        begins = i % 4 == 2
        done = 0 if begins else int(steps * (i + rng.random()) / kills) if i < kills - 1 else steps
        seconds = rng.uniform(0, begin_seconds if begins else 2 * step_seconds)
        counts.append(kill_one(start(), folder, done, seconds, while_writing=i % 2 == 1))
    if (code := start().wait()) != 0:
        raise RuntimeError(f"the resumed run ended with {code}")
    return [sum(column) for column in zip(*counts)]


def main():
    names, failed, rng = sys.argv[1:] or list(COMMANDS), False, random.Random(0)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        world = "from rlhf_min import toy; import train_rm; train_rm.prepare_world(toy.MODELS)"
        subprocess.run([sys.executable, "-c", world], cwd=temporary, env=environment, check=True, capture_output=True)

        def start(name, out):
            program = ["-m", name] if name.startswith("rlhf_min") else [str(ROOT / name)]
            command = [sys.executable, *program, *COMMANDS[name].split(), "--out", out, "--resume"]
            with open(Path(temporary, "output.txt"), "w") as log:
                return subprocess.Popen(command, cwd=temporary, env=environment, stdout=log, stderr=log)

        for name in names:
            alone, killed = Path(temporary, f"{name}-alone"), Path(temporary, f"{name}-killed")
            if start(name, alone).wait() != 0:
                raise SystemExit(Path(temporary, "output.txt").read_text())
            one, steps = results(alone), len(results(alone)["metrics.jsonl"])
            kills, written = survive(lambda: start(name, killed), killed, KILLS, steps, 5, 0.05, rng)  # noqa: B023
            other = results(killed)
            differ = sorted(file for file in one.keys() | other.keys() if one.get(file) != other.get(file))
            verdict = f"DIFFERENT {', '.join(differ)}" if differ else "equal"
            print(f"{name}: killed {kills} times, {written} while writing; {steps} steps: {verdict}", flush=True)
            failed |= bool(differ) or kills < KILLS
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
