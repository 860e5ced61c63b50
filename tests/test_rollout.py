"""Sampling and scoring against loops that recompute every prefix from scratch, without padding, cache or batch."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_min.batches import pad
from rlhf_min.models import get_weights, set_weights
from rlhf_min.reinforce import kl_estimate, policy_gradient_loss, shaped_reward
from rlhf_min.rollout import (
    Rollout,
    completion_logits,
    completion_mask,
    decode_completions,
    draw,
    positions,
    sample,
    token_logprobs,
)

VOCABULARY, EOS, TEMPERATURE = 8, 7, 0.7
PROMPTS = [[1, 2, 3], [4], [5, 6, 0, 1, 2], [3, 3]]


def gpt2(**config):
    defaults = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.3}
    sizes = {"vocab_size": VOCABULARY, "n_positions": 32, "n_layer": 2, "n_embd": 16, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **{**defaults, **config}))


def llama():
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
                         initializer_range=0.3)  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(params=[gpt2, llama])
def model(request):
    return request.param().double().eval()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def roll(model, prompts=PROMPTS, max_length=12, eos=EOS, pad=EOS, seed=0, temperature=TEMPERATURE):
    return sample(model, prompts, max_length, temperature, eos, pad, generator(seed))


def next_logits(model, prefix):
    """The logits (V,) of the token after a prefix, from the prefix alone."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([prefix])).logits[0, -1].double()


def answers(rollout):
    """Each answer's tokens as a list, up to its end."""
    return [c[m].tolist() for c, m in zip(rollout.completions, rollout.mask)]


def score(model, prompt, answer):
    """[log π(y_t | x, y_<t)] of one answer: one forward pass over the prefix per token."""
    result = []
    for t, token in enumerate(answer):
        logits = next_logits(model, prompt + answer[:t]) / TEMPERATURE
        result.append((logits[token] - logits.exp().sum().log()).item())
    return result


class Fixed:
    """A stand-in for a model: the same logits (V,) at every position."""

    device = torch.device("cpu")

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, input_ids, logits_to_keep, **_):
        kept = logits_to_keep if isinstance(logits_to_keep, int) else len(logits_to_keep)
        shape = (len(input_ids), kept, len(self.logits))
        return SimpleNamespace(logits=self.logits.expand(shape).clone(), past_key_values=None)


# Masks and padding


def test_completion_mask():
    """T4: an answer reaches up to its first EOS, included; what follows is out, even another EOS; none means all in."""
    tokens = torch.tensor([[1, 7, 2, 7], [7, 7, 7, 7], [1, 2, 3, 4], [1, 2, 3, 7]])
    expected = [[True, True, False, False], [True, False, False, False], [True] * 4, [True] * 4]
    mask = completion_mask(tokens, EOS)
    assert mask.dtype == torch.bool
    assert mask.tolist() == expected


def test_completion_mask_with_pad_as_eos():
    """T4: with pad == EOS the answer [a, EOS, pad, pad] counts two tokens, [a, b, c, EOS] four."""
    tokens = torch.tensor([[1, EOS, EOS, EOS], [1, 2, 3, EOS]])
    assert completion_mask(tokens, EOS).sum(-1).tolist() == [2, 4]


def test_completion_mask_with_several_eos():
    """T4: any id of a list ends an answer."""
    tokens = torch.tensor([[1, 2, 5, 7], [1, 7, 5, 2], [1, 1, 1, 1]])
    assert completion_mask(tokens, [5, 7]).sum(-1).tolist() == [3, 2, 4]


def test_positions():
    """T3: positions count from 0 at the first real token."""
    attention_mask = torch.tensor([[False, False, True, True, True], [True] * 5])
    assert positions(attention_mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


# Scoring


def test_logprobs_equal_growing_prefixes(model):
    """T2, T3: batched, left-padded log-probs are those of growing prefixes, from the answer's first token on."""
    rollout = roll(model)
    logprobs = token_logprobs(model, rollout, TEMPERATURE)
    assert logprobs.shape == rollout.mask.shape
    for row, mask, prompt, answer in zip(logprobs, rollout.mask, PROMPTS, answers(rollout)):
        assert row[mask].tolist() == pytest.approx(score(model, prompt, answer), abs=1e-5)
        assert max(row[mask].tolist()) <= 0.0  # T10


def test_a_model_that_gives_all_logits_scores_the_same_positions(model):
    """T2: where logits_to_keep is ignored, the answer's positions are cut out of what it gives."""
    rollout = roll(model)
    gives_all = lambda logits_to_keep, **inputs: model(**inputs)
    assert torch.equal(*(token_logprobs(m, rollout, TEMPERATURE)[rollout.mask] for m in (model, gives_all)))


def test_padding_does_not_change_a_score(model):
    """T3: a prompt's answer scores the same alone as in a batch whose longest prompt is four tokens longer."""
    rollout = roll(model)
    together = token_logprobs(model, rollout, TEMPERATURE)
    width = len(max(PROMPTS, key=len))
    for i, prompt in enumerate(PROMPTS):
        row, pads = slice(i, i + 1), width - len(prompt)
        bare = Rollout(rollout.tokens[row, pads:], rollout.attention_mask[row, pads:], *(x[row] for x in rollout[2:]))
        torch.testing.assert_close(token_logprobs(model, bare, TEMPERATURE)[0], together[i], atol=1e-5, rtol=0)


def test_scorer_passes_mask_and_positions():
    """T3: the model is told both the padding and the positions, though transformers may guess one from the other."""
    told = {}

    def model(**inputs):
        told.update(inputs)
        return SimpleNamespace(logits=torch.zeros(1, 2, VOCABULARY))

    attention_mask = torch.tensor([[False, True, True, True]])
    rollout = Rollout(torch.tensor([[EOS, 1, 2, 3]]), attention_mask, torch.tensor([[True]]), torch.tensor([False]))
    completion_logits(model, rollout, TEMPERATURE)
    assert torch.equal(told["attention_mask"], attention_mask)
    assert told["position_ids"].tolist() == [[0, 0, 1, 2]]


def test_garbage_behind_the_end_does_not_change_a_score(model):
    """T1: an answer's log-prob is bit for bit the same whatever stands behind its first EOS."""
    rollout = roll(model, eos=[5, 6, 7])
    hidden = ~rollout.mask
    assert hidden.sum() > 3
    noise = torch.randint(0, VOCABULARY, rollout.completions.shape, generator=generator())
    other = rollout._replace(tokens=rollout.tokens.clone())
    other.completions[hidden] = noise[hidden]
    assert not torch.equal(other.tokens, rollout.tokens)
    a, b = (token_logprobs(model, r, TEMPERATURE)[rollout.mask] for r in (rollout, other))
    assert torch.equal(a, b)


def test_probabilities_of_all_pairs_sum_to_one():
    """T10: exp Σ log π over all answers of two tokens is 1, and no log-prob is positive."""
    model = gpt2().double().eval()
    pairs = torch.cartesian_prod(torch.arange(VOCABULARY), torch.arange(VOCABULARY))  # (64, 2)
    tokens = torch.cat([torch.tensor([[1, 2]]).expand(64, 2), pairs], dim=1)
    mask = torch.ones(64, 2, dtype=torch.bool)
    rollout = Rollout(tokens, torch.ones(64, 4, dtype=torch.bool), mask, torch.zeros(64, dtype=torch.bool))
    logprobs = token_logprobs(model, rollout, TEMPERATURE)
    assert logprobs.max() <= 0
    assert logprobs.double().sum(-1).exp().sum().item() == pytest.approx(1.0, abs=1e-6)


def test_half_precision_logits_are_scored_in_float32():
    """T10: bfloat16 logits, as autocast makes them, give float32 log-probs, right to 1e-6 for those logits."""
    logits = torch.randn(VOCABULARY).to(torch.bfloat16)
    tokens = torch.arange(VOCABULARY)[:, None].repeat(1, 2)
    ones = torch.ones(VOCABULARY, 2, dtype=torch.bool)
    logprobs = token_logprobs(Fixed(logits), Rollout(tokens, ones, ones[:, :1], ones[:, 0]), TEMPERATURE)
    exact = (logits.double() / TEMPERATURE).log_softmax(-1)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs[:, 0].double(), exact, atol=1e-6, rtol=0)


def test_temperature_is_out_of_place():
    """T7: logits are divided by the temperature in a new tensor; the model's output stays as it was."""
    kept = torch.arange(3.0).reshape(1, 1, 3)
    ones = torch.ones(1, 2, dtype=torch.bool)
    rollout = Rollout(torch.tensor([[0, 1]]), ones, ones[:, :1], ones[:, 0])
    for _ in range(2):
        got = completion_logits(lambda **_: SimpleNamespace(logits=kept), rollout, 0.5)
        assert got.tolist() == [[[0.0, 2.0, 4.0]]]  # the row of the last prompt token, over .5
    assert torch.equal(kept, torch.arange(3.0).reshape(1, 1, 3))


def test_scoring_twice_is_exact(model):
    """T5, T7, T9: two passes agree to the bit, so a copy, or the own weights, are at a KL of exactly 0 at T = .7."""
    rollout = roll(model)
    logprobs = token_logprobs(model, rollout, TEMPERATURE)
    for other in (
        token_logprobs(model, rollout, TEMPERATURE),
        token_logprobs(copy.deepcopy(model), rollout, TEMPERATURE),
        token_logprobs(model, rollout, TEMPERATURE, get_weights(model)),
    ):
        assert kl_estimate(logprobs, other, rollout.mask).tolist() == [0.0] * len(PROMPTS)


def test_dropout_stays_off():
    """T5: neither sampling nor scoring turns dropout on: a model in eval mode with dropout ½ scores the same twice."""
    model = gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).eval()
    rollout = roll(model)
    scores = [token_logprobs(model, rollout, TEMPERATURE) for _ in range(2)]
    assert torch.equal(*scores)
    assert not model.training


# Scoring at other weights


def test_functional_weights(model):
    """T9: scoring at other weights, GPT-2's tied embedding included, is scoring the model that has those weights."""
    rollout = roll(model)
    weights = {name: w + 0.1 * torch.randn_like(w) for name, w in get_weights(model).items()}
    other = copy.deepcopy(model)
    set_weights(other, weights)
    expected = token_logprobs(other, rollout, TEMPERATURE)
    own = token_logprobs(model, rollout, TEMPERATURE)
    assert (expected - own).abs().max() > 0.01
    assert torch.equal(token_logprobs(model, rollout, TEMPERATURE, weights), expected)
    assert torch.equal(token_logprobs(model, rollout, TEMPERATURE), own)  # the model has its own weights again


def test_functional_weights_leave_the_model_alone(model):
    """T37: scoring at other weights changes neither them nor the model's parameters, nor the identity of the latter."""
    rollout, before = roll(model), get_weights(model)
    ids = [id(p) for p in model.parameters()]
    weights = {name: w + 1 for name, w in before.items()}
    token_logprobs(model, rollout, TEMPERATURE, weights)
    torch.testing.assert_close(get_weights(model), before, rtol=0, atol=0)
    torch.testing.assert_close(weights, {name: w + 1 for name, w in before.items()}, rtol=0, atol=0)
    assert [id(p) for p in model.parameters()] == ids


def test_gradient_reaches_the_policy_only(model):
    """T12: a step's loss has a gradient in every parameter of the policy, and none through the anchor's weights."""
    rollout, anchor = roll(model), get_weights(model)
    anchor = {name: (w + 0.1).requires_grad_() for name, w in anchor.items()}
    logprobs = token_logprobs(model, rollout, TEMPERATURE)
    anchor_logprobs = token_logprobs(model, rollout, TEMPERATURE, anchor)
    shaped = shaped_reward(torch.randn(len(PROMPTS)), kl_estimate(logprobs, anchor_logprobs, rollout.mask), 0.1)
    policy_gradient_loss(logprobs, shaped, rollout.mask).backward()
    assert all(w.grad is None for w in anchor.values())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_scoring_at_constants_has_no_graph(model):
    """T12: at a dictionary of plain tensors nothing of the live model, tied head included, is left in the graph."""
    assert not token_logprobs(model, roll(model), TEMPERATURE, get_weights(model)).requires_grad


# Sampling


def brute_force_answer(model, prompt, uniform, eos):
    """The whole prefix anew for every token; the first v at which the cumulated probability exceeds u."""
    answer = []
    for u in uniform.tolist():
        total, token = 0.0, -1
        while total <= u:
            token += 1
            total += (next_logits(model, prompt + answer) / TEMPERATURE).softmax(-1)[token].item()
        answer.append(token)
        if token in eos:
            break
    return answer


@pytest.mark.parametrize("seed", [0, 1])
def test_cached_sampler_equals_brute_force(model, seed):
    """T56, T3: with cache and padding the sampler draws what one of bare prefixes draws from the same numbers."""
    room = 12 - len(max(PROMPTS, key=len))
    uniform = torch.rand(len(PROMPTS), 12, generator=generator(seed), dtype=torch.float64)[:, :room]
    expected = [brute_force_answer(model, x, u, [EOS]) for x, u in zip(PROMPTS, uniform)]
    assert answers(roll(model, seed=seed)) == expected


def test_several_eos_end_an_answer(model):
    """T4: the sampler stops at any id of a list, as the brute-force sampler does."""
    rollout = roll(model, eos=[5, 6, 7], pad=0)
    uniform = torch.rand(len(PROMPTS), 12, generator=generator(), dtype=torch.float64)[:, :7]
    assert answers(rollout) == [brute_force_answer(model, x, u, [5, 6, 7]) for x, u in zip(PROMPTS, uniform)]
    last = [answer[-1] for answer, ended in zip(answers(rollout), rollout.ended) if ended]
    assert len(set(last)) > 1 and set(last) <= {5, 6, 7}


def test_shape_of_a_rollout(model):
    """T4, T8: prompts as given, then the answer, then pads; `ended` says which answers have an EOS."""
    prompts = [[1, 2], [3], [4, 5], [6]] * 4
    rollout = roll(model, prompts, max_length=6, pad=0)
    tokens, attention_mask = pad(prompts, 0, "cpu", side="left")
    assert torch.equal(rollout.tokens[:, :2], tokens)
    assert torch.equal(rollout.attention_mask[:, :2], attention_mask)
    assert rollout.attention_mask[:, 2:].all()
    assert rollout.tokens.shape == rollout.attention_mask.shape == (16, 6)
    assert rollout.completions.shape == rollout.mask.shape == (16, 4)
    assert torch.equal(rollout.mask, completion_mask(rollout.completions, EOS))
    assert rollout.completions[~rollout.mask].eq(0).all()
    assert rollout.ended.tolist() == [EOS in answer for answer in answers(rollout)]
    assert 0 < rollout.ended.sum() < 16  # both kinds are there


def test_sampling_stops_when_all_have_ended():
    """T56: no token is computed after the last answer's EOS, and the shapes follow."""
    rollout = roll(Fixed(torch.tensor([0.0] * 7 + [50.0])), max_length=32)
    assert rollout.completions.tolist() == [[EOS]] * len(PROMPTS)
    assert rollout.tokens.shape == rollout.attention_mask.shape == (4, 6)
    assert rollout.ended.all()


def test_answers_do_not_depend_on_the_batch(model):
    """T51: a prompt and its row of numbers decide the answer: together or one by one, prompts draw the same."""
    short, long = [4], [5, 6, 0, 1]
    together = answers(roll(model, [short, long], max_length=10))
    one_by_one = generator()
    first, second = (answers(sample(model, [x], 10, TEMPERATURE, EOS, EOS, one_by_one))[0] for x in (short, long))
    assert [first[:6], second] == together  # in the batch the long prompt leaves six tokens to both


def test_same_seed_same_answers(model):
    """T51: answers are a function of model, prompts and seed; the global random state has no part in it and no loss."""
    first = roll(model)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(roll(model).tokens, first.tokens)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(roll(model, [[1]] * 16, seed=1).tokens, roll(model, [[1]] * 16, seed=2).tokens)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_frequencies_of_one_token(model, temperature):
    """T6: 4000 one-token answers follow softmax(logits / T), with no top-k, top-p or penalty: chi-square."""
    rollout = roll(model, [[1, 2, 3]] * 4000, max_length=4, temperature=temperature)
    counts = torch.bincount(rollout.completions[:, 0], minlength=VOCABULARY).double()
    expected = 4000 * (next_logits(model, [1, 2, 3]) / temperature).softmax(-1)
    assert expected.min() > 5
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 24.32  # the 99.9 % quantile at 7 degrees of freedom
    at_one = 4000 * next_logits(model, [1, 2, 3]).softmax(-1)  # and the test has the power to tell T = 1
    assert ((counts - at_one) ** 2 / at_one).sum().item() > 24.32


def test_sampled_tokens_score_as_they_were_drawn():
    """T6, T2: uniform numbers pulled through sampler and scorer: E[1/π(y)] over one-token answers is the vocabulary."""
    model = gpt2().double().eval()
    rollout = roll(model, [[1, 2, 3]] * 4000, max_length=4)
    inverse = (-token_logprobs(model, rollout, TEMPERATURE)[:, 0]).exp()
    assert (inverse.mean() - VOCABULARY).abs() < 4 * inverse.std() / math.sqrt(4000)


@pytest.mark.parametrize(("number", "token"), [(0.0, 2), (1 - 2**-53, 11)])
def test_extreme_uniform_numbers(monkeypatch, number, token):
    """T6: the smallest and the largest number torch.rand can give draw no forbidden token and none beyond the end."""
    # ten equal probabilities cumulate to 1 − 2^-53 in float64: without care the largest number points behind the last
    logits = torch.tensor([-math.inf, -math.inf] + [0.0] * 10 + [-math.inf])
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.full(size, number, dtype=torch.float64))
    rollout = sample(Fixed(logits), [[1]], 2, 1.0, 12, 12, None)
    assert rollout.completions.tolist() == [[token]]


@pytest.mark.parametrize(("number", "token"), [(0.0, 6), (0.24, 6), (0.26, 11), (1 - 2**-53, 11)])
def test_draw_by_hand(number, token):
    """T6: of weights 1 and 3 behind whole blocks of nothing; they need not sum to 1."""
    probs = torch.zeros(1, 17)
    probs[0, 6], probs[0, 11] = 1.0, 3.0
    assert draw(probs, torch.tensor([[number]], dtype=torch.float64)).item() == token


# Text


def test_decode(tiny_tokenizer):
    """T8, T4: the text of an answer has neither EOS nor pads nor what stands behind them; the ids stay as sampled."""
    ids, eos = tiny_tokenizer("The film")["input_ids"], tiny_tokenizer.eos_token_id
    prompt, garbage = tiny_tokenizer("Prompt")["input_ids"], tiny_tokenizer(" cast")["input_ids"]
    answer = torch.tensor([[*ids, eos, *garbage]])
    tokens = torch.cat([torch.tensor([prompt]), answer], dim=1)
    mask = completion_mask(answer, eos)
    rollout = Rollout(tokens, torch.ones_like(tokens, dtype=torch.bool), mask, torch.tensor([True]))
    assert decode_completions(tiny_tokenizer, rollout) == ["The film"]
    assert torch.equal(rollout.completions, answer)


def test_ids_that_text_would_not_give_back(tiny_policy, tiny_tokenizer):
    """T8: sampled ids seldom survive decoding and tokenising again, so it is the ids that are scored."""
    eos = tiny_tokenizer.eos_token_id
    rollout = roll(tiny_policy, [[70, 71]] * 8, max_length=20, eos=eos, pad=tiny_tokenizer.pad_token_id)
    texts = decode_completions(tiny_tokenizer, rollout)
    assert any(tiny_tokenizer(text)["input_ids"] != ids for text, ids in zip(texts, answers(rollout)))
    scores = token_logprobs(tiny_policy, rollout, TEMPERATURE)
    for row, mask, answer in zip(scores, rollout.mask, answers(rollout)):
        assert row[mask].tolist() == pytest.approx(score(tiny_policy, [70, 71], answer), abs=1e-4)


def test_decode_keeps_the_space_before_the_answer():
    """T66: a SentencePiece tokenizer drops a text's first space; between prompt and answer it must stay."""
    vocab = {word: i for i, word in enumerate(["</s>", "▁a", "▁little", "▁girl", "s"])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="</s>"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    tokens = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 0]])
    attention_mask = torch.tensor([[False, True, True, True, True, True], [True] * 6])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    rollout = Rollout(tokens, attention_mask, mask, torch.tensor([True, True]))
    assert tokenizer.decode([3, 4]) == "girls"
    assert decode_completions(tokenizer, rollout) == [" girls", "s"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_a_likely_token_in_half_precision(dtype):
    """T10: 1 − p of a token with p = .999 survives bfloat16: rounded once, it is no difference of two roundings."""
    logits = torch.zeros(1, 2, 11)
    logits[..., 3] = 9.0
    kept = logits.to(dtype).requires_grad_()
    ones = torch.ones(1, 3, dtype=torch.bool)
    rollout = Rollout(torch.tensor([[0, 3, 5]]), ones, ones[:, :2], ones[:, 0])
    token_logprobs(lambda **_: SimpleNamespace(logits=kept), rollout, 1.0).sum().backward()
    p = kept.detach().double().softmax(-1)
    exact = torch.nn.functional.one_hot(torch.tensor([[3, 5]]), 11) - p
    torch.testing.assert_close(kept.grad.double(), exact, rtol=2**-8, atol=1e-6)


def test_draw_at_the_borders_of_blocks():
    """T6: where a block of tokens ends, rounding leads to no token of probability 0, first in its block or not."""
    probs = torch.rand(1, 10_000).expand(1000, -1).clone()
    width = math.isqrt(10_000) + 1
    probs[:, ::width] = 0.0
    borders = probs[0].double().cumsum(-1)[width - 1 :: width] / probs[0].double().sum()
    uniform = borders[torch.arange(1000) % len(borders)][:, None].clamp(max=1 - 2**-53)
    token = draw(probs, uniform)
    assert probs.gather(1, token).min() > 0
