"""The benchmarks: their figures against hand-made ones, and each of them from end to end in miniature."""

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, GPT2ForSequenceClassification

import train_reinforce
from benchmarks import baselines, growth, levels, precisions, reward_models, small_smollm2, soak, speed
from benchmarks.baselines import BaselineOptions, measure_gradients, variance_table
from benchmarks.levels import LevelOptions, arm_settings, over_seeds
from benchmarks.reward_models import calibration_error, load_rated_pairs, measure, spearman
from rlhf_min import toy
from rlhf_min.data import Pair, Prompt, write_jsonl
from rlhf_min.models import get_weights, load_policy
from rlhf_min.parallel import ALONE
from rlhf_min.reward_model import encode_answer

QUIET = SimpleNamespace(
    team=ALONE, progress=lambda title, steps, state=None: range(1, steps + 1), step=lambda show, **line: None
)
TEXTS = ("I", "The", "The film", "The film was")


def prompts(tokenizer):
    return [Prompt(tokenizer(text)["input_ids"], text) for text in TEXTS]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("module", [baselines, growth, levels, precisions, reward_models, small_smollm2, soak, speed])
def test_a_benchmark_is_one_process(module, monkeypatch, capsys):
    """torchrun is refused, also by those whose options come from a script that it may start."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match="2"):
        module.main([])
    assert "start it without torchrun" in capsys.readouterr().err


# reward_models.py


def test_spearman_by_hand():
    """Ranks 1, 2½, 2½, 4 against 1, 3, 2, 4: deviations from 2½ give 4.5 / √(4.5 · 5)."""
    a, b = tensor(1, 2, 2, 9), tensor(-5, 0.3, 0.2, 0.4)
    assert spearman(a, b) == pytest.approx(4.5 / math.sqrt(22.5))
    assert spearman(b, a) == pytest.approx(spearman(a, b))
    assert spearman(a.exp(), b) == pytest.approx(spearman(a, b))  # only the order counts
    assert spearman(-a, b) == pytest.approx(-spearman(a, b))
    assert spearman(a, a) == pytest.approx(1.0)


def test_spearman_of_independent_values_is_near_zero():
    """In 2,000 pairs the correlation of what has nothing to do with each other is 0 ± 1/√2,000."""
    a, b = torch.randn(2, 2000, dtype=torch.float64)
    assert abs(spearman(a, b)) < 4 / math.sqrt(2000)
    assert spearman(a, a + b) == pytest.approx(6 / math.pi * math.asin(1 / math.sqrt(2) / 2), abs=0.06)  # of a Gaussian


def test_calibration_error_by_hand():
    """Two bins: |.6 − ½| with weight 2/5, |.867 − 1| with 3/5, together .12; P < ½ is a wrong answer of 1 − P."""
    assert calibration_error(tensor(0.6, 0.4, 0.9, 0.9, 0.8), bins=2) == pytest.approx(0.12)


def test_calibration_error_at_the_ends():
    """P = 1 belongs to the last bin, P = ½ to the first, where it is an error, as a tie is in the accuracy."""
    assert calibration_error(tensor(1.0, 1.0)) == 0.0
    assert calibration_error(tensor(0.0)) == 1.0
    assert calibration_error(tensor(0.5)) == 0.5
    assert calibration_error(tensor(0.5, 0.5, 1.0, 1.0)) == pytest.approx(0.25)


def test_calibration_error_of_a_calibrated_judge():
    """Who is right as often as they say has an error near 0; overconfidence shows, though the accuracy is the same."""
    p = 0.5 + 0.5 * torch.rand(20_000, dtype=torch.float64)
    p = torch.where(torch.rand(20_000) < p, p, 1 - p)  # the first is better with probability p
    assert calibration_error(p) < 0.02
    sharp = torch.sigmoid(4 * torch.logit(p))
    assert calibration_error(sharp) > 0.1


def tiny_judge(tokenizer, logits):
    """A judge that gives the answer with this text these logits."""
    table = {tuple(encode_answer(tokenizer, "The film", answer)): row for answer, row in logits.items()}
    return SimpleNamespace(
        tokenizer=tokenizer, max_length=64, logits=lambda rows: torch.tensor([table[tuple(row)] for row in rows])
    )


def test_a_scalar_reward_model_is_measured(tiny_tokenizer):
    """r = 2, 1, 0 of a, b, c: b over c is right, P = σ(1); c over a is wrong, σ(−2); a tie with d is an error at ½."""
    judge = tiny_judge(tiny_tokenizer, {"a": [2.0], "b": [1.0], "c": [0.0], "d": [0.0]})
    pairs = [Pair("The film", "b", "c"), Pair("The film", "c", "a"), Pair("The film", "d", "c")]
    row = measure(judge, pairs, [(9, 3), (4, 7), (6, 5)])
    p = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2)), 0.5]
    assert (row["pairs"], row["accuracy"]) == (3, pytest.approx(1 / 3))
    assert row["accuracy_se"] == pytest.approx(math.sqrt(2 / 3 / 2 / 3))  # Σ (x − ⅓)² = ⅔, over N − 1, over N
    nll = [-math.log(value) for value in p]
    assert row["nll"] == pytest.approx(sum(nll) / 3, rel=1e-5)
    assert row["calibration_error"] == pytest.approx(((1 - p[0]) + (1 - p[1]) + 0.5) / 3, rel=1e-5)
    # chosen, then rejected: rewards 1 0 0 0 2 0 have ranks 5 2½ 2½ 2½ 6 2½; ratings 9 4 6 3 7 5 have ranks 6 2 4 1 5 3
    assert row["spearman"] == pytest.approx(spearman(tensor(5, 2.5, 2.5, 2.5, 6, 2.5), tensor(6, 2, 4, 1, 5, 3)))
    assert not {"sigma", "tie_mass", "sigma_error_correlation"} & set(row)
    assert "spearman" not in measure(judge, pairs, None)


def one_hot(*ratings):
    """Logits of a head that gives these ratings equal probability."""
    return [0.0 if k in ratings else -1e4 for k in range(1, 11)]


def test_an_ordinal_reward_model_is_measured(tiny_tokenizer):
    """T29, T32: E, σ, tie mass and P(i > j) + ½ P(i = j) of ratings that are certain, or two with ½ each, by hand."""
    ratings = {"a": one_hot(9), "b": one_hot(4, 8), "c": one_hot(4), "d": one_hot(2, 6)}  # σ = 0, 2, 0, 2
    pairs = [Pair("The film", "a", "b"), Pair("The film", "b", "c"), Pair("The film", "c", "d")]
    row = measure(tiny_judge(tiny_tokenizer, ratings), pairs, [(9, 6), (5, 4), (4, 2)])
    # a > b surely; b > c half the time, else a tie: ¾; c > d half the time; E_c = E_d = 4, a tie, which is an error
    assert row["accuracy"] == pytest.approx(2 / 3)
    assert row["nll"] == pytest.approx(-(math.log(1) + math.log(0.75) + math.log(0.5)) / 3, abs=1e-6)
    assert row["calibration_error"] == pytest.approx((0 + 0.25 + 0.5) / 3, abs=1e-6)
    assert row["tie_mass"] == pytest.approx((0 + 0.5 + 0) / 3)
    assert row["sigma"] == pytest.approx((0 + 2 + 0 + 2 + 0 + 2) / 6)
    # E of a b c, b c d is 9 6 4, 6 4 4 with mean 5.5, the ratings 9 5 4, 6 4 2 with mean 5; sums of squares 19.5 and 28
    e, rating = (tensor(9, 6, 4, 6, 4, 4) - 5.5) / 19.5**0.5, (tensor(9, 5, 4, 6, 4, 2) - 5) / 28**0.5
    assert row["sigma_error_correlation"] == pytest.approx(spearman(tensor(0, 2, 0, 2, 0, 2), (e - rating).abs()))
    assert row["spearman"] == pytest.approx(spearman(tensor(9, 6, 4, 6, 4, 4), tensor(9, 5, 4, 6, 4, 2)))


def test_a_pair_that_is_too_long_takes_its_ratings_along(tiny_tokenizer):
    """What is left out of the pairs is left out of the ratings, too; they would be shifted against each other."""
    judge = tiny_judge(tiny_tokenizer, {"a": [3.0], "b": [1.0], "c": [2.0], "d": [0.0]})
    pairs = [Pair("The film", "a", "b"), Pair("The film", "x" * 99, "b"), Pair("The film", "c", "d")]
    row = measure(judge, pairs, [(9, 2), (1, 10), (5, 1)])
    assert (row["pairs"], row["spearman"]) == (2, pytest.approx(1.0))


def test_ratings_are_read_where_the_data_have_them(in_world, tmp_path):
    """The world's pairs have stars; of pairs in which one has none there is no rank agreement."""
    pairs, ratings = load_rated_pairs(toy.EVAL_PAIRS)
    assert len(pairs) == len(ratings) == 50
    assert sum(chosen > rejected for chosen, rejected in ratings) >= 40  # one in twenty is the wrong way round
    rated = {"chosen": "a", "rejected": "b", "chosen_rating": 3, "rejected_rating": 1}
    write_jsonl(tmp_path / "mixed.jsonl", [rated, {"chosen": "a", "rejected": "b"}])
    assert load_rated_pairs(str(tmp_path / "mixed.jsonl"))[1] is None


def test_reward_models_from_end_to_end(in_world, capsys):
    """Both heads of the world: a row each, and what train_rm.py said of them when it validated on the same pairs."""
    reward_models.main(["--out", "runs/quality"])
    scalar, ordinal = json.loads(Path("runs/quality/summary.json").read_text())["rows"]
    for row in (scalar, ordinal):
        summary = json.loads(Path(row["reward_model"], "summary.json").read_text())
        assert row["pairs"] == 50
        assert row["accuracy"] == pytest.approx(summary["eval_accuracy"], abs=1e-6)
        assert 0 <= row["calibration_error"] <= 0.5 and -1 <= row["spearman"] <= 1
    assert 0 < ordinal["tie_mass"] < 0.5 and 0 < ordinal["sigma"] < 4.5 and "sigma" not in scalar
    table = Path("runs/quality/table.md").read_text()
    assert table.splitlines()[0].endswith("| sigma_error_correlation |") and table in capsys.readouterr().out


# levels.py


def test_over_seeds_by_hand():
    """Of 1, 3, 8 the mean is 4 and the standard error √(26/2/3); one seed has no error, NaN stays NaN."""
    row = over_seeds([{"a": 1, "b": math.nan}, {"a": 3, "b": 1.0}, {"a": 8, "b": 2.0}])
    assert (row["a"], row["a_se"]) == (4.0, pytest.approx(math.sqrt(13 / 3)))
    assert math.isnan(row["b"])
    alone = over_seeds([{"a": 2.0}])
    assert alone["a"] == 2.0 and math.isnan(alone["a_se"])


def test_errors_are_those_over_seeds():
    """A row that has errors of its own, as measure's rows do: behind ± is the error over seeds nevertheless."""
    row = over_seeds([{"accuracy": 0.5, "accuracy_se": 0.07}, {"accuracy": 0.7, "accuracy_se": 0.07}])
    assert row["accuracy_se"] == pytest.approx(0.1)
    assert set(row) == {"accuracy", "accuracy_se"}


def doubting_judge(texts, completions, ended):
    """A reward and a σ that differ from answer to answer."""
    lengths = torch.tensor([float(len(completion)) for completion in completions])
    return 3 + lengths.sin(), 1 + lengths.cos().abs()


def test_settings_of_the_arms():
    """T33: σ comes in by --sigma for two arms, by the reward for two others; λ and β are those of the options."""
    options, answers = LevelOptions(beta=0.25), (["x"] * 3, ["a", "bb", "ccc"], torch.ones(3))
    reward, sigma = doubting_judge(*answers)
    f = 1 / (1 + sigma)
    for arm in ("off", "advantage", "penalty"):
        assert arm_settings(arm, doubting_judge, answers, options) == (
            doubting_judge, "off" if arm == "off" else arm, 0.25)  # fmt: skip
    judge, kind, beta = arm_settings("constant", doubting_judge, answers, options)
    assert (kind, beta) == ("off", pytest.approx(0.25 * f.mean().item()))
    torch.testing.assert_close(judge(*answers), (f.mean() * reward, sigma))
    judge, kind, beta = arm_settings("shrunk", doubting_judge, answers, options)
    assert (kind, beta) == ("off", 0.25)
    torch.testing.assert_close(judge(*answers), (f.mean() * reward, sigma))
    judge, kind, beta = arm_settings("folded", doubting_judge, answers, options)
    assert (kind, beta) == ("off", 0.25)
    torch.testing.assert_close(judge(*answers), (reward * f, sigma))


def advantages(policy, tokenizer, judge, options, monkeypatch):
    """Advantages and answers of four steps at a policy that stands still, whose reference is another one."""
    seen, answers, loss = [], [], train_reinforce.policy_gradient_loss
    monkeypatch.setattr(train_reinforce, "policy_gradient_loss", lambda logprobs, advantage, mask: (
        seen.append(advantage) or loss(logprobs, advantage, mask)))  # fmt: skip

    def watched(texts, completions, ended):
        answers.append(completions)
        return judge(texts, completions, ended)

    sft = {name: 1.1 * weight for name, weight in get_weights(policy).items()}
    train_reinforce.train_policy(policy, tokenizer, watched, prompts(tokenizer), sft, options, QUIET)
    monkeypatch.undo()
    return torch.cat(seen), answers


def test_the_constant_arm_is_a_smaller_step_and_nothing_else(tiny_policy, tiny_tokenizer, monkeypatch):
    """T33: with the same answers its advantage is mean f times that without σ: reward, KL, baseline, all of it."""
    options = LevelOptions(steps=4, lr=0.0, beta=0.5, batch_size=8, max_length=16, precision="fp32")
    plain, answers = advantages(tiny_policy, tiny_tokenizer, doubting_judge, options, monkeypatch)
    sample = (TEXTS, ["a", "bb", "ccc", "dddd"], torch.ones(4))
    f = (1 / (1 + doubting_judge(*sample)[1])).mean().item()
    judge, options.sigma, options.beta = arm_settings("constant", doubting_judge, sample, options)
    scaled, same_answers = advantages(tiny_policy, tiny_tokenizer, judge, options, monkeypatch)
    assert same_answers == answers
    torch.testing.assert_close(scaled, f * plain, atol=1e-5, rtol=1e-4)


LEVELS = ["--seeds", "1", "--steps", "2", "--batch-size", "8", "--num-eval-prompts", "4", "--max-length", "24",
          "--match-kl", "5"]  # fmt: skip


def test_levels_from_end_to_end(in_world, monkeypatch):
    """Three reward models and thirteen arms: every arm at the end and at matched KL, from the same start."""
    train_rm_main = levels.train_rm.main
    quickly = lambda flags: train_rm_main([*flags, "--epochs", "1", "--accept-weak"])
    monkeypatch.setattr(levels.train_rm, "main", quickly)
    levels.main([*LEVELS, "--lr", "1e-3", "--out", "runs/levels-tested"])
    for head in ("scalar", "strict", "half"):
        run = json.loads(Path(f"runs/levels-tested/{head}1/run.json").read_text())["options"]
        assert (run["head"], run["ties"]) == (
            "scalar" if head == "scalar" else "ordinal",
            head.replace("scalar", "strict"),
        )
        assert run["seed"] == 1
    summary = json.loads(Path("runs/levels-tested/summary.json").read_text())
    arms = ["scalar, off", *(f"{head}, {arm}" for head in ("strict", "half") for arm in levels.ARMS)]
    assert [row["head"] for row in summary["reward models"]] == ["scalar", "strict", "half"]
    assert [row["arm"] for row in summary["end"]] == [row["arm"] for row in summary["matched"]] == arms
    for end, matched in zip(summary["end"], summary["matched"]):
        assert end["eta"] == 1.0 and 0 < end["kl"] < 5
        assert matched == end  # all are nearer than 5 nats
        assert 0 <= end["win_rate_sft"] <= 1 and math.isfinite(end["gold"])
        if end["arm"].endswith(", off"):
            assert end["gold_minus_off"] == 0.0
    assert summary["end"][0]["win_rate_level_1"] == 0.5  # against itself
    metrics = [json.loads(line) for line in Path("runs/levels-tested/metrics.jsonl").read_text().splitlines()]
    first = [row for row in metrics if row["step"] == 1]
    assert len(first) == len(arms) == 13 and len(metrics) == 26
    assert all(row["kl"] == 0.0 and row["baseline"] == 0.0 for row in first)  # T35: every arm starts at π_sft
    assert len({row["entropy"] for row in first}) == 1
    assert len({row["reward"] for row in first}) == 7  # the strict and half judges' ratings: raw, scaled, folded


# baselines.py


def test_variance_table_by_hand():
    """Variance relative to none, its prediction from level and spread, and the cosine to the reference gradient.

    ±3, ±1 and 2 ± 2 along one axis have variances 9, 1 and 4; predicted are 9 + 1 + 2 = 12, 1 + 2 and 2 · 2.
    """
    gradients = {"none": [[3, 0], [-3, 0]], "mean of the past": [[1, 1], [-1, 1]], "RLOO, k = 2": [[4, 0], [0, 0]],
                 "RLOO, k = 4": [[1, 1], [1, 1]]}  # fmt: skip
    gradients = {name: torch.tensor(rows * 2).float() for name, rows in gradients.items()}
    spread = {"level": -3.0, "between prompts": 1.0, "within prompts": 2.0}
    rows = {row["baseline"]: row for row in variance_table(gradients, torch.tensor([2.0, 0.0]), spread)}
    none, past, rloo, four = (rows[name] for name in gradients)
    assert [row["variance"] for row in (none, past, rloo, four)] == pytest.approx([1, 1 / 9, 4 / 9, 0])
    assert [row["variance_se"] for row in (none, past, rloo, four)] == pytest.approx([0, 0, 0, 0])
    assert [row["predicted"] for row in (none, past, rloo, four)] == pytest.approx([1, 3 / 12, 4 / 12, 8 / 3 / 12])
    assert (none["cosine"], past["cosine"], four["cosine"]) == (0.0, 0.0, pytest.approx(math.sqrt(0.5)))
    assert past["cosine_se"] == pytest.approx(math.sqrt(4 / 3 * 0.5 / 4))  # ±√½, four times: variance ½ · 4/3
    assert past["cosine of the mean"] == 0.0 and rloo["cosine of the mean"] == pytest.approx(1.0)


def test_the_error_of_a_variance():
    """Squares 1, 9, 1, 9 around a mean of 5 have the standard error √(16 · 4/3 / 4) = 4/√3, relative to 5."""
    rows = torch.tensor([[1.0, 0], [3, 0], [-1, 0], [-3, 0]])
    (row,) = variance_table({"none": rows}, torch.ones(2), {"level": 1.0, "between prompts": 0, "within prompts": 0})
    assert (row["variance"], row["variance_se"]) == (1.0, pytest.approx(4 / math.sqrt(3) / 5))


def gradients_of(policy, tokenizer, reward):
    """measure_gradients with this reward of a prompt and an answer, on four prompts of different lengths."""
    options = BaselineOptions(sequences=8, batches=3, past=2, reference_sequences=64, max_length=12, temperature=1.0)

    def judge(texts, completions, ended):
        values = [float(reward(*pair)) for pair in zip(texts, completions)]
        return torch.tensor(values), torch.zeros(len(values))

    return measure_gradients(policy, tokenizer, judge, prompts(tokenizer), options, QUIET)


def test_gradients_of_all_baselines(tiny_policy, tiny_tokenizer):
    """All seven at each batch; with k = 8, leaving one's own answer out is 8/7 of taking the mean of all."""
    gradients, reference, spread = gradients_of(tiny_policy, tiny_tokenizer, lambda _, answer: answer.count("e"))
    n = sum(parameter.numel() for parameter in tiny_policy.parameters())
    assert len(gradients) == 7 and all(rows.shape == (3, n) for rows in gradients.values())
    assert reference.shape == (n,) and reference.norm() > 0
    one_out, mean = gradients["leave-one-out over the batch"], gradients["mean of the batch, self-included"]
    torch.testing.assert_close(one_out, 8 / 7 * mean)
    assert not torch.allclose(gradients["mean of the past"], gradients["EMA of the past"])
    assert spread["level"] > 0 and spread["within prompts"] > 0


def test_gradients_of_a_reward_that_never_varies(tiny_policy, tiny_tokenizer):
    """A baseline takes the level away: nothing is left of a constant reward, except without one."""
    gradients, reference, spread = gradients_of(tiny_policy, tiny_tokenizer, lambda *_: 3)
    assert gradients.pop("none").norm(dim=-1).min() > 1e-3
    assert all(rows.abs().max() < 1e-4 for rows in gradients.values())
    assert reference.abs().max() < 1e-4
    assert spread == {"level": 3.0, "between prompts": 0.0, "within prompts": 0.0}


def test_gradients_of_a_reward_of_the_prompt(tiny_policy, tiny_tokenizer):
    """T18: what a prompt is worth stays in the moving average's gradient, and never enters RLOO's."""
    gradients, _, spread = gradients_of(tiny_policy, tiny_tokenizer, lambda text, _: len(text))
    assert all(gradients[f"RLOO, k = {k}"].abs().max() < 1e-4 for k in (2, 4))
    assert gradients["mean of the past"].norm(dim=-1).min() > 1e-3
    assert spread["within prompts"] == 0.0 and spread["between prompts"] > 1


BASELINES = ["--sequences", "8", "--batches", "2", "--past", "1", "--reference-sequences", "64", "--steps", "2",
             "--batch-size", "8", "--num-eval-prompts", "8", "--max-length", "24"]  # fmt: skip


def test_baselines_from_end_to_end(in_world):
    """Seven variances, and four ways to train from π_sft with the same number of answers, two seeds each."""
    baselines.main([*BASELINES, "--seeds", "2", "--out", "runs/baselines-tested"])
    summary = json.loads(Path("runs/baselines-tested/summary.json").read_text())
    assert [row["variance"] for row in summary["variance"] if row["baseline"] == "none"] == [pytest.approx(1.0)]
    assert len(summary["variance"]) == 7 and len(summary["training"]) == 4
    metrics = [json.loads(line) for line in Path("runs/baselines-tested/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2] * 8
    first = metrics[::2]
    assert all(row["kl"] == 0.0 for row in first)  # all from π_sft
    assert [row["baseline"] == 0.0 for row in first] == [True] * 2 + [False] * 4 + [True] * 2
    for i, row in enumerate(summary["training"]):
        rewards = [sum(line["reward"] for line in metrics[4 * i + j : 4 * i + j + 2]) / 2 for j in (0, 2)]
        assert row["reward over training"] == pytest.approx(sum(rewards) / 2)
        assert row["reward over training_se"] == pytest.approx(abs(rewards[0] - rewards[1]) / 2)
        assert row["kl"] > 0 and {"reward", "gold", "fluency", "gold_se"} <= set(row)
    assert abs(metrics[4]["advantage"]) < 1e-5 < abs(metrics[0]["advantage"])  # RLOO's adds up to 0
    table = Path("runs/baselines-tested/table.md").read_text()
    assert "| RLOO, k = 4 |" in table and "variance of the reward: level" in table


# small_smollm2.py


@pytest.fixture
def conversations(in_world, tmp_path):
    """--tokenizer and --data for small_smollm2: the world's tokenizer with a chat template, and 12 short dialogues."""
    tokenizer = AutoTokenizer.from_pretrained(Path(toy.POLICY, "model"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    turn = lambda role, content: [{"role": role, "content": content}]
    rows = [{"prompt": turn("user", f"How was film {i}?"), "chosen": turn("assistant", "I loved every minute."),
             "rejected": turn("assistant", "Bad.")} for i in range(12)]  # fmt: skip
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    return ["--tokenizer", str(tmp_path / "tokenizer"), "--data", str(tmp_path / "pairs.jsonl")]


def test_a_small_llama_from_end_to_end(conversations, tmp_path):
    """A Llama with tied embeddings and shared keys that a policy can be loaded from; it has learned something."""
    flags = ["--layers", "1", "--heads", "2", "--epochs", "4", "--batch-size", "4", "--max-length", "64"]
    small_smollm2.main([*conversations, *flags, "--out", str(tmp_path / "run")])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 12 and losses[-1] < losses[0]
    policy, tokenizer = load_policy(str(tmp_path / "run"), "cpu", 64)
    assert policy.config.model_type == "llama" and policy.config.num_key_value_heads == 1
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    assert tokenizer.chat_template


# mistakes

BAD = {
    "missing reward model": (reward_models, ["--reward-models", "nowhere"], "nowhere: no such folder"),
    "missing pairs": (reward_models, ["--data", "none.jsonl"], "none.jsonl: no such file"),
    "policy as reward model": (reward_models, ["--reward-models", toy.POLICY], "no sequence classifier"),
    "missing prompts": (baselines, ["--prompts", "none.jsonl"], "none.jsonl: no such file"),
    "one batch": (baselines, ["--batches", "1"], "--batches must be at least 2"),
    "another policy": (levels, ["--policy", "nowhere"], "--policy: the comparison sets it itself"),
    "unknown arm": (levels, ["--arms", "off", "weight"], "--arms"),
    "arms that nothing is compared with": (levels, ["--arms", "advantage"], "--arms are off, and then"),
    "adapters of the arms": (levels, ["--lora-r", "2"], "--lora-r"),
    "penalty of the arms": (levels, ["--missing-eos-penalty", "1"], "--missing-eos-penalty"),
    "adapters of the baselines": (baselines, ["--lora-r", "2"], "--lora-r"),
    "no seed": (levels, ["--seeds", "0"], "--seeds must be at least 1"),
    "no KL": (levels, ["--match-kl", "0"], "--match-kl must be at least 0.01"),
    "missing conversations": (
        small_smollm2,
        ["--tokenizer", f"{toy.POLICY}/model", "--data", "none.jsonl"],
        "none.jsonl: no such file",
    ),
    "function as reward model": (reward_models, ["--reward-models", "rlhf_min.toy.gold_judge"], "gold_judge"),
    "all pairs too long": (reward_models, ["--max-length", "8"], "--max-length"),
    "half a rating": (reward_models, ["--data", "half.jsonl"], "rejected_rating"),
    "answers that k does not divide": (baselines, [*BASELINES, "--seeds", "1", "--batch-size", "10"], "--batch-size"),
    "batch that k does not divide": (baselines, [*BASELINES, "--seeds", "0", "--sequences", "10"], "--sequences"),
    "missing tokenizer": (small_smollm2, ["--data", toy.EVAL_PAIRS, "--tokenizer", "nowhere"], "nowhere"),
}
CASES = [pytest.param(*case, id=name) for name, case in BAD.items()]


@pytest.mark.parametrize("module, flags, fragment", CASES)
def test_a_mistake_is_one_line(in_world, capsys, tmp_path, module, flags, fragment):
    """T59, T69: exit code 2, one line with what to mend, and no folder."""
    write_jsonl("half.jsonl", [{"prompt": "x", "chosen": "a", "rejected": "b", "chosen_rating": 3}])
    with pytest.raises(SystemExit) as stop:
        module.main([*flags, "--out", str(tmp_path / "out")])
    (line,) = (line for line in capsys.readouterr().err.split("\n") if line.strip())
    assert stop.value.code == 2 and line.startswith("error: ") and fragment in line
    assert not (tmp_path / "out").exists()


# speed.py, growth.py, precisions.py


def test_weights_that_a_token_is_multiplied_with():
    """By hand: a block of width d has 12 d² (q, k, v, output: 4; two of 4 d²: 8), the tied head V d; no embedding."""
    shape = {"n_layer": 3, "n_embd": 8, "n_head": 2, "vocab_size": 50}
    assert speed.matrix_weights(speed.gpt2(shape)) == 3 * 12 * 64 + 50 * 8
    judge = speed.gpt2(shape, GPT2ForSequenceClassification, num_labels=1)
    assert speed.matrix_weights(judge) == 3 * 12 * 64 + 8


def test_floor_of_sampling_by_hand():
    """Two tokens of a prompt of 10: 12 · B products of the weights, or weights and cache read twice."""
    shape = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 50}
    row, weights = speed.Sampling(lambda: speed.gpt2(shape), 4, answer=2), 12 * 64 + 400
    fast = SimpleNamespace(flops=1.0, bandwidth=1e30, bytes=4)
    assert row.floor(fast) == 2 * 4 * 12 * weights
    slow = SimpleNamespace(flops=1e30, bandwidth=1.0, bytes=2)  # a token's keys and values are 2 · 8 numbers
    assert row.floor(slow) == 2 * (2 * weights + 4 * 16 * (10 + 11))


def test_a_worker_takes_turns(monkeypatch, capsys):
    """It is ready, takes a turn for each line, says how long it took, and ends where the line is closed."""
    answers, done = iter(["go\n", "go\n", ""]), []
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(readline=lambda: next(answers)))
    with pytest.raises(SystemExit):
        speed.Turns(SimpleNamespace(device="cpu")).take(lambda: done.append(time.sleep(0.01)))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(done) == 2
    assert [line["seconds"] is None for line in lines] == [True, False, False]
    assert all(line["seconds"] >= 0.01 for line in lines[1:])


def test_speed_of_a_row(monkeypatch, tmp_path, capsys):
    """The ratio is the median of peer ÷ ours over the turns that count, the memory the largest that was told."""
    seconds = {"ours": iter([9, 9, 1, 2, 4]), "theirs": iter([9, 9, 3, 4, 4])}

    class Fake:
        def __init__(self, name, side, options):
            self.turn = lambda: {"seconds": float(next(seconds[side])), "mib": 7.4 if side == "ours" else 9.0}
            self.close = lambda: None

    row = SimpleNamespace(peer="somebody", build=lambda folder: None, floor=lambda machine: 0.5)
    monkeypatch.setattr(speed, "Worker", Fake)
    monkeypatch.setitem(speed.ROWS, "fake", row)
    monkeypatch.setattr(speed, "measure_machine", lambda options: SimpleNamespace(flops=1e9, bandwidth=1e9))
    speed.main(
        ["--rows", "fake", "--repeats", "3", "--threads", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    )
    (found,) = json.loads((tmp_path / "run/summary.json").read_text())["rows"]
    assert found["peer ÷ ours"] == "2.000 (1.000 to 3.000)"
    assert (found["ours, s"], found["ours ÷ floor"]) == ("2.000 (1.000 to 4.000)", 4.0)
    assert (found["ours, MiB"], found["peer, MiB"]) == (7, 9)
    with pytest.raises(SystemExit, match="2"):
        speed.main(["--rows", "nothing", "--out", str(tmp_path / "other")])
    assert "there is no such row" in capsys.readouterr().err


def test_growth_from_end_to_end(monkeypatch, tmp_path):
    """A row per factor and value; the exponent is that of the two lines."""
    monkeypatch.setattr(growth, "FACTORS", {"batch": [2, 4], "M": [1, 2]})
    monkeypatch.setattr(growth, "MIDDLE", {"batch": 2, "answer": 2, "width": 32})
    flags = ["--repeats", "1", "--threads", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    growth.main(flags)
    rows = json.loads((tmp_path / "run/summary.json").read_text())["rows"]
    assert [(row["factor"], row["value"]) for row in rows] == [("batch", 2), ("batch", 4), ("M", 1), ("M", 2)]
    assert rows[1]["power"] == pytest.approx(math.log2(rows[1]["seconds"] / rows[0]["seconds"]))
    assert rows[2]["power"] is None


def test_precisions_from_end_to_end(in_world, monkeypatch):
    """A run for each precision, and their rewards beside each other."""
    monkeypatch.setattr(precisions, "PRECISIONS", ("fp32", "bf16"))
    flags = "--steps 2 --num-eval-prompts 4 --batch-size 4 --max-length 14 --device cpu --out runs/precisions"
    precisions.main(flags.split())
    rows = json.loads(Path("runs/precisions/summary.json").read_text())["rows"]
    assert [row["precision"] for row in rows] == ["fp32", "bf16"]
    assert all(math.isfinite(row["held-out reward"]) and row["skipped steps"] == 0 for row in rows)
    assert json.loads(Path("runs/precisions/bf16/run.json").read_text())["options"]["precision"] == "bf16"
