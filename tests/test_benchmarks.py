"""The benchmarks: their figures against hand-made ones, and each of them from end to end in miniature."""

import json
import math
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import ablations, baselines, gpu, kl, levels, reward_models, speed
from benchmarks.reward_models import calibration_error, measure, spearman
from rlhf_min import toy
from rlhf_min.data import Pair, Prompt, encode_answer
from rlhf_min.evaluation import Task
from rlhf_min.support.models import load_tokenizer
from rlhf_min.support.parallel import ALONE
from rlhf_min.support.rows import read_rows, write_jsonl

QUIET = SimpleNamespace(team=ALONE, step=lambda **line: None, progress=lambda _, steps, state: range(1, steps + 1))
tensor = lambda *values: torch.tensor(values, dtype=torch.float64)
read = lambda path: json.loads(Path(path).read_text())


def test_statistics_by_hand():
    """Ranks 1, 2½, 2½, 4 and 1, 3, 2, 4 correlate with 4.5/√(4.5·5); a calibration bin counts by what it holds."""
    a, b = tensor(1, 2, 2, 9), tensor(-5, 0.3, 0.2, 0.4)
    assert spearman(a, b) == pytest.approx(4.5 / math.sqrt(22.5)) == pytest.approx(spearman(a.exp(), b))
    assert spearman(-a, b) == pytest.approx(-spearman(a, b)) and spearman(a, a) == pytest.approx(1.0)
    # |.6 − ½| with weight 2/5, |.867 − 1| with 3/5; P < ½ is a wrong answer of 1 − P
    assert calibration_error(tensor(0.6, 0.4, 0.9, 0.9, 0.8), bins=2) == pytest.approx(0.12)
    # P = 1 belongs to the last bin, P = ½ to the first, where it is an error, as a tie is in the accuracy
    assert calibration_error(tensor(0.0)) == 1.0 and calibration_error(tensor(0.5, 0.5, 1.0, 1.0)) == 0.25


def measured(tokenizer, logits, answers, ratings):
    """`measure` of a judge that gives these logits to answers, on pairs of answers."""
    table = {tuple(encode_answer(tokenizer, "The film", answer)): row for answer, row in logits.items()}
    find = lambda rows: torch.tensor([table[tuple(row)] for row in rows])
    judge = SimpleNamespace(tokenizer=tokenizer, max_length=64, logits=find)
    return measure(judge, [Pair("The film", *pair) for pair in answers], ratings)


def test_a_scalar_reward_model_is_measured(tiny_tokenizer):
    """Rewards 2, 1, 0 of a, b, c: b over c is right, P = σ(1); c over a is wrong, σ(−2); a tie with d is an error.

    A pair that is too long is left out together with its ratings, which would be shifted against the rest.
    """
    logits, answers = {"a": [2.0], "b": [1.0], "c": [0.0], "d": [0.0]}, ["bc", ("x" * 99, "b"), "ca", "dc"]
    row = measured(tiny_tokenizer, logits, answers, [(9, 3), (1, 10), (4, 7), (6, 5)])
    p = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2)), 0.5]
    assert (row["pairs"], row["accuracy"]) == (3, pytest.approx(1 / 3))
    assert row["accuracy_se"] == pytest.approx(math.sqrt(2 / 3 / 2 / 3))  # Σ (x − ⅓)² = ⅔, over N − 1, over N
    assert row["nll"] == pytest.approx(sum(-math.log(value) for value in p) / 3, rel=1e-5)
    assert row["calibration_error"] == pytest.approx(((1 - p[0]) + (1 - p[1]) + 0.5) / 3, rel=1e-5)
    # chosen, then rejected: rewards 1 0 0 0 2 0 have ranks 5 2½ 2½ 2½ 6 2½; ratings 9 4 6 3 7 5 have ranks 6 2 4 1 5 3
    assert row["spearman"] == pytest.approx(spearman(tensor(5, 2.5, 2.5, 2.5, 6, 2.5), tensor(6, 2, 4, 1, 5, 3)))
    assert "sigma" not in row and "spearman" not in measured(tiny_tokenizer, logits, answers, None)
    gaps = [row.get(f"accuracy at gap {name}") for name in ("≥ 2", "1 to 2", "< 1")]  # of 6 and 3; of 1; of none
    assert gaps == [0.5, 0.0, None]


def test_an_ordinal_reward_model_is_measured(tiny_tokenizer):
    """Its ratings are certain, or two with ½ each, so that P(i > j) + ½ P(i = j), E, σ and tie mass follow by hand."""
    one_hot = lambda *ratings: [0.0 if k in ratings else -1e4 for k in range(1, 11)]
    logits = {"a": one_hot(9), "b": one_hot(4, 8), "c": one_hot(4), "d": one_hot(2, 6)}  # σ = 0, 2, 0, 2
    row = measured(tiny_tokenizer, logits, ["ab", "bc", "cd"], [(9, 6), (5, 4), (4, 2)])
    # a > b surely; b > c half the time, else a tie: ¾; c > d half the time; E_c = E_d = 4, a tie, which is an error
    assert row["accuracy"] == pytest.approx(2 / 3)
    assert row["nll"] == pytest.approx(-(math.log(1) + math.log(0.75) + math.log(0.5)) / 3, abs=1e-6)
    assert row["calibration_error"] == pytest.approx((0 + 0.25 + 0.5) / 3, abs=1e-6)
    assert (row["tie_mass"], row["sigma"]) == (pytest.approx((0 + 0.5 + 0) / 3), pytest.approx((2 + 2 + 2) / 6))
    # E of a b c, b c d is 9 6 4, 6 4 4 with mean 5.5, the ratings 9 5 4, 6 4 2 with mean 5; sums of squares 19.5 and 28
    e, rating = (tensor(9, 6, 4, 6, 4, 4) - 5.5) / 19.5**0.5, (tensor(9, 5, 4, 6, 4, 2) - 5) / 28**0.5
    assert row["sigma_error_correlation"] == pytest.approx(spearman(tensor(0, 2, 0, 2, 0, 2), (e - rating).abs()))
    assert row["spearman"] == pytest.approx(spearman(e, rating))


def test_reward_models_from_end_to_end(in_world):
    """Both heads of the world have a row each, with what train_rm.py said when it validated on the same pairs.

    Above them stands the longer answer: of two answers to one prompt, the one with more tokens.
    """
    reward_models.main(["--out", "runs/quality"])
    longer, *rows = read("runs/quality/summary.json")["rows"]
    tokenizer = load_tokenizer(toy.POLICY)
    tokens = lambda row, key: len(tokenizer(row["prompt"] + row[key])["input_ids"])
    wins = [tokens(row, "chosen") > tokens(row, "rejected") for row in read_rows(toy.EVAL_PAIRS)]
    assert longer["accuracy"] == pytest.approx(sum(wins) / 50) and 0 < sum(wins) < 50
    for row in rows:
        accuracy = read(f"{row['reward_model']}/summary.json")["eval_accuracy"]
        assert (row["pairs"], row["accuracy"]) == (50, pytest.approx(accuracy, abs=1e-6)) and "spearman" in row
    assert 0 < rows[1]["tie_mass"] < 0.5 and 0 < rows[1]["sigma"] < 4.5 and "sigma" not in rows[0]


def doubting_judge(texts, completions, ended, columns=None):
    """A reward and a σ that differ from answer to answer."""
    lengths = torch.tensor([float(len(completion)) for completion in completions])
    return 3 + lengths.sin(), 1 + lengths.cos().abs()


def test_settings_of_the_arms():
    """σ comes in by --sigma for two arms and by the reward for two others, and only the constant changes β."""
    answers = (["x"] * 3, ["a", "bb", "ccc"], torch.ones(3))
    reward, sigma = doubting_judge(*answers)
    f = 1 / (1 + sigma)
    expected = {"off": ("off", 1, 1), "advantage": ("advantage", 1, 1), "penalty": ("penalty", 1, 1),
                "constant": ("off", f.mean(), f.mean()), "shrunk": ("off", 1, f.mean()),
                "folded": ("off", 1, f)}  # fmt: skip
    for arm, (kind, of_beta, of_reward) in expected.items():
        judge, found, beta = levels.arm_settings(arm, doubting_judge, answers, levels.LevelOptions(beta=0.25))
        assert (found, beta) == (kind, pytest.approx(0.25 * float(of_beta)))
        torch.testing.assert_close(judge(*answers), (of_reward * reward, sigma))


def test_levels_from_end_to_end(in_world, monkeypatch):
    """Every arm starts at π_sft with the reward model of its head, and is judged at the end and at matched KL."""
    train_rm = levels.train_rm.main
    monkeypatch.setattr(levels.train_rm, "main", lambda flags: train_rm([*flags, "--epochs", "1", "--accept-weak"]))
    flags = "--seeds 1 --steps 2 --batch-size 8 --num-eval-prompts 4 --max-length 14 --match-kl 5 --lr 1e-3"
    levels.main([*flags.split(), "--arms", "off", "folded", "--out", "runs/levels"])
    runs = [read(f"runs/levels/{head}1/run.json")["options"] for head in ("scalar", "strict", "half")]
    assert [run["head"] for run in runs] == ["scalar", "ordinal", "ordinal"] and runs[2]["ties"] == "half"
    end, matched, by_seed = (read("runs/levels/summary.json")[name] for name in ("end", "matched", "by_seed"))
    assert [row["arm"] for row in end] == ["scalar, off", "strict, off", "strict, folded", "half, off", "half, folded"]
    assert matched == end and all(row["eta"] == 1.0 and 0 < row["kl"] < 5 for row in end)  # nearer than 5 nats
    assert all(row["gold_minus_off"] == 0.0 for row in end if row["arm"].endswith(", off"))
    assert end[0]["win_rate_level_1"] == 0.5 and end[0]["gold_minus_level_1"] == 0.0  # against itself
    assert end[3]["gold_minus_level_1"] == pytest.approx(end[3]["gold"] - end[0]["gold"])
    assert by_seed[0].items() >= {"arm": "scalar, off", "at": "end", "seed": 1, "gold": end[0]["gold"]}.items()
    first = [json.loads(line) for line in Path("runs/levels/metrics.jsonl").read_text().splitlines()][::2]
    assert all(row["kl"] == row["baseline"] == 0.0 for row in first)
    assert len({row["entropy"] for row in first}) == 1 and len({row["reward"] for row in first}) == 5


def test_variance_table_by_hand():
    """±3, ±1 and 2 ± 2 along one axis have variances 9, 1 and 4; predicted are 9 + 1 + 2 = 12, 1 + 2 and 2 · 2.

    Squares 1 and 9 around a mean of 5 have the standard error √(16 · 4/3 / 4) = 4/√3, relative to 5.
    """
    gradients = {"none": [[3, 0], [-3, 0]], "mean of the past": [[1, 1], [-1, 1]], "RLOO, k = 2": [[4, 0], [0, 0]],
                 "RLOO, k = 4": [[1, 1], [1, 1]]}  # fmt: skip
    gradients = {name: torch.tensor(rows * 2).float() for name, rows in gradients.items()}
    spread = {"level": -3.0, "between prompts": 1.0, "within prompts": 2.0}
    none, past, rloo, four = rows = baselines.variance_table(gradients, torch.tensor([2.0, 0.0]), spread)
    assert [row["variance"] for row in rows] == pytest.approx([1, 1 / 9, 4 / 9, 0])
    assert [row["predicted"] for row in rows] == pytest.approx([1, 3 / 12, 4 / 12, 8 / 3 / 12])
    assert (none["cosine"], past["cosine"], four["cosine"]) == (0.0, 0.0, pytest.approx(math.sqrt(0.5)))
    assert past["cosine_se"] == pytest.approx(math.sqrt(4 / 3 * 0.5 / 4))  # ±√½, four times: variance ½ · 4/3
    assert past["cosine of the mean"] == 0.0 and rloo["cosine of the mean"] == pytest.approx(1.0)
    uneven = {"none": torch.tensor([[1.0, 0], [3, 0], [-1, 0], [-3, 0]])}
    assert baselines.variance_table(uneven, torch.ones(2), spread)[0]["variance_se"] == pytest.approx(4 / 3**0.5 / 5)


CASES = {"answer": lambda _, answer: answer.count("e"), "constant": lambda *_: 3, "prompt": lambda text, _: len(text)}


@pytest.mark.parametrize("of", CASES)
def test_gradients_of_all_baselines(tiny_policy, tiny_tokenizer, of):
    """A baseline takes a constant reward away; RLOO also takes away what a prompt is worth, a moving average does not.

    With N = 8 answers, leaving one's own out is 8/7 of the mean of all.
    """
    judge = lambda texts, answers, *_: (torch.tensor([float(CASES[of](*pair)) for pair in zip(texts, answers)]),) * 2
    options = baselines.BaselineOptions(sequences=8, batches=2, past=2, reference_sequences=8, max_length=9)
    prompts = [Prompt(tiny_tokenizer(text)["input_ids"], text) for text in ("I", "The", "The film", "The film was")]
    task = Task(tiny_policy, tiny_tokenizer, {"reward": judge}, prompts, [])
    gradients, reference, spread = baselines.measure_gradients(task, options, QUIET)
    sizes = {name: rows.norm(dim=-1) for name, rows in gradients.items()}  # (batches,) each
    assert len(gradients) == 7 and all(rows.shape == (2, len(reference)) for rows in gradients.values())
    one_out, mean = gradients["leave-one-out over the batch"], gradients["mean of the batch, self-included"]
    torch.testing.assert_close(one_out, 8 / 7 * mean, atol=1e-4, rtol=1e-4)
    vanish = {"answer": [], "constant": [*sizes], "prompt": ["RLOO, k = 2", "RLOO, k = 4"]}[of]
    assert all((size < 1e-3).all() == (name in vanish and name != "none") for name, size in sizes.items())
    assert torch.allclose(gradients["mean of the past"], gradients["EMA of the past"], atol=1e-3) == (of != "answer")
    assert (spread["within prompts"] > 0) == (of == "answer") and (spread["between prompts"] > 1) == (of == "prompt")


def test_baselines_from_end_to_end(in_world):
    """Seven variances, and four ways to train from π_sft with the same number of answers, two seeds each."""
    flags = "--sequences 8 --batches 2 --past 1 --reference-sequences 64 --steps 2 --batch-size 8 --num-eval-prompts 8"
    baselines.main([*flags.split(), "--max-length", "14", "--seeds", "2", "--out", "runs/baselines"])
    summary = read("runs/baselines/summary.json")
    metrics = [json.loads(line) for line in Path("runs/baselines/metrics.jsonl").read_text().splitlines()]
    assert len(summary["variance"]) == 7 and len(summary["training"]) == 4
    assert [row["step"] for row in metrics] == [1, 2] * 8 and not any(row["kl"] for row in metrics[::2])  # from π_sft
    assert [row["baseline"] == 0.0 for row in metrics[::2]] == [True] * 2 + [False] * 4 + [True] * 2
    for i, row in enumerate(summary["training"]):
        rewards = [sum(line["reward"] for line in metrics[4 * i + j : 4 * i + j + 2]) / 2 for j in (0, 2)]
        assert row["reward over training"] == pytest.approx(sum(rewards) / 2)
        assert row["reward over training_se"] == pytest.approx(abs(rewards[0] - rewards[1]) / 2)
        assert row["kl"] > 0 and {"reward", "gold", "fluency", "gold_se"} <= set(row)
    assert abs(metrics[4]["advantage"]) < 1e-5 < abs(metrics[0]["advantage"])  # RLOO's adds up to 0


def test_speed_of_a_row_and_of_a_peer_that_is_not_there(monkeypatch, tmp_path, capsys):
    """Both sides of a small row take their turns; what a peer raises stands in its row, and the next row follows."""

    class NoPeer(speed.Sampling):
        def theirs(self, folder, options, turns):
            raise ModuleNotFoundError("No module named 'trl'")

    small = lambda: speed.gpt2({"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 50})
    monkeypatch.setattr(speed, "ROWS", {"broken": NoPeer(small, 2, 2), "whole": speed.Sampling(small, 2, 2)})
    monkeypatch.setattr(speed, "Process", threading.Thread)  # a process takes seconds to import torch
    flags = "--rows broken whole --repeats 3 --threads 1 --device cpu --out"
    speed.main([*flags.split(), str(tmp_path / "run")])
    broken, whole = read(tmp_path / "run/summary.json")["rows"]
    assert broken["failed"] == "theirs: ModuleNotFoundError: No module named 'trl'" and "ours, s" in broken
    assert broken["failed"] in capsys.readouterr().out and "peer ÷ ours" not in broken
    assert {"ours, s", "theirs, s", "peer ÷ ours"} <= set(whole) and "failed" not in whole
    ours, theirs = [(1, 7.4), (2, 7), (4, 7)], [(3, 8), (4, 9), (4, 8)]
    turns = {"ours": [(*turn, "used") for turn in ours], "theirs": [(*turn, "none") for turn in theirs]}
    row = speed.table_row("whole", turns, {})
    assert row["peer ÷ ours"] == "2.000 (1.000 to 3.000)" and (row["ours, MiB"], row["theirs, MiB"]) == (7, 9)


@pytest.mark.parametrize("module, flags, fragment", [
    (reward_models, "--reward-models rlhf_min.toy.gold_judge", "a function has no probabilities"),
    (reward_models, "--max-length 8", "no pair fits into --max-length 8"),
    (reward_models, "--data half.jsonl", "rejected_rating must be numbers"),
    (levels, "--policy nowhere", "--policy: the comparison sets it itself"),
    (levels, "--arms advantage", "--arms are off, and then"),
    (baselines, "--batch-size 10", "--batch-size 10 must be a multiple of 4"),
    (speed, "--rows nothing", "there is no such row"),
    (ablations, "--iterations 3", "--iterations: the comparison sets it itself"),
    (kl, "--mu 0.5", "--mu: the comparison sets it itself"),
])  # fmt: skip
def test_a_mistake_is_one_line(in_world, capsys, tmp_path, module, flags, fragment):
    """The exit code is 2, one line says what to mend, and no folder is made."""
    write_jsonl("half.jsonl", [{"prompt": "x", "chosen": "a", "rejected": "b", "chosen_rating": 3}])
    with pytest.raises(SystemExit, match="2"):
        module.main([*flags.split(), "--out", str(tmp_path / "out")])
    (line,) = (line for line in capsys.readouterr().err.split("\n") if line.strip())
    assert line.startswith("error: ") and fragment in line and not (tmp_path / "out").exists()


# On a GPU; here, the rehearsal


@pytest.mark.parametrize(
    "stage, rows", [("facts", 4), ("profile", 2), ("precisions", 3), ("ablations", 3), ("compiled", 2), ("nccl", 1)]
)
def test_stages_of_the_gpu_benchmark(in_world, tmp_path, stage, rows):
    """At toy size, on the CPU, every stage that starts no process of its own gives its rows."""
    out = tmp_path / "gpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        gpu.main(["--stage", stage, "--out", str(out), "--device", "cpu", "--toy"])
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(found) == rows and {row["stage"] for row in found} == {stage} and not any("failed" in r for r in found)


def test_stages_that_fail_or_do_not_fit(monkeypatch, tmp_path, capsys):
    """Results stay when another stage fails; what would not fit into the time is skipped; a table comes last."""

    def run(command, **kwargs):
        (tmp_path / "results.jsonl").open("a").write(json.dumps({"stage": command[3], "row": "x", "GB/s": 2.0}) + "\n")
        return SimpleNamespace(returncode=int(command[3] == "right"))

    monkeypatch.setattr(gpu.subprocess, "run", run)
    gpu.main(["--out", str(tmp_path), "--seconds", "80", "--stages", "facts", "right", "step", "nccl"])
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["stage"], row.get("failed")) for row in rows] == [
        ("facts", None), ("right", None), ("right", "exit code 1; see log.txt"),
        ("step", "skipped: 100 s, and 80 are left"), ("nccl", None),
    ]  # fmt: skip
    assert capsys.readouterr().out.endswith((tmp_path / "table.md").read_text() + "\n")
