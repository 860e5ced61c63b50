"""Judging policies on held-out prompts, and the statistics of it."""

import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from rlhf_min.data import Prompt, encode_prompt
from rlhf_min.evaluation import (
    Task,
    distinct_2,
    format_table,
    judge_policy,
    match_kl,
    mean_se,
    paired_difference,
    print_samples,
    summarise,
    sweep_front,
    win_rate,
    z_score,
)
from rlhf_min.lora import add_lora, lora_layers
from rlhf_min.reward_model import RewardFunction, WeightedSum
from rlhf_min.support.errors import UserError
from rlhf_min.support.models import get_weights, set_weights
from rlhf_min.warp import interpolate

CPU = torch.device("cpu")
TEXTS = ["The film", "The plot", "What a", "I", "The cast was", "It"]


def letters(prompts, completions, **columns):
    """A reward: the share of the letter e among an answer's characters."""
    return [completion.count("e") / max(1, len(completion)) for completion in completions]


def words(prompts, completions, **columns):
    """Another one: the answer's length in characters."""
    return [float(len(completion)) for completion in completions]


JUDGES = {"letters": RewardFunction(letters, "letters", CPU), "words": RewardFunction(words, "words", CPU)}


def options(seed=0, **changes):
    defaults = {"temperature": 0.7, "max_length": 16, "batch_size": 10, "precision": "fp32", "seed": seed}
    return SimpleNamespace(**defaults | changes)


def prompts(tokenizer, count=18):
    return [Prompt(encode_prompt(tokenizer, TEXTS[i % 6]), TEXTS[i % 6]) for i in range(count)]


def perturbed(weights):
    """Other weights, at a distance."""
    generator = torch.Generator().manual_seed(1)
    return {name: w + 0.1 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}


def equal(weights, others):
    """Whether two dictionaries of tensors are the same, bit for bit."""
    return weights.keys() == others.keys() and all(torch.equal(w, others[name]) for name, w in weights.items())


# Statistics


def test_mean_and_standard_error_by_hand():
    """Of 1, 2, 3, 6 the mean is 3, the variance (4+1+0+9)/3 = 14/3, the standard error √(14/12)."""
    assert mean_se([1, 2, 3, 6]) == (3.0, pytest.approx(math.sqrt(14 / 12)))
    assert mean_se([5.0, 5.0]) == (5.0, 0.0)
    assert mean_se([2.0])[0] == 2.0 and math.isnan(mean_se([2.0])[1])  # one value has no error
    assert all(math.isnan(number) for number in mean_se([]))


def test_win_rate_counts_a_tie_half():
    """The win rate is the share of pairs that are won, and a tie is half a win."""
    values = [[1, 2, 3, 4], [2, 3, 4, 5], [0, 1, 2, 3], [1, 2, 4, 3], [9, 9, 3, 4]]
    assert [win_rate(row, [1, 2, 3, 4]) for row in values] == [0.5, 1, 0, 0.5, 0.75]


def test_paired_difference_by_hand():
    """Of eight differences 0 and eight 1 a resample has X ones, X ~ B(16, ½): P(X ≤ 3) = .011, P(X ≤ 4) = .038.

    So the 2.5 % quantile is 4 of 16, and the 97.5 % quantile 12 of 16.
    """
    values, baseline = [4.0] * 8 + [6.0] * 8, [4.0] * 8 + [5.0] * 8
    found = paired_difference(values, baseline, torch.Generator().manual_seed(0))
    assert found == (0.5, 0.25, 0.75)
    assert paired_difference(baseline, values, torch.Generator().manual_seed(0))[0] == -0.5


def test_distinct_2_by_hand():
    """ "a b a b" has the pairs ab, ba, ab, and "a b" another ab: 2 distinct of 4; texts are not joined."""
    assert distinct_2(["a b a b", "a b"]) == 2 / 4
    assert distinct_2(["a b c", "d e"]) == 1.0
    assert distinct_2(["word", ""]) == 0.0


def test_z_score_by_hand():
    """Of 1, 2, 3, 6 the mean is 3 and the deviation √(14/3): a mean of 5 lies 2/√(14/3) above it, one of 2 below.

    The judge's unit and zero do not matter: −7 times the rewards, plus 9, have the deviation 7 √(14/3).
    """
    deviation = math.sqrt(14 / 3)
    assert z_score([4, 5, 6], [1, 2, 3, 6]) == pytest.approx(2 / deviation)
    assert z_score([2.0], [1, 2, 3, 6]) == pytest.approx(-1 / deviation)
    assert z_score([-26], [2, -5, -12, -33]) == pytest.approx(-2 / deviation)


@pytest.mark.parametrize("reference", [[2.0, 2.0], [2.0], [0.1] * 10])  # ten times .1 has a deviation of 1e-17
def test_there_is_no_z_score_without_variation(reference):
    """Rewards that never vary have no deviation to measure by: the z-score is NaN, and nothing is raised."""
    assert math.isnan(z_score([1.0, 3.0], reference)) and math.isnan(z_score(reference, reference))


# Output


def test_samples_are_printed_and_returned(capsys):
    """The first prompts are printed with both answers, of a conversation its last message, and returned as they are."""
    turns = [{"role": "user", "content": "Hello"}, {"role": "user", "content": "A film?"}]
    before = {"prompt": ["The film", turns, "The plot"], "completion": [" was\n", " a", " b"]}
    after = {"prompt": before["prompt"], "completion": [" is ", " d", " e"]}
    assert print_samples({"before": before, "after": after}, count=2) == [
        {"prompt": "The film", "before": " was\n", "after": " is "},
        {"prompt": turns, "before": " a", "after": " d"},
    ]
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert blocks == ["prompt  The film\nbefore  was\nafter   is", "prompt  A film?\nbefore  a\nafter   d"]


def test_format_table():
    """A table has numbers to three places, error or interval behind them, and a dash for what is missing or NaN."""
    new = {"policy": "new", "kl": math.nan, "gold": 0.12345, "gold_low": 0.1, "gold_high": 0.15}
    rows = [{"policy": "sft", "kl": 0.0, "kl_se": 0.0, "n": 3}, {"policy": "one", "kl": 1.0, "kl_se": math.nan}, new]
    assert format_table(rows).splitlines() == [
        "| policy | kl | gold | n |",
        "| --- | --- | --- | --- |",
        "| sft | 0.000 ± 0.000 | – | 3 |",
        "| one | 1.000 | – | – |",  # a mean of one value has no error
        "| new | – | 0.123 [0.100, 0.150] | – |",
    ]


# Judging


def test_the_cheap_judges():
    """Every training step has the reward, whatever it is, and the functions; other models are kept for evaluations."""
    model = SimpleNamespace(is_function=False)
    task = Task(None, None, {"reward": model, "other": model, **JUDGES}, [], [])
    assert list(task.cheap_judges) == ["reward", "letters", "words"]
    parts = WeightedSum({"rm": 1.0, "letters": 0.5})  # a part is needed for the sum, even if it is a model
    judges = {"rm": model, "letters": JUDGES["letters"], "reward": parts, "other": model}
    assert list(Task(None, None, judges, [], []).cheap_judges) == ["rm", "letters", "reward"]


def test_columns_agree_with_the_answers(tiny_policy, tiny_tokenizer):
    """`length` counts the answer's tokens, EOS included, `ended` says if it has one, and judges see the text."""
    columns = judge_policy(tiny_policy, tiny_tokenizer, prompts(tiny_tokenizer, 60), JUDGES, options(temperature=1.5))
    assert columns["prompt"] == [TEXTS[i % 6] for i in range(60)]
    assert columns["letters"] == pytest.approx(letters(columns["prompt"], columns["completion"]))
    assert columns["words"] == words(columns["prompt"], columns["completion"])
    assert columns["kl"] == []
    assert 0 < sum(columns["ended"]) < 60
    for text, length, ended in zip(columns["prompt"], columns["length"], columns["ended"]):
        room = 16 - len(tiny_tokenizer(text)["input_ids"])
        assert 1 <= length <= room
        assert ended or length == room


def test_summary_of_columns():
    """A summary has the means of judges, KL, length and EOS rate; without a reference the KL is NaN, not 0."""
    columns = {"reward": [1.0, 3.0], "kl": [], "length": [4, 6], "ended": [1, 0], "completion": ["a b", "a b"]}
    row = summarise(columns, ["reward"])
    assert (row["reward"], row["reward_se"], row["length"], row["eos_rate"], row["distinct_2"]) == (2, 1, 5, 0.5, 0.5)
    assert math.isnan(row["kl"])


def test_the_front(tiny_policy, tiny_tokenizer):
    """The front goes from θ_sft, to the bit and at a KL of exactly 0, to the merged weights, and every row has all."""
    sft, items = get_weights(tiny_policy), prompts(tiny_tokenizer)
    merged = perturbed(sft)
    kept = deepcopy((sft, merged))
    alone = judge_policy(tiny_policy, tiny_tokenizer, items, JUDGES, options())
    task = Task(tiny_policy, tiny_tokenizer, JUDGES, [], items)
    front, answers = sweep_front(task, options(), sft, merged, etas=(0.0, 0.5, 1.0))
    assert equal(sft, kept[0]) and equal(merged, kept[1])
    names = {"eta", "letters", "letters_se", "words", "words_se", "kl", "kl_se", "length", "eos_rate", "distinct_2"}
    for row, columns in zip(front, answers, strict=True):
        assert names <= set(row) and all(math.isfinite(row[name]) for name in names)
        assert {len(column) for column in columns.values()} == {18}
    assert [row["eta"] for row in front] == [0.0, 0.5, 1.0]
    assert answers[0] == alone | {"kl": [0.0] * 18}
    assert 0 < front[1]["kl"] < front[2]["kl"]
    assert equal(get_weights(tiny_policy), merged)  # the policy then holds the last weights


def test_the_reference_of_adapters_is_the_model_without(tiny_policy, tiny_tokenizer):
    """New adapters are at a KL of exactly 0 to the model without them, changed ones are not; they stay on."""
    items, base = prompts(tiny_tokenizer), deepcopy(tiny_policy)
    add_lora(tiny_policy, r=2, alpha=4)
    judge = lambda reference: judge_policy(tiny_policy, tiny_tokenizer, items, {}, options(), reference)
    assert judge(tiny_policy)["kl"] == [0.0] * len(items)
    for layer in lora_layers(tiny_policy).values():
        torch.nn.init.normal_(layer.lora_B)
    columns = judge(tiny_policy)
    assert min(columns["kl"]) > 0
    assert columns == judge(base) == judge(deepcopy(tiny_policy))  # the reference's own adapters are meant
    assert all(layer.enabled for layer in lora_layers(tiny_policy).values())


def test_an_evaluation_is_a_function_of_its_seed(tiny_policy, tiny_tokenizer):
    """The same seed gives the same answers, and no weight, gradient, mode or global random number is touched."""
    before, state = get_weights(tiny_policy), torch.get_rng_state()
    held_out = tiny_tokenizer, prompts(tiny_tokenizer), JUDGES
    first, second, other = (judge_policy(tiny_policy, *held_out, options(s), tiny_policy, before) for s in (1, 1, 2))
    assert first == second
    assert first["completion"] != other["completion"]
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(get_weights(tiny_policy), before)
    assert not tiny_policy.training and all(parameter.grad is None for parameter in tiny_policy.parameters())


# At equal KL


@pytest.fixture
def match(tiny_policy, tiny_tokenizer):
    """(policy, its weights, reference, its weights, (tokenizer, prompts)); the policy is the reference, perturbed."""
    policy, start = deepcopy(tiny_policy), get_weights(tiny_policy)
    end = perturbed(start)
    set_weights(policy, end)
    return policy, end, tiny_policy, start, (tiny_tokenizer, prompts(tiny_tokenizer))


FEW = options(batch_size=18, max_length=10)


def kl_at(eta, match):
    """KL of the interpolation, as match_kl is to see it."""
    policy, end, reference, start, (tokenizer, items) = match
    set_weights(policy, interpolate(start, end, eta))
    return mean_se(judge_policy(policy, tokenizer, items, {}, FEW, reference)["kl"])[0]


@pytest.mark.parametrize("share, halvings", [(0.6, 10), (0.1, 7), (0.3, 3)])
def test_match_kl_finds_the_weight(match, share, halvings):
    """On a grid of 1/2^halvings the KL passes the target right before the returned η, where the policy then is."""
    policy, end, reference, start, held_out = match
    whole, step = kl_at(1.0, match), 2**-halvings
    for target in (whole, math.inf):  # no policy is moved *away* from the reference
        assert match_kl(policy, *held_out, FEW, reference, target) == 1.0 and equal(get_weights(policy), end)
    target = share * whole
    eta = match_kl(policy, *held_out, FEW, reference, target, halvings)
    assert equal(get_weights(policy), interpolate(start, end, eta)) and equal(get_weights(reference), start)
    assert 0 < eta < 1 and eta / step == int(eta / step)
    kl = kl_at(eta, match)
    assert kl_at(eta - step, match) < target <= kl
    assert halvings < 10 or kl == pytest.approx(target, rel=0.1)


@pytest.mark.parametrize("change", [{"n_layer": 1}, {"n_embd": 32}, {"n_head": 1}])
def test_match_kl_needs_one_architecture(match, change):
    """Weights of other names or shapes cannot be interpolated: one sentence, and the policy is left alone."""
    policy, end, reference, _, held_out = match
    config = deepcopy(reference.config)
    config.update(change)
    with pytest.raises(UserError, match="--match-kl needs policies of one architecture"):
        match_kl(policy, *held_out, FEW, type(reference)(config).eval(), 0.1)
    assert equal(get_weights(policy), end)
