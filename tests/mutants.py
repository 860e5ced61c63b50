"""Are the tests worth anything? Break the code in one place at a time and see that some test notices.

    python tests/mutants.py [part of a file name, e.g. warp]

Each mutant is one sign, index, comparison or factor, in a temporary copy of the repository. Exit code 1 where one
survives, or where the text to replace does not stand in its file exactly once. It takes five minutes on two cores.
"""

import gc
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, so before that

import hypothesis  # noqa: F401
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2LMHeadModel  # noqa: F401

# imported here, once: every run of pytest is a fork of this process

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = {}  # {file: [(text, what takes its place)]}
for line in (ROOT / "tests" / "mutants.txt").read_text(encoding="utf-8").splitlines():
    if line.startswith("== "):
        rows = MUTANTS.setdefault(line.removeprefix("== "), [])
    elif " → " in line and not line.startswith("#"):
        rows.append(tuple(line.replace("\\n", "\n").split(" → ")))
SCRIPTS = {
    "train_reinforce": "tests/test_scripts.py -k 'reinforce or skipped or repeats or while_it'",
    "train_warp": "tests/test_scripts.py -k 'warp or skipped or repeats or while_it'",
    "train_rm": "tests/test_scripts.py -k 'train_rm or reward_model or held_out_pairs or of_the_world'",
    "evaluate": "tests/test_scripts.py -k 'evaluation_uses or evaluate_compares'",
}
TESTS = SCRIPTS | {
    "reinforce": "tests/test_reinforce.py tests/test_enumeration.py",
    "rollout": "tests/test_rollout.py tests/test_mutants.py -k 'not one_place'",
    "reward_model": "tests/test_reward_model.py tests/test_mutants.py -k 'not one_place'",
    "data": "tests/test_data.py tests/test_reward_model.py",
    "support/rows": "tests/test_data.py",
    "pretrain": "tests/test_toy.py",
    "support/batches": "tests/test_data.py tests/test_rollout.py tests/test_resume.py -k 'not test_resume or rm-step'",
    "support/runlog": "tests/test_resume.py -k 'restored or inside or rm-step or warp-s or ctrl or ignored or two_p'",
    "support/files": "tests/test_resume.py -k complete",
    "support/parallel": "tests/test_parallel.py -k 'cannot or dealt or mean_of'",
}  # of any other file, the test file of its name; -k leaves out what is slow or starts processes


def path_of(name):
    """The file that a mutant changes."""
    return Path(f"{name}.py") if name in SCRIPTS else Path("rlhf_min", f"{name}.py")


class Fast:
    """A pytest plugin: `world` is made once, each run of pytest gets a copy; tests that killed before come first."""

    def __init__(self, folder, name):
        self.folder, self.killers = folder, folder.with_name(f"{name.replace('/', '-')}.killers")

    def pytest_collection_modifyitems(self, items):
        killers = self.killers.read_text().splitlines() if self.killers.exists() else []
        items.sort(key=lambda item: -killers.count(item.nodeid))

    def pytest_runtest_logreport(self, report):
        if report.failed:
            with self.killers.open("a") as file:
                file.write(f"{report.nodeid}\n")

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef, request):
        if fixturedef.argname != "world":
            return None
        if not self.folder.exists():
            shutil.copytree(fixturedef.func(request.getfixturevalue("tmp_path_factory")), self.folder)
        fixturedef.cached_result = shutil.copytree(self.folder, Path("world").resolve()), None, None
        return fixturedef.cached_result[0]


def passes(folder, arguments, plugin):
    """Whether tests pass; anything but passed, failed and too slow (e.g. they do not import) is an error."""
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        os.chdir(folder)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        flags = "-x -q --tb=short --assert=plain --basetemp tmp -p no:cacheprovider -p no:unraisableexception"
        os._exit(pytest.main([*flags.split(), *shlex.split(arguments)], plugins=[plugin]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 1, -signal.SIGALRM):
        raise RuntimeError(f"pytest ended with {code}\n" + (folder / "output.txt").read_text(errors="replace"))
    return code == 0


def survives(mutant):
    """Whether no test notices the mutant (file, text, what takes its place, world); an empty text mutates nothing."""
    name, old, new, world = mutant
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "copy")
        shutil.copytree(
            ROOT, folder, ignore=shutil.ignore_patterns(".*", "*.png", "data", "runs", "__pycache__", "*.egg-info")
        )
        path = folder / path_of(name)
        text = path.read_text(encoding="utf-8")
        if old and text.count(old) != 1:
            raise SystemExit(f"{path_of(name)} has {old!r} {text.count(old)} times, not once")
        path.write_text(text.replace(old, new) if old else text, encoding="utf-8")
        passed = passes(folder, TESTS.get(name, f"tests/test_{Path(name).name}.py"), Fast(world, name))
        if not old and not passed:
            print((folder / "output.txt").read_text(encoding="utf-8", errors="replace")[-3000:])
        return passed


def main():
    torch.set_num_threads(1)
    gc.freeze()  # the garbage collector of a fork leaves alone what was imported here
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    names = [name for name in MUTANTS if any(part in name for part in sys.argv[1:] or [""])]
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(mp_context=fork)  # unlike Pool's, its processes may have children
    with tempfile.TemporaryDirectory() as temporary, pool:
        world = Path(temporary, "world")
        sound = [(name, "", "", world) for name in ["train_rm", *names]]
        results = [survives(sound[0]), *pool.map(survives, sound[1:])]  # the first one makes the world
        if failed := [TESTS.get(name, name) for (name, *_), passed in zip(sound, results) if not passed]:
            raise SystemExit(f"without any mutant there fails {', '.join(failed)}")
        mutants = [(name, old, new, world) for name in names for old, new in MUTANTS[name]]
        survivors = 0
        for (name, old, new, _), survived in zip(mutants, pool.map(survives, mutants)):
            survivors += survived
            print(f"{'SURVIVED' if survived else 'killed  '}   {name}: {old!r} → {new!r}", flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants killed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
