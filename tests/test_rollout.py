"""Sampling and scoring against loops that recompute every prefix from scratch, without padding, cache or batch."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rlhf_min.lora import add_lora, lora_disabled, lora_layers, merge_lora
from rlhf_min.rollout import Rollout, decode_completions, draw, sample, token_logprobs, uniform_numbers
from rlhf_min.support.batches import pad
from rlhf_min.support.errors import UserError
from rlhf_min.support.models import cache_argument, get_weights, set_weights

VOCABULARY, EOS, TEMPERATURE, POSITIONS = 8, 7, 0.7, 32
PROMPTS = [[1, 2, 3], [4], [5, 6, 0, 1, 2], [3, 3]]

GPT = {"n_positions": POSITIONS, "n_embd": 16, "n_layer": 2, "n_head": 2}
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {  # name: (config, sizes)
    "gpt2": ("GPT2Config", GPT),
    "llama": ("LlamaConfig", SHAPE | {"num_key_value_heads": 1, "max_position_embeddings": POSITIONS}),
    "gpt_neox": ("GPTNeoXConfig", SHAPE | {"max_position_embeddings": POSITIONS}),
    "bloom": ("BloomConfig", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),  # ALiBi, no positions of its own
    "openai-gpt": ("OpenAIGPTConfig", GPT),  # takes no cache
    "mamba": ("MambaConfig", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),  # a state, and no cache
}


def build(family="gpt2"):
    """A small policy of a family, whose weights are wide enough to have preferences; float64, which Bloom cannot."""
    name, sizes = FAMILIES[family]
    config = getattr(transformers, name)(vocab_size=VOCABULARY, initializer_range=0.3, **sizes)
    policy = AutoModelForCausalLM.from_config(config).eval()
    policy = policy if family == "bloom" else policy.double()
    policy.generation_config.eos_token_id, policy.generation_config.pad_token_id = [EOS], EOS
    return policy


@pytest.fixture(params=["gpt2", "llama"])
def model(request):
    return build(request.param)


def numbers(count=4, length=12, seed=0):
    return uniform_numbers(count, length, torch.Generator().manual_seed(seed))


def roll(model, prompts=PROMPTS, max_length=12, temperature=TEMPERATURE):
    return sample(model, prompts, numbers(len(prompts), max_length), temperature)


def next_logits(model, prefix):
    """The logits (V,) of the token after a prefix, from the prefix alone."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([prefix]), use_cache=False).logits[0, -1].double()


def answers(rollout):
    """Each answer's tokens as a list, up to its end."""
    return [c[m].tolist() for c, m in zip(rollout.completions, rollout.mask)]


def brute_force(model, prompt, uniform):
    """An answer and its log π(y_t | x, y_<t), from the whole prefix anew for every token, up to its end or its room.

    A token is the first v at which the cumulative probability exceeds u.
    """
    answer, logprobs = [], []
    for u in uniform[: len(uniform) - len(prompt)].tolist():
        probs = (next_logits(model, prompt + answer) / TEMPERATURE).softmax(-1).tolist()
        token, total = 0, probs[0]
        while total <= u:
            token += 1
            total += probs[token]
        answer.append(token)
        logprobs.append(math.log(probs[token]))
        if token in model.generation_config.eos_token_id:
            break
    return answer, logprobs


@pytest.mark.parametrize("ends", [[EOS], [5, 6, 7]], ids=["one EOS", "three EOS"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_and_scorer_equal_brute_force(family, ends):
    """With cache, padding and batch, every family draws and scores as bare, growing prefixes do, up to any EOS."""
    model = build(family)
    model.generation_config.eos_token_id = ends
    rollout = roll(model)
    expected = [brute_force(model, x, u) for x, u in zip(PROMPTS, numbers())]
    assert answers(rollout) == [answer for answer, _ in expected]
    assert rollout.ended.tolist() == [answer[-1] in ends for answer, _ in expected]
    logprobs = token_logprobs(model, rollout, TEMPERATURE)
    longest = max(len(answer) for answer, _ in expected)  # sampling stops when all have ended
    assert logprobs.shape == rollout.mask.shape == (4, longest) and rollout.tokens.shape == (4, 5 + longest)
    for row, mask, (_, exact) in zip(logprobs, rollout.mask, expected):
        assert row[mask].tolist() == pytest.approx(exact, abs=1e-5)


# Scoring


def test_several_passes_are_one_after_the_other(model):
    """Log-probs and gradients are those of one pass; each pass sees a part of the rows, and is made twice."""
    rollout, calls = roll(model), []
    weights = torch.arange(1.0, 1.0 + rollout.mask.numel()).view_as(rollout.mask) * rollout.mask
    one = token_logprobs(model, rollout, TEMPERATURE)
    expected = torch.autograd.grad((weights * one).sum(), [*model.parameters()])
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: calls.append(len(inputs["input_ids"])), with_kwargs=True
    )
    two = token_logprobs(model, rollout, TEMPERATURE, passes=2)
    torch.testing.assert_close(two[rollout.mask], one[rollout.mask], atol=1e-6, rtol=0)
    assert calls == [2, 2]  # of four rows
    for gradient, wanted in zip(torch.autograd.grad((weights * two).sum(), [*model.parameters()]), expected):
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)
    assert calls == [2, 2, 2, 2]
    hook.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_scored_in_float32(dtype):
    """Half-precision logits give exact log-probs, and a likely token's gradient 1 − p is rounded only once."""
    logits = torch.zeros(1, 2, 11)
    logits[..., 3] = 9.0  # p = .999, so 1 − p would not survive a difference of two rounded numbers
    kept = logits.to(dtype).requires_grad_()
    ones = torch.ones(1, 3, dtype=torch.bool)
    rollout = Rollout(torch.tensor([[0, 3, 5]]), ones, ones[:, :2], ones[:, 0])
    padded = torch.cat([kept, kept[:, :1]], dim=1)  # the last position predicts what comes after the answer
    logprobs = token_logprobs(lambda **_: SimpleNamespace(logits=padded), rollout, TEMPERATURE)
    exact = (kept.detach().double() / TEMPERATURE).log_softmax(-1)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs[0].double(), exact[0, [0, 1], [3, 5]], atol=1e-6, rtol=0)
    logprobs.sum().backward()
    slope = (torch.nn.functional.one_hot(torch.tensor([[3, 5]]), 11) - exact.exp()) / TEMPERATURE
    torch.testing.assert_close(kept.grad.double(), slope, rtol=2**-7, atol=1e-6)


# Scoring at other weights


def test_functional_weights(model):
    """Scoring at other weights is scoring the model that has those weights, and it changes neither of the two."""
    rollout, before = roll(model), get_weights(model)
    weights = {name: w + 0.1 * torch.randn_like(w) for name, w in before.items()}
    kept = copy.deepcopy(weights)
    other, ids = copy.deepcopy(model), [id(p) for p in model.parameters()]
    set_weights(other, weights)
    expected = token_logprobs(other, rollout, TEMPERATURE)
    own = token_logprobs(model, rollout, TEMPERATURE)
    assert (expected - own).abs().max() > 0.01
    got = token_logprobs(model, rollout, TEMPERATURE, weights)
    assert torch.equal(got, expected)
    assert not got.requires_grad  # nothing of the live model, a tied head included, is left in the graph
    assert torch.equal(token_logprobs(model, rollout, TEMPERATURE), own)
    torch.testing.assert_close((get_weights(model), weights), (before, kept), rtol=0, atol=0)
    assert [id(p) for p in model.parameters()] == ids


# Sampling


@pytest.mark.parametrize("eos", [[EOS], [VOCABULARY]], ids=["some end", "none ends"])
@pytest.mark.parametrize("max_length", [12, POSITIONS])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "bloom"])
def test_an_answers_room_does_not_depend_on_its_neighbours(family, max_length, eos):
    """Beside a prompt of almost max_length tokens, short prompts get the answers and the room they have without it."""
    model = build(family)
    model.generation_config.eos_token_id = eos
    prompts = [*PROMPTS, [1, 2] * (max_length // 2 - 1)]
    uniform = numbers(5, max_length)
    without, with_it = (sample(model, prompts[:n], uniform[:n], TEMPERATURE) for n in (4, 5))
    assert answers(with_it)[:4] == answers(without)
    rooms = [max_length - len(prompt) for prompt in prompts]
    for answer, room in zip(answers(with_it), rooms):
        assert len(answer) == room if eos == [VOCABULARY] else answer[-1] == EOS or len(answer) == room
    scores = [token_logprobs(model, rollout, TEMPERATURE) for rollout in (without, with_it)]
    for row in range(4):
        alone, beside = (score[row, r.mask[row]] for score, r in zip(scores, (without, with_it)))
        torch.testing.assert_close(alone, beside, atol=1e-5, rtol=0)


def test_shape_of_a_rollout(model):
    """A rollout has the prompts as given, the answer, then pads; `ended` says which answers have an EOS."""
    model.generation_config.pad_token_id = 0
    prompts = [[1, 2], [3], [4, 5], [6]] * 4
    rollout = roll(model, prompts, max_length=6)
    tokens, attention_mask = pad(prompts, 0, "cpu", side="left")
    assert torch.equal(rollout.tokens[:, :2], tokens)
    assert torch.equal(rollout.attention_mask, torch.cat([attention_mask, rollout.mask], dim=1))
    assert rollout.tokens.shape == (16, 7) and rollout.completions.shape == rollout.mask.shape == (16, 5)
    assert rollout.mask.long().diff().max() <= 0  # no gap
    assert rollout.completions[~rollout.mask].eq(0).all()
    assert rollout.ended.tolist() == [EOS in answer for answer in answers(rollout)]
    assert all(EOS not in answer[:-1] for answer in answers(rollout))
    assert 0 < rollout.ended.sum() < 16  # both kinds are there


def test_logits_that_are_not_finite_are_refused():
    """A diverged policy is reported in one sentence and not sampled from."""
    model = build()
    model.transformer.ln_f.weight.data[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        roll(model)


def test_who_gets_a_cache():
    """A model with keys and values gets a cache for them; one with a state, or without the argument, gets none."""
    caches = {family for family in FAMILIES if cache_argument(build(family))}
    assert caches == {"gpt2", "llama", "gpt_neox", "bloom"}


def test_uniform_numbers_come_from_their_generator():
    """The numbers are a function of the seed, and the global random state has no part in them and no loss."""
    model, state = build(), torch.get_rng_state()
    assert torch.equal(numbers(), numbers()) and not torch.equal(numbers(), numbers(seed=1))
    roll(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_are_sampled_from(family):
    """With adapters on, the answers are those of W + ΔW merged into a plain model; with adapters off, those of W."""
    model = build(family)
    base = copy.deepcopy(model)
    add_lora(model, r=3, alpha=6.0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    merged = merge_lora(copy.deepcopy(model))
    assert answers(roll(model)) == answers(roll(merged)) != answers(roll(base))
    with lora_disabled(model):
        assert answers(roll(model)) == answers(roll(base))


# Drawing


@pytest.mark.parametrize(("number", "token"), [(0.0, 6), (0.24, 6), (0.26, 11), (1 - 2**-53, 11)])
def test_draw_by_hand(number, token):
    """Of weights 1 and 3 among nothing, numbers below ¼ draw the first; the weights need not sum to 1."""
    probs = torch.zeros(1, 17)
    probs[0, 6], probs[0, 11] = 1.0, 3.0
    assert draw(probs, torch.tensor([[number]], dtype=torch.float64)).item() == token


def test_the_largest_number_draws_a_token_of_the_vocabulary():
    """u = 1 − 2^-53, the largest that torch.rand gives, draws no token V, and none of probability 0."""
    largest = torch.full((1, 1), 1 - 2**-53, dtype=torch.float64)
    tenths = torch.tensor([[0.0] * 2 + [0.1] * 10 + [0.0]], dtype=torch.float64)
    assert tenths.cumsum(-1)[0, -1] == 1 - 2**-53  # without care the number would point behind the last token
    assert draw(tenths, largest).item() == 11
    assert draw(tenths, 0 * largest).item() == 2
    for size in (1, 2, 3, 50, 1000, 50_257):
        probs = torch.randn(20, size).softmax(-1)
        assert draw(probs, largest.expand(20, 1)).max() == size - 1


def test_draw_at_the_borders_of_tokens():
    """Exactly where one token ends, rounding leads to no token of probability 0."""
    probs = torch.rand(1, 10_000).expand(100, -1).clone()
    probs[:, ::100] = 0.0
    borders = probs[0].double().cumsum(-1)[99::100] / probs[0].double().sum()
    uniform = borders[:, None].clamp(max=1 - 2**-53)
    assert probs.gather(1, draw(probs, uniform)).min() > 0


# Text


def test_decode():
    """A text has no EOS and nothing behind it, but the space at its start, which SentencePiece drops from "▁girl"."""
    vocab = {word: i for i, word in enumerate(["</s>", "▁a", "▁little", "▁girl", "s"])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="</s>"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    tokens = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 3]])
    attention_mask = torch.tensor([[False, True, True, True, True, True], [True] * 5 + [False]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    rollout = Rollout(tokens, attention_mask, mask, torch.tensor([True, True]))
    assert tokenizer.decode([3, 4]) == "girls"
    assert decode_completions(tokenizer, rollout) == [" girls", "s"]
