"""The recorded step against the plain loop. Without a GPU it is taken, not recorded; tests/test_cuda.py records it."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf_min.lora import add_lora, lora_disabled, lora_layers
from rlhf_min.rollout import decode, draw, uniform_numbers
from rlhf_min.support import gpu_step
from rlhf_min.support.batches import pad
from rlhf_min.support.models import checkpoint_gradients, get_weights, set_weights
from tests.test_rollout import EOS, PROMPTS, build

TARGETS = {"gpt2": "c_attn", "llama": "q_proj", "gpt_neox": "query_key_value"}


@pytest.fixture(autouse=True)
def _nothing_recorded(monkeypatch):
    for name in ("STEPS", "REFUSED"):
        monkeypatch.setattr(gpu_step, name, {})


def both(policy, prompts=PROMPTS, max_length=12, seed=0):
    """[(tokens, probabilities that come last)] of the plain loop and of the recorded step."""
    tokens, attention_mask = pad(prompts, EOS, policy.device, side="left")
    uniform = uniform_numbers(len(prompts), max_length, torch.Generator().manual_seed(seed)).to(policy.device)
    room = max_length - attention_mask.sum(-1, keepdim=True)
    inputs = policy, tokens, attention_mask, uniform, room, 0.7
    recorded = gpu_step.decode(*inputs, draw)  # first, as in `sample`
    with torch.no_grad():
        return decode(*inputs), recorded


def assert_equal(policy, **kwargs):
    (tokens, _), (found, probs) = both(policy, **kwargs)
    assert torch.equal(found, tokens) and len(probs) == len(tokens)


@pytest.mark.parametrize("adapters", [False, True], ids=["dense", "LoRA"])
@pytest.mark.parametrize("family", TARGETS)
def test_a_recorded_step_is_the_plain_loop(family, adapters):
    """The same tokens, for other prompts and after the weights have changed too; one step serves all of them."""
    policy = build(family)
    if adapters:
        add_lora(policy, 2, 8, target_modules=[TARGETS[family]])
    for seed in range(3):
        for layer in lora_layers(policy).values():
            torch.nn.init.normal_(layer.lora_B)
        set_weights(policy, {name: w + 0.1 * torch.randn_like(w) for name, w in get_weights(policy).items()})
        assert_equal(policy, seed=seed, prompts=PROMPTS[seed:] + PROMPTS[:seed], max_length=12 + seed)
    with lora_disabled(policy):
        assert_equal(policy)
    assert len(gpu_step.STEPS) == 1 and not gpu_step.REFUSED


def test_a_step_is_recorded_in_eval_mode():
    """Gradient checkpointing leaves a policy's blocks in training mode, in which some versions have no cache."""
    policy = build("llama")
    checkpoint_gradients(policy)
    policy(torch.tensor([PROMPTS[0]])).logits.sum().backward()
    assert any(module.training for module in policy.modules())
    assert_equal(policy)
    (step,) = gpu_step.STEPS.values()
    assert not any(module.training for module in step.model.modules())


def test_another_model_takes_the_place_of_the_first():
    """What was recorded of a model is let go when another one is sampled, and a longer answer is recorded anew."""
    first, second = build(), build("llama")
    assert_equal(first)
    assert_equal(second)
    assert_equal(second, prompts=PROMPTS[:2])
    assert {key[0] for key in gpu_step.STEPS} == {4, 2}
    assert {key[4] for key in gpu_step.STEPS} == {id(next(second.parameters()))}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_in_autocast_weights_keys_and_values_are_of_its_dtype(family, monkeypatch):
    """Matrix products have weights in bfloat16, the rest stays; probabilities are the plain loop's but for rounding."""
    policy = build(family).float()
    add_lora(policy, 2, 8, target_modules=[TARGETS[family]])
    policy.generation_config.eos_token_id, caches, take = [99], [], gpu_step.Step.write
    write = lambda step, logits: caches.append(torch.is_autocast_cache_enabled()) or take(step, logits)
    monkeypatch.setattr(gpu_step.Step, "write", write)
    with torch.autocast("cpu", torch.bfloat16):
        (_, expected), (_, probs) = both(policy, prompts=PROMPTS[:1], max_length=5)
    assert (expected - probs).abs().max() < 0.03
    (step,) = gpu_step.STEPS.values()
    layers = [layer for layer in step.model.modules() if isinstance(layer, nn.Linear | Conv1D)]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    halves = [*step.keys, *step.values, *(layer.weight for layer in layers), *biases]
    assert len(layers) > 2 and {tensor.dtype for tensor in halves} == {torch.bfloat16}
    # twice to warm up, the prompt, recorded: a graph must not read such a cache
    assert caches == [False, False, True, False]
    assert step.model.get_input_embeddings().weight is policy.get_input_embeddings().weight


@pytest.mark.parametrize("family, why", [("mamba", "no keys and values"), ("bloom", ""), ("openai-gpt", "")])
def test_a_model_that_cannot_be_recorded_is_told_once(family, why, capsys):
    """The reason goes to stderr, once, and the plain loop is left to do the work."""
    policy = build(family)
    for prompts in (PROMPTS, PROMPTS, PROMPTS[:2]):  # the last ones would need another graph
        assert both(policy, prompts)[1] is None
    error = capsys.readouterr().err
    assert error.count("no CUDA graph of a step, so sampling is slower: ") == 1 and why in error


@pytest.mark.parametrize("kind", ["softcap", "sliding_window"])
def test_attention_of_another_kind_is_refused(kind):
    query = torch.ones(1, 2, 1, 4)
    key = torch.ones(1, 2, 8, 4)
    with pytest.raises(ValueError, match="not the plain one"):
        gpu_step.one_token_attention(None, query, key, key, torch.zeros(1, 1, 1, 8), **{kind: 4})


def test_a_step_that_computes_something_else_is_noticed(monkeypatch, capsys):
    """The first step is compared with the model itself: here it attends to padding, too."""
    attention = gpu_step.one_token_attention
    wrong = lambda module, q, k, v, mask, **kwargs: attention(module, q, k, v, torch.zeros_like(mask), **kwargs)
    monkeypatch.setitem(gpu_step.AttentionInterface._global_mapping, "one_token", wrong)
    assert both(build())[1] is None
    assert "off" in capsys.readouterr().err
