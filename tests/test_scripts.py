"""Every script at toy size, end to end, on an embedded world in miniature."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

import evaluate
import train_rm
import train_warp
from rlhf_min import models, precision, pretrain, toy
from rlhf_min.rollout import sample

ROOT = Path(__file__).parent.parent
SMALL = ["--steps", "3", "--batch-size", "8", "--num-eval-prompts", "16", "--lr", "1e-3"]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder whose runs/toy/ is an embedded world of 1/20 of the size, with its policy and its reward model."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        toy.write_world(toy.FOLDER, reviews=300, train_pairs=100, eval_pairs=50, prompts=100)
        pretrain.main(["--out", toy.POLICY, "--epochs", "6", "--batch-size", "16", "--width", "32"])
        train_rm.main(["--out", toy.REWARD_MODEL, "--epochs", "1", "--accept-weak"])
    return folder


@pytest.fixture
def in_world(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


def read_metrics(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def warp_run(world):
    """One small WARP run that several tests look at, with what its loop called on the way."""
    calls = {"optimizers": [], "steps": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)

        class CountingOptimizer(precision.Optimizer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                calls["optimizers"].append(self)

            def step(self):
                calls["steps"] += 1
                return super().step()

        patch.setattr(train_warp, "Optimizer", CountingOptimizer)
        train_warp.main([*SMALL, "--out", "runs/tested"])
    return world / "runs/tested", calls


def test_warp_writes_what_a_run_is(warp_run):
    """run.json, metrics.jsonl, summary.json, model/ and merged/, each readable by what reads it."""
    folder, _ = warp_run
    run = json.loads((folder / "run.json").read_text())
    assert run["options"]["lr"] == 1e-3 and run["options"]["mu"] == 0.01 and run["options"]["seed"] == 42
    summary = json.loads((folder / "summary.json").read_text())
    front = summary["front"]
    assert [row["eta"] for row in front] == [0, 0.25, 0.5, 0.75, 1]
    names = [
        "eta",
        "reward",
        "reward_se",
        "kl",
        "kl_se",
        "gold",
        "gold_se",
        "fluency",
        "length",
        "eos_rate",
        "distinct_2",
    ]
    assert all(math.isfinite(row[name]) for row in front for name in names)
    assert len(summary["samples"]) == 3 and summary["mu_T"] == pytest.approx(0.03)
    for name in ("model", "merged"):
        models.load_policy(str(folder / name), "cpu", 64)


def test_warp_metrics_are_complete(warp_run):
    """A line a step, I · M · T of them, in order; the raw reward is logged, not the shaped one (T16)."""
    metrics = read_metrics(warp_run[0])
    position = [(row["iteration"], row["run"], row["step"]) for row in metrics]
    assert position == [(i, m, t) for i in (1, 2) for m in (1, 2) for t in (1, 2, 3)]
    for row in metrics:
        shaped = row["reward"] - 0.1 * row["anchor_kl"]
        assert row["advantage"] == pytest.approx(shaped - row["baseline"], abs=1e-4)


def test_anchor_starts_at_init_in_every_run(warp_run):
    """T35, T5: θ_ema is reset for every (i, m), so the KL to it is exactly 0 in a run's first step, and not later."""
    for row in read_metrics(warp_run[0]):
        assert (row["anchor_kl"] == 0.0) == (row["step"] == 1), row


def test_kl_to_sft_starts_at_zero_and_stays_through_iterations(warp_run):
    """T54: the logged kl is to SFT: exactly 0 at the first step of iteration 1, not 0 at that of iteration 2."""
    for row in read_metrics(warp_run[0]):
        if row["step"] == 1:
            assert (row["kl"] == 0.0) == (row["iteration"] == 1), row


def test_every_run_has_its_own_optimizer_and_baseline(warp_run):
    """T38, T52, T17: I · M fresh optimizers, T Adam steps each and no more; b = 0 at a run's first step."""
    folder, calls = warp_run
    assert len({id(optimizer) for optimizer in calls["optimizers"]}) == 4
    for optimizer in calls["optimizers"]:
        assert {int(state["step"]) for state in optimizer.adam.state.values()} == {3}
    assert calls["steps"] == 2 * 2 * 3
    metrics = read_metrics(folder)
    assert all(row["baseline"] == 0.0 for row in metrics if row["step"] == 1)
    first, second, third = metrics[:3]
    shaped = [row["reward"] - 0.1 * row["anchor_kl"] for row in (first, second)]
    assert second["baseline"] == pytest.approx(shaped[0], abs=1e-5)
    assert third["baseline"] == pytest.approx(sum(shaped) / 2, abs=1e-5)


def test_runs_see_other_prompts_and_a_rerun_the_same(warp_run, in_world):
    """T51: m = 1 and m = 2 start from the same weights but sample otherwise; the same seed repeats every figure."""
    folder, _ = warp_run
    metrics = read_metrics(folder)
    assert metrics[0]["reward"] != metrics[3]["reward"]
    train_warp.main([*SMALL, "--out", "runs/again"])
    assert (in_world / "runs/again/metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    train_warp.main([*SMALL, "--out", "runs/other-seed", "--seed", "1"])
    assert read_metrics("runs/other-seed")[0]["reward"] != metrics[0]["reward"]


def test_front_ends(warp_run, in_world):
    """T50: η = 0 is θ_sft, at a KL of exactly 0, and η = 1 is θ_slerp of the last iteration, as merged/ has it."""
    folder, _ = warp_run
    front = json.loads((folder / "summary.json").read_text())["front"]
    assert front[0]["kl"] == 0.0 and front[0]["kl_se"] == 0.0 and front[-1]["kl"] > 0
    evaluate.main(["--front", str(folder), "--num-prompts", "16", "--front-points", "2", "--out", "runs/swept"])
    rows = json.loads(Path("runs/swept/summary.json").read_text())["rows"]
    assert [row["eta"] for row in rows] == [0, 1] and rows[0]["kl"] == 0.0 and rows[1]["kl"] > 0


def test_model_is_between_sft_and_merged(warp_run, in_world):
    """T47, T39: with I = 1 model/ = (1−η) θ_sft + η θ_slerp; with μ = 0 the policies, not their EMAs, move it."""
    train_warp.main([*SMALL, "--iterations", "1", "--eta", "0.3", "--mu", "0", "--out", "runs/eta"])
    load = lambda name: models.get_weights(models.load_policy(name, "cpu", 64)[0])
    sft, merged, model = load(toy.POLICY), load("runs/eta/merged"), load("runs/eta/model")
    assert any((merged[name] - sft[name]).abs().max() > 1e-4 for name in sft)
    for name in sft:
        torch.testing.assert_close(model[name], 0.7 * sft[name] + 0.3 * merged[name], atol=1e-6, rtol=0)


def test_skipped_step_leaves_everything_alone(in_world, monkeypatch):
    """T55: in float16 an overflow moves neither the weights nor EMA, baseline or learning rate of the WARP loop."""

    class OverflowingOptimizer(precision.Optimizer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)  # the default overflows by itself at first
            self.taken = 0

        def step(self):
            self.taken += 1
            if self.taken == 2:
                self.parameters[0].grad.fill_(float("inf"))
            return super().step()

    monkeypatch.setattr(train_warp, "Optimizer", OverflowingOptimizer)
    small = [*SMALL, "--iterations", "1", "--runs", "1", "--warmup-steps", "5", "--precision", "fp16"]
    train_warp.main([*small, "--out", "runs/skip"])
    first, second, third = read_metrics("runs/skip")
    assert [row["grad_norm"] is None for row in (first, second, third)] == [False, True, False]  # JSON has no inf
    assert second["learning_rate"] == third["learning_rate"] > first["learning_rate"]
    assert second["baseline"] == third["baseline"] != first["baseline"]


def test_pretraining_learns_and_ends_texts(world):
    """The toy policy's loss falls, and what it samples ends in EOS more often than by chance."""
    loss = [row["loss"] for row in read_metrics(world / toy.POLICY)]
    assert loss[-1] < 0.7 * loss[0]
    policy, tokenizer = models.load_policy(str(world / toy.POLICY), "cpu", 64)
    prompts = [tokenizer("This drama")["input_ids"]] * 32
    rollout = sample(policy, prompts, 64, 1.0, tokenizer.eos_token_id, tokenizer.pad_token_id, torch.Generator())
    assert rollout.ended.float().mean() > 0.3  # 54 uniform draws from 600 tokens would end 9 % of the answers


def test_reward_model_says_what_it_dropped(in_world, capsys):
    """Pairs that are identical or too long are dropped, counted and named; accuracy and margin are in the log."""
    rows = [{"prompt": "x", "chosen": " It was good.", "rejected": " It was bad."}] * 40
    rows += [{"prompt": "x", "chosen": " same", "rejected": " same"}] * 2
    rows += [{"prompt": "x", "chosen": " The plot was weak." * 30, "rejected": " bad"}] * 3
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_rm.main(
        [
            "--data",
            "pairs.jsonl",
            "--max-length",
            "60",
            "--batch-size",
            "8",
            "--accept-weak",
            "--eval-every",
            "2",
            "--out",
            "runs/drop",
        ]
    )
    assert "2 identical" in capsys.readouterr().out
    summary = json.loads(Path("runs/drop/summary.json").read_text())
    assert summary["dropped"] == {"identical": 2, "longer than 60 tokens": 3}
    assert summary["train_pairs"] + summary["eval_pairs"] == 40
    assert {"eval_loss", "eval_accuracy", "eval_margin"} <= set(read_metrics("runs/drop")[1])


def test_accumulation_equals_a_large_batch(in_world):
    """Two passes of 8 pairs with accumulation take the same step as one of 16, up to rounding."""
    common = ["--epochs", "1", "--accept-weak", "--center-coefficient", "0.1", "--eval-every", "100", "--keep", "last"]
    train_rm.main([*common, "--batch-size", "16", "--out", "runs/large"])
    train_rm.main([*common, "--batch-size", "8", "--accumulation-steps", "2", "--out", "runs/accumulated"])
    large, accumulated = read_metrics("runs/large"), read_metrics("runs/accumulated")
    assert len(large) == len(accumulated) == 6
    for a, b in zip(large, accumulated):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


def test_evaluate_compares_with_the_first(warp_run, in_world):
    """T60: a policy against itself has difference 0, win rate ½ and KL 0; another one has a KL above 0."""
    policies = [toy.POLICY, toy.POLICY, str(warp_run[0])]
    evaluate.main(["--policies", *policies, "--num-prompts", "16", "--out", "runs/compared"])
    first, again, trained = json.loads(Path("runs/compared/summary.json").read_text())["rows"]
    assert again["reward_delta"] == 0 and again["reward_win_rate"] == 0.5 and again["kl"] == 0
    assert trained["kl"] > 0 and trained["reward_delta_low"] <= trained["reward_delta"] <= trained["reward_delta_high"]
    assert "reward_delta" not in first
    assert "| runs/toy/policy |" in Path("runs/compared/table.md").read_text()


def test_a_run_without_a_model_is_not_cached(tmp_path):
    """A run that was interrupted, or whose reward model was refused, is made anew; a finished one is left alone."""
    calls, folder = [], tmp_path / "run"

    def main(argv):
        calls.append(argv)
        (folder / "model").mkdir(parents=True)
        (folder / "summary.json").write_text("{}")

    folder.mkdir()
    (folder / "summary.json").write_text("{}")
    toy.ensure_run(str(folder), main)
    toy.ensure_run(str(folder), main)
    assert calls == [["--out", str(folder)]]


def readme_commands():
    """The python commands in the README's code, blocks and spans; .ci/run has those of pip, pytest and mutants.py."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    code = [line.rpartition("&&")[2].strip() for block in blocks for line in block.splitlines()]
    code += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    return sorted({line for line in code if line.startswith("python ") and "tests/" not in line})


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands(command, warp_run, in_world, monkeypatch):
    """Every command of the README runs, at toy size; configuration files of real data only have to be readable."""
    (in_world / "configs").exists() or (in_world / "configs").symlink_to(ROOT / "configs")
    _, script, *flags = shlex.split(command)
    if script == "-m":
        script, *flags = flags
    mains = {
        "train_warp.py": train_warp,
        "train_rm.py": train_rm,
        "evaluate.py": evaluate,
        "rlhf_min.pretrain": pretrain,
    }
    module = mains[script]
    if "--config" in flags:
        options = next(value for name, value in vars(module).items() if name.endswith("Options"))
        assert module.parse_options(options, flags).out.startswith("runs/")
        return
    small = {
        "train_warp.py": SMALL[:-2], "train_rm.py": ["--epochs", "1", "--accept-weak"],
        "evaluate.py": ["--num-prompts", "16"], "rlhf_min.pretrain": ["--epochs", "1"],
    }  # fmt: skip
    flags = [re.sub(r"runs/warp-\d", str(warp_run[0]), flag) for flag in flags]
    name = re.sub(r"\W+", "-", command)
    if "--out" in flags:
        flags[flags.index("--out") + 1] = f"runs/{name}"
    else:
        flags += ["--out", f"runs/{name}"]
    module.main([*flags, *small[script]])
    assert (in_world / "runs" / name / "summary.json").exists()
