"""The ablations train what the scripts train; their statistics against hand-made ones; documents show their results."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_reinforce
import train_warp
from benchmarks import ablations
from rlhf_min.evaluation import load_task
from rlhf_min.support.models import get_weights, set_weights
from rlhf_min.support.options import parse_options
from rlhf_min.support.parallel import ALONE

documents = pytest.importorskip("benchmarks.documents", reason="needs scipy")
SMALL = "--steps 2 --batch-size 4 --num-eval-prompts 4 --max-length 14 --seeds 2"


@pytest.fixture
def seed(in_world, tmp_path, monkeypatch):
    """A repetition with runs of two steps, and the reward model of the world in place of one of its own."""
    link = lambda flags: Path(flags[-1]).symlink_to(in_world / "runs/toy/reward_model")
    monkeypatch.setattr(ablations.train_rm, "main", link)
    (tmp_path / "seed-3").mkdir()
    return ablations.Seed(3, parse_options(ablations.AblationOptions, [*SMALL.split(), "--out", str(tmp_path)]))


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


def test_the_centre_is_what_train_warp_trains(seed):
    """Also with other anchors, merges of anchors, longer first runs in the cache, and as plain REINFORCE."""
    log = SimpleNamespace(team=ALONE, once=lambda _, make, *args: make(*args), step=lambda **line: None,
                          progress=lambda _, steps, state: range(1, steps + 1))  # fmt: skip
    shared = lambda names: {name: getattr(seed.options, name) for name in names}
    seed.warp(1, 1, steps=4)
    for changes in ({}, {"anchor": "sft"}, {"mu": 0.5, "beta": 0.3}):
        found = seed.warp(**changes)
        task = load_task(seed.options, torch.device("cpu"))
        options = train_warp.WarpOptions(**shared(vars(train_warp.WarpOptions())) | changes)
        _, merged, *_ = train_warp.train_warp(task, options, log)
        assert equal(found, merged)
    assert not equal(seed.warp(stream=1), seed.warp()) and not equal(seed.warp(kind="ema"), seed.warp())
    expected = train_reinforce.ReinforceOptions(**shared(ablations.SHARED), steps=4, beta=0.3)
    set_weights(task.policy, seed.sft)
    train_reinforce.train_policy(task, seed.sft, expected, log)
    assert equal(seed.reinforce(4, 0.3), get_weights(task.policy))


def test_runs_are_found_again(seed, monkeypatch):
    """What has been trained is read, and the beginning of a longer run is a shorter run."""
    longer = seed.warp(1, 2, steps=4)
    monkeypatch.setattr(train_warp, "train_policy", None)
    assert equal(seed.warp(1, 2, steps=4), longer) and not equal(seed.warp(1, 2), longer)
    with pytest.raises(TypeError):
        seed.warp(1, 2, mu=0.5)


def test_every_group_has_its_arms(seed, monkeypatch):
    """The arms of the contrasts are all there; none is there twice."""
    monkeypatch.setattr(ablations.Seed, "trained", lambda self, *_, **__: {"policy": self.sft, "ema": self.sft})
    names = [name for group in ablations.GROUPS.values() for name in group(seed, 2)]
    assert len(names) == len(set(names)) and {*ablations.CONTRASTS, ablations.CENTRE} <= set(names)


def front(*points):
    return [{"kl": kl, "gold": gold, "reward": 2 * gold, "fluency": 1.0} for kl, gold in points]


def test_a_front_between_its_points():
    """Between (1, .2) and (3, .6), 2 nats have .4; what a front does not reach is NaN."""
    start, rows = front((0, 0.0))[0], front((1, 0.2), (3, 0.6))
    assert [documents.at_kl(rows, start, kl, "gold") for kl in (0.5, 1, 2, 3)] == pytest.approx([0.1, 0.2, 0.4, 0.6])
    assert math.isnan(documents.at_kl(rows, start, 3.1, "gold"))
    assert math.isnan(documents.at_kl([{"kl": 4.1, "gold": 0.6}], start, 1, "gold"))  # no policy was judged near 1


def test_intervals_and_corrections_by_hand():
    """1, 2, 3: mean 2, error 1/√3, t = 4.303 at 2 degrees of freedom. Holm: .01 · 3, .02 · 2, then .04 · 1."""
    mean, low, high, p = documents.t_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert p == pytest.approx(1 - 2 * 3**0.5 / math.sqrt(14))  # two degrees of freedom: 1 − t/√(t² + 2), t² = 12
    assert documents.holm({"a": 0.04, "b": 0.01, "c": 0.02}) == pytest.approx({"b": 0.03, "c": 0.04, "a": 0.04})
    assert documents.holm({"a": 0.9, "b": 0.6}) == {"b": 1.0, "a": 1.0}


def test_differences_are_paired_by_seed():
    """Two seeds that differ by 1 from each other differ by .1 and .3 from their own centres; short fronts have none."""
    rows = []
    for seed, level in ((1, 0.0), (2, 1.0)):
        for arm, gold in (("θ_sft", 0.0), ("centre", 0.2), ("M = 1", 0.3 if seed == 1 else 0.5)):
            last = 1.5 if arm == "M = 1" else 3
            points = [(0, level)] if arm == "θ_sft" else [(1, level + gold), (last, level + gold)]
            rows.append({"arm": arm, "seed": seed, "steps": 4, "front": front(*points)})
    found = documents.contrasts(documents.by_arm(rows))
    assert list(found) == [("M = 1", 1.0)] and found["M = 1", 1.0][0] == pytest.approx(0.2)
    assert found["M = 1", 1.0][4] == 2 * found["M = 1", 1.0][3]  # of two, the one at 2 nats without a value


def test_documents_show_their_results():
    """Every table of README and docs is the one that `python benchmarks/documents.py` would write."""
    found = 0
    for path in [documents.ROOT / "README.md", *(documents.ROOT / "docs").glob("*.md")]:
        text = path.read_text("utf-8")
        found += len(documents.BLOCK.findall(text))
        assert documents.filled(text) == text, f"{path.name}: run python benchmarks/documents.py"
    assert found >= 2
    empty = "<!-- results differences ablations -->\n\n<!-- end -->"
    old = empty.replace("<!-- end", "old\n\n<!-- end")
    new = documents.filled(old)
    assert new != old and documents.filled(empty + "\n\ntext\n\n" + old) == new + "\n\ntext\n\n" + new


def write_run(folder, summary, lines=()):
    """What a finished run leaves, as far as a result file takes it."""
    folder.mkdir(parents=True)
    run = {"commit": "c1", "threads": 2, "script": "train_warp.py", "command": ["warp", "--lr", "1"]}
    run |= {"options": {"seed": 7}, "processes": 1}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "summary.json").write_text(json.dumps(summary | {"wall_seconds": 3.0}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_result_files_of_finished_runs(monkeypatch, tmp_path):
    """Fronts, answers and policies come back as the runs printed them; of the steps, those with held-out scores."""
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    (tmp_path / "docs/results").mkdir(parents=True)
    points, model = [{"eta": 0.5, "kl": 1.0, "kl_se": 0.1}, {"eta": 1.0, "kl": 2.0, "kl_se": 0.2}], {"kl": 1.5}
    sample = {"prompt": "The film", "before": " was dull.", "after": " was\ngreat" + 300 * "!"}
    lines = [{"step": 1, "kl": 0.0}, {"step": 2, "kl": 0.3, "eval_kl": 0.25, "samples": [{}]}]
    write_run(tmp_path / "a", {"front": points, "model": model, "samples": [sample], "mu_T": 1.0}, lines)
    documents.collect("one", [str(tmp_path / "a")])
    results = documents.read_results("one")
    assert (results["command"], results["commits"], results["seeds"]) == (["python train_warp.py --lr 1"], ["c1"], [7])
    assert documents.front(results["rows"]) == documents.format_table([*points, {"eta": "model/", **model}])
    shown = ["```", "prompt  The film", "after   was great" + 232 * "!" + "…", "```"]  # cut to 250 characters
    assert documents.samples(results["rows"], ["after"]).splitlines() == shown
    assert documents.samples(results["rows"]).splitlines() == [*shown[:2], "before  was dull.", *shown[2:]]
    assert documents.printed(results["rows"], ["summary"]) == documents.format_table(
        [{"mu_T": 1.0, "wall_seconds": 3.0}]
    )
    kl = [{"kl": point["kl"], "kl_se": point["kl_se"]} for point in points]
    assert documents.printed(results["rows"], ["front"], ["kl"]) == documents.format_table(kl)
    with pytest.raises(KeyError):
        documents.printed(results["rows"], ["front"], ["gold"])
    (curve,) = (row for row in results["rows"] if row["table"] == "curve")
    assert (curve["step"], curve["m"], curve["kl"]) == (2, 1, pytest.approx(0.15))
    (watched,) = (row for row in results["rows"] if row["table"] == "watched")
    assert (watched["step"], watched["eval_kl"]) == (2, 0.25)
    for name, kl in (("b", 0.5), ("c", 0.75)):
        write_run(tmp_path / name, {"before": {"eta": 0.0, "kl": 0.0}, "after": {"eta": 1.0, "kl": kl}})
    documents.collect("two", [str(tmp_path / "b"), str(tmp_path / "c")])
    rows = [{"policy": "θ_sft", "kl": 0.0}, {"policy": "b", "kl": 0.5}, {"policy": "c", "kl": 0.75}]
    assert documents.trained(documents.read_results("two")["rows"]) == documents.format_table(rows)


def test_clipping_is_paired_by_seed(monkeypatch, tmp_path):
    """Gold .3 and .5 with clipping, .2 and .5 without: the difference is .05 ± .05; norms are means over steps."""
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    (tmp_path / "docs/results").mkdir(parents=True)
    gold, folders = {"1-1": 0.3, "1-2": 0.5, "none-1": 0.2, "none-2": 0.5}, []
    for name, value in gold.items():
        folders.append(str(tmp_path / f"warp-{name}"))
        lines = [{"step": step, "grad_norm": 2.0 * step, "clipped": 1.0} for step in (1, 2)]
        points = [{"eta": eta, "reward": 1.0, "gold": eta * value, "kl": 2.0} for eta in (0.0, 1.0)]
        write_run(tmp_path / f"warp-{name}", {"front": points}, lines)
    documents.collect("clip", folders)
    clipped, free = documents.clipping(documents.read_results("clip")["rows"]).splitlines()[2:]
    cells = "| 1.000 ± 0.000 | {} | 2.000 ± 0.000 | {} | 3.000 | {} |"
    assert clipped.endswith(cells.format("0.400 ± 0.100", "0.050 ± 0.050", "1.000"))
    assert free.endswith(cells.format("0.350 ± 0.150", "–", "–"))


def test_results_name_what_made_them():
    """Command, commits, machine and seeds stand beside the rows."""
    for path in (documents.ROOT / "docs/results").glob("*.json"):
        assert {"command", "commits", "machine", "seeds", "rows"} <= json.loads(path.read_text("utf-8")).keys()
