"""Every script at toy size, end to end, on an embedded world in miniature (the fixture `world`)."""

import importlib.util
import io
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
import train_reinforce
import train_rm
import train_warp
from rlhf_min import models, precision, pretrain, toy
from rlhf_min.data import load_pairs
from rlhf_min.lora import read_adapter
from rlhf_min.options import parse_options
from rlhf_min.reward_model import load_judge
from rlhf_min.rollout import sample
from tests.kills import without_seconds

ROOT = Path(__file__).parent.parent
SMALL = ["--steps", "3", "--batch-size", "8", "--num-eval-prompts", "16", "--lr", "1e-3"]


def read_metrics(folder):
    """The lines of metrics.jsonl, without what a clock measured."""
    return without_seconds([json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()])


def read_summary(folder):
    return json.loads(Path(folder, "summary.json").read_text())


def load_weights(name):
    """All weights of a policy by name, {name: tensor}."""
    return models.get_weights(models.load_policy(str(name), "cpu", 64)[0])


def count_steps(patch, module):
    """The optimizers that a script makes from now on, and how often they step."""
    calls = {"optimizers": [], "steps": 0}

    class CountingOptimizer(precision.Optimizer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            calls["optimizers"].append(self)

        def step(self):
            calls["steps"] += 1
            return super().step()

    patch.setattr(module, "Optimizer", CountingOptimizer)
    return calls


def run_reinforce(world, folder, *flags):
    """A small run of train_reinforce.py, and what its loop saw: an entry a step, and the prompts of both kinds."""
    now, seen = {}, {"steps": []}
    train_policy, judge_policy = train_reinforce.train_policy, train_reinforce.judge_policy
    kl_estimate, policy_gradient_loss = train_reinforce.kl_estimate, train_reinforce.policy_gradient_loss

    def recording_train_policy(policy, tokenizer, reward_model, prompts, *others):
        def judge(texts, completions, ended):
            reward, sigma = reward_model(texts, completions, ended)
            now.update(prompts=texts, ended=ended.tolist(), reward=reward.tolist(), sigma=sigma.tolist())
            return reward, sigma

        seen["training"] = [prompt.text for prompt in prompts]
        return train_policy(policy, tokenizer, judge, prompts, *others)

    def recording_judge_policy(policy, tokenizer, prompts, *others):
        seen["held_out"] = [prompt.text for prompt in prompts]
        return judge_policy(policy, tokenizer, prompts, *others)

    def recording_kl_estimate(*arguments):
        now["kl"] = kl_estimate(*arguments).tolist()
        return kl_estimate(*arguments)

    def recording_loss(logprobs, advantage, mask):
        seen["steps"].append({**now, "advantage": advantage.tolist()})
        return policy_gradient_loss(logprobs, advantage, mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        seen["calls"] = count_steps(patch, train_reinforce)
        patch.setattr(train_reinforce, "train_policy", recording_train_policy)
        patch.setattr(train_reinforce, "judge_policy", recording_judge_policy)
        patch.setattr(train_reinforce, "kl_estimate", recording_kl_estimate)
        patch.setattr(train_reinforce, "policy_gradient_loss", recording_loss)
        train_reinforce.main([*SMALL, *flags, "--out", folder])
    return world / folder, seen


@pytest.fixture(scope="session")
def warp_run(world):
    """One small WARP run that several tests look at, with what its loop called on the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        calls = count_steps(patch, train_warp)
        train_warp.main([*SMALL, "--out", "runs/tested"])
    return world / "runs/tested", calls


@pytest.fixture(scope="session")
def lora_warp_run(world):
    """A small WARP run with adapters of rank 2: I = M = 2, so what it finds has rank 8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        train_warp.main([*SMALL, "--steps", "2", "--lora-r", "2", "--out", "runs/lora-warp"])
    return world / "runs/lora-warp"


@pytest.fixture(scope="session")
def reinforce_run(world):
    """One small REINFORCE run of all weights, and what its loop saw."""
    return run_reinforce(world, "runs/reinforced")


@pytest.fixture(scope="session")
def lora_reinforce_run(world):
    """The same with adapters."""
    return run_reinforce(world, "runs/lora-reinforced", "--lora-r", "2")


@pytest.fixture(scope="session")
def lora_reward_model(world):
    """The run of an ordinal reward model with adapters and dropout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        flags = ["--head", "ordinal", "--lora-r", "2", "--lora-dropout", "0.1", "--epochs", "1", "--lr", "1e-2"]
        train_rm.main([*flags, "--accept-weak", "--out", "runs/lora-rm"])
    return world / "runs/lora-rm"


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
    drawn = {path.name for path in folder.glob("*.png")}
    assert drawn == ({"steps.png", "front.png"} if importlib.util.find_spec("matplotlib") else set())


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


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_greek_does_not_end_a_run(world, monkeypatch, tmp_path, encoding):
    """What cannot be printed is replaced, and the run ends as it should."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", out)
    train_warp.main([*SMALL, "--iterations", "1", "--out", str(tmp_path / "run")])
    out.flush()
    assert b"The front: (1??) ?_sft + ? ?_slerp" in out.buffer.getvalue()
    assert (tmp_path / "run/summary.json").exists()


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
    assert read_metrics("runs/again") == metrics
    train_warp.main([*SMALL, "--iterations", "1", "--runs", "1", "--seed", "1", "--out", "runs/other-seed"])
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


@pytest.mark.parametrize("module, flags", [(train_warp, ["--iterations", "1", "--runs", "1"]), (train_reinforce, [])])
def test_skipped_step_leaves_everything_alone(in_world, monkeypatch, module, flags):
    """T55: in float16 an overflow moves neither the weights nor EMA, baseline or learning rate of a loop."""

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

    monkeypatch.setattr(module, "Optimizer", OverflowingOptimizer)
    out = f"runs/skip-{module.__name__}"
    module.main([*SMALL, *flags, "--warmup-steps", "5", "--precision", "fp16", "--out", out])
    first, second, third = read_metrics(out)
    assert [row["grad_norm"] is None for row in (first, second, third)] == [False, True, False]  # JSON has no inf
    assert second["learning_rate"] == third["learning_rate"] > first["learning_rate"]
    assert second["baseline"] == pytest.approx(third["baseline"], abs=1e-6) != first["baseline"]


def test_warp_with_adapters_starts_from_its_anchor(lora_warp_run):
    """T35, T49: B = 0 at the first step of every run, so that π_θ is its anchor to the bit; later it is not."""
    for row in read_metrics(lora_warp_run):
        assert (row["anchor_kl"] == 0.0) == (row["step"] == 1), row
        if row["step"] == 1:
            assert (row["kl"] == 0.0) == (row["iteration"] == 1), row


def test_the_front_of_adapters_starts_at_sft(lora_warp_run, in_world):
    """T50: η = 0 is θ_sft at a KL of exactly 0, in the run's own front and in the one that evaluate.py sweeps."""
    front = read_summary(lora_warp_run)["front"]
    assert front[0]["kl"] == 0.0 and front[0]["kl_se"] == 0.0 and front[-1]["kl"] > 0
    flags = ["--num-prompts", "16", "--front-points", "2", "--out", "runs/swept-lora"]
    evaluate.main(["--front", str(lora_warp_run), *flags])
    rows = read_summary("runs/swept-lora")["rows"]
    assert rows[0]["kl"] == 0.0
    for name in ("kl", "reward", "gold", "length"):  # the same prompts, seed and weights
        assert rows[-1][name] == pytest.approx(front[-1][name], abs=1e-4)


@pytest.mark.parametrize("name", ["model", "merged"])
def test_warp_saves_one_adapter_of_all_runs(lora_warp_run, in_world, name):
    """T49, T63: I·M adapters of rank r add up to one of rank I·M·r = 8, which gives the dense weights of the run."""
    config, _ = read_adapter(lora_warp_run / f"{name}_adapter")
    assert config["r"] == 8
    base, dense = load_weights(toy.POLICY), load_weights(lora_warp_run / name)
    adapted = load_weights(lora_warp_run / f"{name}_adapter")
    for key in base:
        torch.testing.assert_close(adapted[key], dense[key], atol=1e-6, rtol=0)
        if key.endswith("c_attn.weight"):
            singular_values = torch.linalg.svdvals((dense[key] - base[key]).double())
            assert singular_values[8:].max() < 1e-5 < 1e-4 < singular_values[4]  # more than one iteration's rank
        else:
            assert dense[key].equal(base[key])  # neither trained nor merged
            assert adapted[key].equal(base[key])


REINFORCE_METRICS = {
    "step", "reward", "reward_std", "sigma", "kl", "baseline", "advantage", "entropy", "completions/mean_length",
    "completions/clipped_ratio", "grad_norm", "learning_rate",
}  # fmt: skip


def test_reinforce_writes_what_a_run_is(reinforce_run, in_world):
    """run.json, summary.json before and after training, samples, and a model/ that other weights left behind."""
    folder, _ = reinforce_run
    run = json.loads((folder / "run.json").read_text())
    assert run["script"] == "train_reinforce.py" and run["options"]["lr"] == 1e-3 and run["options"]["beta"] == 0.05
    summary = read_summary(folder)
    names = {"reward", "reward_se", "kl", "kl_se", "gold", "gold_se", "fluency", "length", "eos_rate", "distinct_2"}
    for row in (summary["before"], summary["after"]):
        assert names <= set(row)
        assert all(math.isfinite(value) for value in row.values())
    assert [set(sample) for sample in summary["samples"]] == [{"prompt", "before", "after"}] * 3
    base, trained = load_weights(toy.POLICY), load_weights(folder)
    assert all((trained[name] - base[name]).abs().max() > 1e-4 for name in base)
    assert not (folder / "adapter").exists()


@pytest.mark.parametrize("run", ["reinforce_run", "lora_reinforce_run"])
def test_kl_starts_at_exactly_zero(run, request):
    """T5, T50: before training, and at its first step, the policy is its reference to the bit; afterwards it is not."""
    folder, seen = request.getfixturevalue(run)
    summary, metrics = read_summary(folder), read_metrics(folder)
    assert (summary["before"]["kl"], summary["before"]["kl_se"]) == (0.0, 0.0)
    assert summary["after"]["kl"] > 0
    assert [row["kl"] == 0.0 for row in metrics] == [True, False, False]
    assert seen["steps"][0]["kl"] == [0.0] * 8


def test_reinforce_metrics_are_complete(reinforce_run):
    """T16, T52: a line a step with every name, and as many steps of one optimizer; rewards are raw, per answer."""
    folder, seen = reinforce_run
    metrics = read_metrics(folder)
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert seen["calls"]["steps"] == 3 and len(seen["calls"]["optimizers"]) == 1
    assert {int(state["step"]) for state in seen["calls"]["optimizers"][0].adam.state.values()} == {3}
    for row, step in zip(metrics, seen["steps"]):
        assert set(row) == REINFORCE_METRICS
        assert row["reward"] == pytest.approx(sum(step["reward"]) / 8, abs=1e-5)
        deviation = math.sqrt(sum((reward - row["reward"]) ** 2 for reward in step["reward"]) / 8)
        assert row["reward_std"] == pytest.approx(deviation, abs=1e-4)
        assert row["completions/clipped_ratio"] == pytest.approx(1 - sum(step["ended"]) / 8, abs=1e-6)
        assert row["sigma"] == 0.0 and row["entropy"] > 0 and row["completions/mean_length"] >= 1
        assert row["learning_rate"] == 1e-3


@pytest.mark.parametrize("run", ["reinforce_run", "lora_reinforce_run"])
def test_baseline_is_the_mean_of_all_past_shaped_rewards(run, request):
    """T17: b = 0 at first, then the mean of R = r − β kl over all steps before, recomputed from the metrics alone."""
    metrics = read_metrics(request.getfixturevalue(run)[0])
    shaped = [row["reward"] - 0.05 * row["kl"] for row in metrics]
    assert metrics[0]["baseline"] == 0.0
    for i, row in enumerate(metrics):
        assert row["baseline"] == pytest.approx(sum(shaped[:i]) / max(1, i), abs=1e-5)
        assert row["advantage"] == pytest.approx(shaped[i] - row["baseline"], abs=1e-5)


def test_training_prompts_are_not_evaluated_on(reinforce_run, in_world):
    """T26: the 100 prompts of the world are split, 84 to train on and 16 held out; a step's prompts are of the 84."""
    _, seen = reinforce_run
    training, held_out = set(seen["training"]), set(seen["held_out"])
    assert (len(training), len(held_out), training & held_out) == (84, 16, set())
    assert all(set(step["prompts"]) <= training for step in seen["steps"])
    assert len({prompt for step in seen["steps"] for prompt in step["prompts"]}) == 24  # other ones at every step


def test_reinforce_repeats_with_its_seed(reinforce_run, in_world):
    """T51: the same seed gives the same bytes of metrics.jsonl, another seed other ones."""
    folder, _ = reinforce_run
    train_reinforce.main([*SMALL, "--out", "runs/reinforced-again"])
    assert read_metrics("runs/reinforced-again") == read_metrics(folder)
    train_reinforce.main([*SMALL, "--steps", "1", "--seed", "1", "--out", "runs/reinforced-otherwise"])
    first, other = read_metrics(folder)[0], read_metrics("runs/reinforced-otherwise")[0]
    assert first["reward"] != other["reward"] and first["entropy"] != other["entropy"]


def advantages_by_hand(steps, beta, lam=0.0, missing_eos=0.0, weighted=False, k=None):
    """A = (R − b) f(σ) of every answer, where R = r − λσ − p [no EOS] − β kl, from what judge and loop said."""
    past, expected = [], []
    for step in steps:
        columns = [step[name] for name in ("reward", "sigma", "ended", "kl")]
        shaped = [r - lam * s - missing_eos * (not ended) - beta * kl for r, s, ended, kl in zip(*columns)]
        b = [sum(past) / max(1, len(past))] * len(shaped)
        if k:
            groups = [shaped[i - i % k : i - i % k + k] for i in range(len(shaped))]
            b = [(sum(group) - own) / (k - 1) for group, own in zip(groups, shaped)]
        weights = [1 / (1 + s) if weighted else 1.0 for s in step["sigma"]]
        expected.append([(own - mean) * f for own, mean, f in zip(shaped, b, weights)])
        past += shaped
    return expected


ORDINAL = ["--reward-model", toy.ORDINAL_REWARD_MODEL, "--max-length", "24", "--lr", "1e-2"]
ARMS = {
    "advantage": (["--sigma", "advantage", "--missing-eos-penalty", "3"],
                  {"weighted": True, "missing_eos": 3.0}),
    "penalty": (["--sigma", "penalty", "--sigma-coefficient", "0.5", "--beta", "2"], {"lam": 0.5, "beta": 2.0}),
    "leave-one-out": (["--baseline", "leave-one-out", "--num-generations", "4", "--beta", "2"], {"k": 4, "beta": 2.0}),
}  # fmt: skip


@pytest.mark.parametrize("arm", ARMS)
def test_advantages_are_those_of_the_formula(world, arm):
    """T16, T18, T22, T33: σ, KL, a missing EOS and both baselines enter the advantage as documented, and nowhere else.

    The judge's rating, not what is left of it, is what is logged.
    """
    flags, settings = ARMS[arm]
    folder, seen = run_reinforce(world, f"runs/arm-{arm}", *ORDINAL, *flags)
    expected = advantages_by_hand(seen["steps"], **{"beta": 0.05, **settings})
    ended = [end for step in seen["steps"] for end in step["ended"]]
    assert 0 < sum(ended) < len(ended) == 24
    assert all(abs(kl) > 1e-4 for kl in seen["steps"][2]["kl"])
    for row, step, advantage in zip(read_metrics(folder), seen["steps"], expected, strict=True):
        assert min(step["sigma"]) > 0.1
        assert step["advantage"] == pytest.approx(advantage, abs=1e-4)
        assert row["reward"] == pytest.approx(sum(step["reward"]) / 8, abs=1e-4)
        assert row["sigma"] == pytest.approx(sum(step["sigma"]) / 8, abs=1e-4)
        if arm == "leave-one-out":
            assert row["advantage"] == pytest.approx(0.0, abs=1e-5)
            shaped = [reward - 2.0 * kl for reward, kl in zip(step["reward"], step["kl"])]
            assert row["baseline"] == pytest.approx(sum(shaped) / 8, abs=1e-4)
            assert len(step["prompts"]) == 8  # --batch-size counts answers
            assert [len(set(step["prompts"][i : i + 4])) for i in (0, 4)] == [1, 1]
            assert len(set(step["prompts"])) == 2
            assert len(set(step["advantage"][:4])) > 1


def test_only_adapted_weights_move(lora_reinforce_run, in_world):
    """T12, T63: W + ΔW of the adapted modules differ from the base, everything else is its copy bit for bit."""
    folder, _ = lora_reinforce_run
    base, model, adapter = (load_weights(name) for name in (toy.POLICY, folder, folder / "adapter"))
    for name in base:
        torch.testing.assert_close(model[name], adapter[name], atol=1e-7, rtol=0)
        assert model[name].equal(base[name]) != name.endswith("attn.c_attn.weight"), name
    config, tensors = read_adapter(folder / "adapter")
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 32, f"{toy.POLICY}/model")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) and tensors[key].any() for key in tensors)


def test_evaluation_agrees_with_the_run(lora_reinforce_run, in_world):
    """T50: the KL that the run reports against its adapters turned off is the one between the two saved policies."""
    folder, _ = lora_reinforce_run
    policies = [toy.POLICY, str(folder), str(folder / "adapter")]
    evaluate.main(["--policies", *policies, "--num-prompts", "16", "--out", "runs/evaluated-lora"])
    base, model, adapter = read_summary("runs/evaluated-lora")["rows"]
    summary = read_summary(folder)
    for name in ("reward", "kl", "gold", "fluency", "length", "eos_rate"):
        assert base[name] == pytest.approx(summary["before"][name], abs=1e-4)
        assert model[name] == pytest.approx(summary["after"][name], abs=1e-4)
        assert adapter[name] == pytest.approx(model[name], abs=1e-5)


def test_an_adapter_can_be_trained_on(lora_reinforce_run, in_world):
    """T63: --policy takes adapter/, and the second adapter is one on the first, so model/ and adapter/ are the same."""
    folder, _ = lora_reinforce_run
    flags = [*SMALL, "--steps", "1", "--lora-r", "3", "--lora-target-modules", "c_fc"]
    train_reinforce.main([*flags, "--policy", str(folder / "adapter"), "--out", "runs/second"])
    model, adapter, first = (load_weights(name) for name in ("runs/second", "runs/second/adapter", folder))
    for name in model:
        torch.testing.assert_close(adapter[name], model[name], atol=1e-6, rtol=0)
        assert torch.allclose(model[name], first[name], atol=1e-6, rtol=0) != name.endswith("c_fc.weight"), name


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


def test_an_ordinal_reward_model_has_ten_ratings(world, lora_reward_model):
    """T32: the labels are "1" to "10", in this order, so that any tool that reads the model knows what they are."""
    for folder in (world / toy.ORDINAL_REWARD_MODEL, lora_reward_model):
        config = json.loads((folder / "model" / "config.json").read_text())
        assert config["id2label"] == {str(i): str(i + 1) for i in range(10)}
        assert config["label2id"] == {str(i + 1): i for i in range(10)}
        loss = [row["loss"] for row in read_metrics(folder)]
        assert loss[0] == pytest.approx(-math.log(0.45), abs=0.3)  # near what equal ratings have, not ln 2: strict ties


def test_a_reward_model_with_adapters_is_saved_whole(lora_reward_model, in_world):
    """T64: model/ and adapter/, head included, score as the model that was validated, with dropout off."""
    pairs, _ = load_pairs(toy.EVAL_PAIRS)
    options = train_rm.RewardModelOptions(head="ordinal", precision="fp32")
    summary, logits = read_summary(lora_reward_model), []
    for name in ("model", "adapter"):
        judge = load_judge(str(lora_reward_model / name), "cpu")
        rows, _ = train_rm.encode_pairs(pairs, judge.tokenizer, 64)
        metrics = train_rm.evaluate_pairs(judge.model, rows, judge.tokenizer, options)
        assert metrics == pytest.approx({key: summary[key] for key in metrics}, abs=1e-5)
        logits.append(judge.logits([row[0] for row in rows]))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
    assert logits[0].std(0).min() > 1e-3


def test_adapters_and_head_are_all_that_a_reward_model_trains(lora_reward_model, in_world):
    """T64: everything but the adapted matrices and the head is the base's, bit for bit; the head is in the adapter."""
    base = load_weights(toy.POLICY)
    model = dict(load_judge(str(lora_reward_model), "cpu").model.named_parameters())
    assert set(model) - set(base) == {"score.weight"}
    for name in set(model) & set(base):
        assert model[name].equal(base[name]) != name.endswith("attn.c_attn.weight"), name
    config, tensors = read_adapter(lora_reward_model / "adapter")
    assert (config["task_type"], config["modules_to_save"], config["lora_dropout"]) == ("SEQ_CLS", ["score"], 0.1)
    assert tensors["score.weight"].equal(model["score.weight"])


def test_policies_are_compared_at_the_same_kl(reinforce_run, lora_reinforce_run, in_world, capsys):
    """T60, T27: with --match-kl a policy further off is moved back to that KL, a nearer one stays; z of SFT is 0."""
    runs = {str(folder): read_summary(folder)["after"]["kl"] for folder, _ in (reinforce_run, lora_reinforce_run)}
    near, far = sorted(runs, key=runs.get)
    target = (runs[near] + runs[far]) / 2
    flags = ["--num-prompts", "16", "--match-kl", str(target), "--out", "runs/matched"]
    evaluate.main(["--policies", toy.POLICY, near, far, *flags])
    reference, kept, moved = read_summary("runs/matched")["rows"]
    assert (reference["eta"], reference["kl"], reference["reward_z"], reference["gold_z"]) == (1.0, 0.0, 0.0, 0.0)
    assert kept["eta"] == 1.0 and kept["kl"] == pytest.approx(runs[near], abs=1e-4)
    assert 0 < moved["eta"] < 1 and moved["kl"] == pytest.approx(target, rel=0.1)
    error = reference["reward_se"] * math.sqrt(16)
    assert kept["reward_z"] == pytest.approx((kept["reward"] - reference["reward"]) / error)
    assert "| eta |" in Path("runs/matched/table.md").read_text() and "reward_z" in capsys.readouterr().out


def test_a_run_without_a_model_is_not_cached(tmp_path):
    """A run that was interrupted is resumed, a refused reward model is made anew, a finished run is left alone."""
    calls, folder = [], tmp_path / "run"

    def main(argv):
        calls.append(argv)
        (folder / "model").mkdir(parents=True)
        (folder / "summary.json").write_text("{}")

    folder.mkdir()
    (folder / "run.json").write_text("{}")
    toy.ensure_run(str(folder), main)
    shutil.rmtree(folder / "model")
    toy.ensure_run(str(folder), main)
    toy.ensure_run(str(folder), main)
    assert calls == [["--out", str(folder), "--resume"], ["--out", str(folder)]]


def test_every_model_of_the_world_that_is_named_is_made(monkeypatch, tmp_path):
    """Policies, reward models and further judges alike, and the default judges of evaluate.py."""
    made = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "ensure_texts", lambda: made.append("texts"))
    monkeypatch.setattr(toy, "ensure_run", lambda folder, main, flags=(): made.append(Path(folder).name))
    ordinal = ["--judges", f"o={toy.ORDINAL_REWARD_MODEL}"]
    for options_class, argv, names in (
        (train_reinforce.ReinforceOptions, ordinal, ["policy", "reward_model", "ordinal_reward_model"]),
        (train_warp.WarpOptions, ["--policy", "other"], ["policy", "reward_model"]),
        (train_rm.RewardModelOptions, [], ["policy"]),
        (evaluate.EvaluateOptions, ["--policies", toy.POLICY], ["policy", "reward_model"]),
        (evaluate.EvaluateOptions, ["--policies", "other", *ordinal], ["policy", "ordinal_reward_model"]),
    ):
        options = parse_options(options_class, argv)
        train_rm.prepare_inputs(options.files(), options.model_names())
        assert made == ["texts", *names]
        made.clear()


def test_pretraining_makes_the_texts_of_the_world(monkeypatch, tmp_path):
    """On a fresh machine, too, the README's command finds them."""
    monkeypatch.chdir(tmp_path)
    write = toy.write_world
    monkeypatch.setattr(
        toy, "write_world", lambda folder: write(folder, reviews=30, train_pairs=4, eval_pairs=4, prompts=4)
    )
    pretrain.main(["--data", toy.REVIEWS, "--epochs", "1", "--width", "32", "--out", "run"])
    assert Path("run/model").is_dir()


def readme_commands():
    """The python commands in the README's code, blocks and spans; .ci/run has those of pip, pytest and mutants.py."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    code = [line.rpartition("&&")[2].strip() for block in blocks for line in block.splitlines()]
    code += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    return sorted({line for line in code if line.startswith("python ") and "tests/" not in line})


def split_command(command):
    """(module, flags) of `python script.py ...` or `python -m module ...`."""
    _, script, *flags = shlex.split(command, comments=True)
    if script == "-m":
        script, *flags = flags
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")), flags


def parse_flags(module, flags):
    """The options of a script with these flags."""
    classes = [c for c in vars(module).values() if getattr(c, "__module__", "") == module.__name__]
    (options,) = (c for c in classes if c.__name__.endswith("Options"))
    return module.parse_options(options, flags)


SAMPLING = ["--batch-size", "8", "--max-length", "32"]
SMALL_FLAGS = {
    "train_warp": [*SAMPLING, "--steps", "1", "--num-eval-prompts", "8", "--iterations", "1"],
    "train_reinforce": [*SAMPLING, "--steps", "1", "--num-eval-prompts", "8"],
    "train_rm": ["--epochs", "1", "--accept-weak"],
    "evaluate": [*SAMPLING, "--num-prompts", "8"],
    "rlhf_min.pretrain": ["--epochs", "1"],
}


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands(command, request, in_world):
    """Every command of the README runs, at toy size; benchmarks and what is for real data only have to be readable."""
    (in_world / "configs").exists() or (in_world / "configs").symlink_to(ROOT / "configs")
    module, flags = split_command(command)
    if "--config" in flags or module.__name__.startswith("benchmarks."):
        assert not parse_flags(module, flags).out.startswith("-")
        return
    for i, flag in enumerate(flags):
        if re.search(r"runs/(warp|reinforce|rm)-\d", flag):
            fixture = "lora_reinforce_run" if "runs/reinforce" in flag else "warp_run"
            fixture = "lora_warp_run" if "_adapter" in flag else "lora_reward_model" if "runs/rm" in flag else fixture
            run = request.getfixturevalue(fixture)
            flags[i] = re.sub(r"runs/\w+-\d", str(run[0] if isinstance(run, tuple) else run), flag)
    name = re.sub(r"\W+", "-", command)
    if "--out" in flags:
        flags[flags.index("--out") + 1] = f"runs/{name}"
    else:
        flags += ["--out", f"runs/{name}"]
    module.main([*flags, *SMALL_FLAGS[module.__name__]])
    assert (in_world / "runs" / name / "summary.json").exists()


def documented_commands():
    """The commands of scripts and modules in docs/ and in docstrings: indented lines, and spans of code."""
    found = []
    for path in sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        found += re.findall(r"^ {4}(python .*)$", text, re.MULTILINE) + re.findall(r"`(python [^`\n]+)`", text)
    return sorted({command for command in found if "tests/" not in command and "-m pytest" not in command})


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_are_readable(command, monkeypatch):
    """T59: every command in docs/ and in a script's docstring has flags and configuration keys that there are."""
    monkeypatch.chdir(ROOT)
    parse_flags(*split_command(command))
