"""Judging policies on held-out prompts, and the statistics of it."""

import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from rlhf_min.data import Prompt, encode_prompt
from rlhf_min.errors import UserError
from rlhf_min.evaluation import (
    distinct_2,
    format_table,
    judge_policy,
    load_judges,
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
from rlhf_min.models import get_weights, set_weights
from rlhf_min.reward_model import RewardFunction
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
    return SimpleNamespace(
        **{"temperature": 0.7, "max_length": 16, "batch_size": 5, "precision": "fp32", "seed": seed, **changes}
    )


def prompts(tokenizer, count=18):
    return [Prompt(encode_prompt(tokenizer, TEXTS[i % 6]), TEXTS[i % 6]) for i in range(count)]


def perturbed(weights, size=0.1):
    """Other weights, at a distance."""
    generator = torch.Generator().manual_seed(1)
    return {name: w + size * torch.randn(w.shape, generator=generator) for name, w in weights.items()}


def test_mean_and_standard_error_by_hand():
    """T54: of 1, 2, 3, 6 the mean is 3, the variance (4+1+0+9)/3 = 14/3, the standard error √(14/12)."""
    assert mean_se([1, 2, 3, 6]) == (3.0, pytest.approx(math.sqrt(14 / 12)))
    assert mean_se([5.0, 5.0]) == (5.0, 0.0)


def test_mean_and_standard_error_of_too_few():
    """One value has a mean but no error, none has neither; no exception."""
    assert mean_se([2.0])[0] == 2.0
    assert math.isnan(mean_se([2.0])[1])
    assert all(math.isnan(number) for number in mean_se([]))


@pytest.mark.parametrize(
    "values, rate",
    [([1, 2, 3, 4], 0.5), ([2, 3, 4, 5], 1), ([0, 1, 2, 3], 0), ([1, 2, 4, 3], 0.5), ([9, 9, 3, 4], 0.75)],
)
def test_win_rate_counts_a_tie_half(values, rate):
    """The share of pairs that are won, against 1, 2, 3, 4; a tie is half a win, so a policy has ½ against itself."""
    assert win_rate(values, [1, 2, 3, 4]) == rate


def test_paired_difference_of_a_constant_is_exact():
    """Where every pair differs by 1.5, so do the mean and both ends of the interval, although the values vary."""
    baseline = [float(i * i % 17) for i in range(40)]
    generator = torch.Generator().manual_seed(0)
    assert paired_difference([value + 1.5 for value in baseline], baseline, generator) == (1.5, 1.5, 1.5)


def test_paired_difference_has_the_right_sign_and_covers():
    """The 95 % interval covers the true difference in about 95 of 100 experiments, around the mean difference."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        baseline = torch.randn(60, generator=generator, dtype=torch.float64)
        values = baseline + 0.3 + torch.randn(60, generator=generator, dtype=torch.float64)
        mean, low, high = paired_difference(values.tolist(), baseline.tolist(), generator, resamples=300)
        assert mean == pytest.approx((values - baseline).mean().item())
        assert low < mean < high
        covered += low <= 0.3 <= high
    assert 178 <= covered <= 198  # 190 ± 4 standard deviations of 3.1, less a little that the bootstrap loses at N = 60


def test_paired_difference_repeats_with_its_generator():
    """T51: the bootstrap is a function of its generator, and leaves torch's own random state alone."""
    state = torch.get_rng_state()
    runs = [paired_difference([1.0, 5.0, 2.0], [0.0, 1.0, 3.0], torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_distinct_2_by_hand():
    """T62: "a b a b" has the pairs ab, ba, ab, and "a b" another ab: 2 distinct of 4; texts are not joined."""
    assert distinct_2(["a b a b", "a b"]) == 2 / 4
    assert distinct_2(["a b c", "d e"]) == 1.0
    assert distinct_2(["word", ""]) == 0.0


def test_z_score_by_hand():
    """Of 1, 2, 3, 6 the mean is 3 and the deviation √(14/3): a mean of 5 lies 2/√(14/3) above it, one of 2 below."""
    deviation = math.sqrt(14 / 3)
    assert z_score([4, 5, 6], [1, 2, 3, 6]) == pytest.approx(2 / deviation)
    assert z_score([2.0], [1, 2, 3, 6]) == pytest.approx(-1 / deviation)
    assert z_score([1, 2, 3, 6], [1, 2, 3, 6]) == 0.0


def test_z_scores_standardise_the_reference():
    """T27: with the constants of the reference, its own rewards have mean 0 and standard deviation 1."""
    reference = [float(i * i % 17) for i in range(40)]
    standardised = [z_score([value], reference) for value in reference]
    mean, error = mean_se(standardised)
    assert mean == pytest.approx(0.0, abs=1e-9)
    assert error * math.sqrt(40) == pytest.approx(1.0)


def test_z_scores_have_no_unit():
    """T27: another unit of the judge, another zero, and the z-score is the same; a reversed judge reverses it."""
    values, reference = [3.0, 8.0, 4.0], [1.0, 2.0, 3.0, 6.0]
    affine = lambda rewards, a: [a * reward - 7 for reward in rewards]
    assert z_score(affine(values, 9.0), affine(reference, 9.0)) == pytest.approx(z_score(values, reference))
    assert z_score(affine(values, -0.1), affine(reference, -0.1)) == pytest.approx(-z_score(values, reference))


def test_there_is_no_z_score_without_variation():
    """Rewards that never vary have no deviation to measure by, nor has a single one: NaN, and no exception."""
    assert math.isnan(z_score([1.0, 3.0], [2.0, 2.0]))
    assert math.isnan(z_score([2.0, 2.0], [2.0, 2.0]))
    assert math.isnan(z_score([1.0], [2.0]))


def test_there_is_no_z_score_of_constants_that_round():
    """NaN where the reference's rewards do not vary, whatever number they are; rounding is no variation."""
    assert math.isnan(z_score([0.2] * 10, [0.1] * 10))


def test_samples_are_printed_and_returned(capsys):
    """The first three prompts with both answers, of a conversation its last message; returned as they are."""
    turns = [{"role": "user", "content": "Hello"}, {"role": "user", "content": "A film?"}]
    before = {"prompt": ["The film", turns, "The plot", "I"], "completion": [" was\n", " a", " b", " c"]}
    after = {"prompt": before["prompt"], "completion": [" is ", " d", " e", " f"]}
    rows = print_samples(before, after)
    assert rows == [
        {"prompt": "The film", "before": " was\n", "after": " is "},
        {"prompt": turns, "before": " a", "after": " d"},
        {"prompt": "The plot", "before": " b", "after": " e"},
    ]
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert blocks == [
        "prompt  The film\nbefore  was\nafter   is",
        "prompt  A film?\nbefore  a\nafter   d",
        "prompt  The plot\nbefore  b\nafter   e",
    ]
    assert print_samples(before, after, count=1) == rows[:1]
    assert print_samples({"prompt": ["I"], "completion": [""]}, {"completion": [""]}) == [
        {"prompt": "I", "before": "", "after": ""}
    ]


def test_an_error_that_there_is_not_is_not_shown():
    """One seed, or one prompt, has a mean but no error; the table shows the mean alone."""
    assert format_table([{"a": 1.0, "a_se": math.nan}]).splitlines()[-1] == "| 1.000 |"


def test_format_table():
    """A Markdown table: numbers to three places, error or interval behind them, a dash for what is missing or NaN."""
    new = {"policy": "new", "kl": math.nan, "gold": 0.12345, "gold_low": 0.1, "gold_high": 0.15}
    rows = [{"policy": "sft", "kl": 0.0, "kl_se": 0.0, "n": 3}, new]
    assert format_table(rows).splitlines() == [
        "| policy | kl | gold | n |",
        "| --- | --- | --- | --- |",
        "| sft | 0.000 ± 0.000 | – | 3 |",
        "| new | – | 0.123 [0.100, 0.150] | – |",
    ]


def test_every_judge_and_monitor_is_in_each_row(tiny_policy, tiny_tokenizer):
    """T62: every row of the front has every judge with its error, KL, length, EOS rate and distinct-2."""
    sft = get_weights(tiny_policy)
    front, answers = sweep_front(
        tiny_policy, tiny_tokenizer, prompts(tiny_tokenizer), JUDGES, options(), sft, perturbed(sft), points=3
    )
    names = {"eta", "letters", "letters_se", "words", "words_se", "kl", "kl_se", "length", "eos_rate", "distinct_2"}
    assert [row["eta"] for row in front] == [0.0, 0.5, 1.0]
    for row, columns in zip(front, answers):
        assert names <= set(row)
        assert all(math.isfinite(row[name]) for name in names)
        assert {len(column) for column in columns.values()} == {18}


def test_columns_agree_with_the_answers(tiny_policy, tiny_tokenizer):
    """T22, T62: length counts the answer's tokens, EOS included; `ended` says if it has one; judges see the text."""
    columns = judge_policy(tiny_policy, tiny_tokenizer, prompts(tiny_tokenizer, 60), JUDGES, options(temperature=1.5))
    assert columns["prompt"] == [TEXTS[i % 6] for i in range(60)]
    assert columns["letters"] == pytest.approx(letters(columns["prompt"], columns["completion"]))
    assert columns["words"] == words(columns["prompt"], columns["completion"])
    assert columns["kl"] == []
    assert 0 < sum(columns["ended"]) < 60
    for text, length, ended in zip(columns["prompt"], columns["length"], columns["ended"]):
        room = 16 - len(tiny_tokenizer(text)["input_ids"])
        assert 1 <= length <= room
        assert ended or length >= room - 3  # the batch's longest prompt bounds the answers of all of its prompts


def test_summary_of_columns():
    """T62: means of judges, KL, length and EOS rate; without a reference the KL is NaN, not 0."""
    columns = {"reward": [1.0, 3.0], "kl": [], "length": [4, 6], "ended": [1, 0], "completion": ["a b", "a b"]}
    row = summarise(columns, ["reward"])
    assert (row["reward"], row["reward_se"], row["length"], row["eos_rate"], row["distinct_2"]) == (2, 1, 5, 0.5, 0.5)
    assert math.isnan(row["kl"])


def test_the_front_starts_at_sft_with_kl_zero(tiny_policy, tiny_tokenizer):
    """T50: η = 0 is the SFT policy to the bit: KL exactly 0, its answers and its rewards; the KL grows from there."""
    sft, items = get_weights(tiny_policy), prompts(tiny_tokenizer)
    alone = judge_policy(tiny_policy, tiny_tokenizer, items, JUDGES, options())
    front, answers = sweep_front(tiny_policy, tiny_tokenizer, items, JUDGES, options(), sft, perturbed(sft), points=3)
    assert answers[0]["kl"] == [0.0] * len(items)
    assert (front[0]["kl"], front[0]["kl_se"]) == (0.0, 0.0)
    assert answers[0]["completion"] == alone["completion"]
    assert front[0]["letters"] == mean_se(alone["letters"])[0]
    assert 0 < front[1]["kl"] < front[2]["kl"]


def test_the_front_ends_at_the_merged_weights(tiny_policy, tiny_tokenizer):
    """T46, T50: η = 1 is θ_slerp to the bit, which the policy then holds; neither of the two weights is touched."""
    sft, items = get_weights(tiny_policy), prompts(tiny_tokenizer)
    merged = perturbed(sft)
    kept = [{name: w.clone() for name, w in weights.items()} for weights in (sft, merged)]
    _, answers = sweep_front(tiny_policy, tiny_tokenizer, items, JUDGES, options(), sft, merged, points=2)
    for weights, copy in zip((sft, merged), kept):
        assert all(torch.equal(weights[name], copy[name]) for name in copy)
    assert all(torch.equal(w, merged[name]) for name, w in get_weights(tiny_policy).items())
    assert judge_policy(tiny_policy, tiny_tokenizer, items, {}, options())["completion"] == answers[1]["completion"]


def test_kl_is_per_answer_and_not_negative(tiny_policy, tiny_tokenizer):
    """T54: a perturbed policy has KL > 0 and the same one 0; one value an answer, in nats per answer, not per token."""
    reference = get_weights(tiny_policy)
    set_weights(tiny_policy, perturbed(reference))
    items = prompts(tiny_tokenizer)
    long, short = (
        judge_policy(tiny_policy, tiny_tokenizer, items, {}, options(max_length=n), tiny_policy, reference)["kl"]
        for n in (48, 8)
    )
    assert len(long) == len(items)
    assert min(long) > 0
    assert sum(long) > 2 * sum(short)  # a mean over the tokens would hardly grow with the length
    assert judge_policy(tiny_policy, tiny_tokenizer, items, {}, options(), tiny_policy)["kl"] == [0.0] * len(items)


def test_evaluation_leaves_weights_and_random_state_alone(tiny_policy, tiny_tokenizer):
    """T52: no weight, no gradient, no mode and no global random number is touched by an evaluation."""
    before, state = get_weights(tiny_policy), torch.get_rng_state()
    judge_policy(tiny_policy, tiny_tokenizer, prompts(tiny_tokenizer), JUDGES, options(), tiny_policy, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(w, before[name]) for name, w in get_weights(tiny_policy).items())
    assert all(parameter.grad is None for parameter in tiny_policy.parameters())
    assert not tiny_policy.training


def test_the_same_seed_gives_the_same_answers(tiny_policy, tiny_tokenizer):
    """T51: an evaluation is a function of its seed, and the seed matters."""
    first, second, other = (
        judge_policy(tiny_policy, tiny_tokenizer, prompts(tiny_tokenizer), JUDGES, options(seed)) for seed in (1, 1, 2)
    )
    assert first == second
    assert first["completion"] != other["completion"]


def test_the_noise_floor(tiny_policy, tiny_tokenizer):
    """T60: the same policy with two seeds (A/A) differs by less than 2 standard errors in every judge and in length."""
    items = prompts(tiny_tokenizer, 240)
    first, second = (
        judge_policy(tiny_policy, tiny_tokenizer, items, JUDGES, options(seed, batch_size=240)) for seed in (1, 2)
    )
    for name in [*JUDGES, "length"]:
        (mean_a, se_a), (mean_b, se_b) = mean_se(first[name]), mean_se(second[name])
        assert 0 < abs(mean_a - mean_b) < 2 * math.hypot(se_a, se_b), name


def test_judges_by_name():
    """A judge is called as it is written before the equals sign, else by the last part of what it is."""
    gold = "rlhf_min.toy.gold_judge"
    assert list(load_judges([f"gold={gold}", gold], CPU)) == ["gold", "gold_judge"]
    with pytest.raises(UserError, match="the name gold_judge is taken"):
        load_judges([gold, gold], CPU)


@pytest.mark.parametrize("name", ["kl", "length", "ended", "completion", "prompt", "eta", "policy", "distinct_2"])
def test_a_judge_may_not_take_the_name_of_a_column(name):
    """T62: a judge called like a column of the table would be added to that column."""
    with pytest.raises(UserError, match=name):
        load_judges([f"{name}=rlhf_min.toy.gold_judge"], CPU)


@pytest.fixture
def two_policies(tiny_policy):
    """(policy, reference): the policy is the reference, perturbed."""
    policy = deepcopy(tiny_policy)
    set_weights(policy, perturbed(get_weights(policy)))
    return policy, tiny_policy


def kl_at(eta, policies, tokenizer, start, end):
    """KL of the interpolation, as match_kl is to see it."""
    set_weights(policies[0], interpolate(start, end, eta))
    return mean_se(judge_policy(policies[0], tokenizer, prompts(tokenizer), {}, options(), policies[1])["kl"])[0]


def test_match_kl_finds_the_weight(two_policies, tiny_tokenizer):
    """T60: on a grid of 1/1024 the KL passes the target right before the returned η, where the policy then is."""
    policy, reference = two_policies
    start, end = get_weights(reference), get_weights(policy)
    whole, etas = kl_at(1.0, two_policies, tiny_tokenizer, start, end), []
    for share in (0.1, 0.6):
        set_weights(policy, end)
        eta = match_kl(policy, tiny_tokenizer, prompts(tiny_tokenizer), options(), reference, share * whole)
        assert all(torch.equal(w, interpolate(start, end, eta)[name]) for name, w in get_weights(policy).items())
        assert all(torch.equal(w, start[name]) for name, w in get_weights(reference).items())
        assert eta * 1024 == int(eta * 1024)
        kl = kl_at(eta, two_policies, tiny_tokenizer, start, end)
        assert kl_at(eta - 1 / 1024, two_policies, tiny_tokenizer, start, end) < share * whole <= kl
        assert kl == pytest.approx(share * whole, rel=0.1)
        etas.append(eta)
    assert 0 < etas[0] < etas[1] < 1


def test_a_policy_that_is_near_stays_where_it_is(two_policies, tiny_tokenizer):
    """T60: nobody is moved *away* from the reference: at or below the target η is 1, and no weight has changed."""
    policy, reference = two_policies
    start, end, items = get_weights(reference), get_weights(policy), prompts(tiny_tokenizer)
    whole = kl_at(1.0, two_policies, tiny_tokenizer, start, end)
    for target in (whole, 2 * whole, math.inf):
        assert match_kl(policy, tiny_tokenizer, items, options(), reference, target) == 1.0
        assert all(torch.equal(w, end[name]) for name, w in get_weights(policy).items())
    assert match_kl(reference, tiny_tokenizer, items, options(), reference, 0.1) == 1.0  # against itself
    assert all(torch.equal(w, start[name]) for name, w in get_weights(reference).items())


def test_fewer_halvings_are_a_coarser_grid(two_policies, tiny_tokenizer):
    """With three halvings η is a multiple of ⅛; the KL is then at least the target."""
    policy, reference = two_policies
    start, end = get_weights(reference), get_weights(policy)
    target = 0.3 * kl_at(1.0, two_policies, tiny_tokenizer, start, end)
    eta = match_kl(policy, tiny_tokenizer, prompts(tiny_tokenizer), options(), reference, target, halvings=3)
    assert eta * 8 == int(eta * 8)
    assert kl_at(eta - 1 / 8, two_policies, tiny_tokenizer, start, end) < target
    assert kl_at(eta, two_policies, tiny_tokenizer, start, end) >= target


@pytest.mark.parametrize("change", [{"n_layer": 1}, {"n_embd": 32}, {"n_head": 1}])
def test_match_kl_needs_one_architecture(two_policies, tiny_tokenizer, change):
    """Weights of other names or shapes cannot be interpolated: one sentence, and the policy is left alone."""
    policy, reference = two_policies
    config = deepcopy(reference.config)
    config.update(change)
    other, end = type(reference)(config).eval(), get_weights(policy)
    with pytest.raises(UserError, match="--match-kl needs policies of one architecture"):
        match_kl(policy, tiny_tokenizer, prompts(tiny_tokenizer), options(), other, 0.1)
    assert all(torch.equal(w, end[name]) for name, w in get_weights(policy).items())


def test_the_reference_of_adapters_is_the_model_without(tiny_policy, tiny_tokenizer):
    """T50: new adapters are at a KL of exactly 0 to the model without them, changed ones are not; they stay on."""
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
