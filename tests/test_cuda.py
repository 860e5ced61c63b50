"""What only a GPU can show:  TEST_CUDA=1 pytest tests/test_cuda.py  (else tests/conftest.py hides every GPU)."""

import functools
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import train_reinforce
from rlhf_min import warp
from rlhf_min.lora import add_lora, lora_layers
from rlhf_min.rollout import sample, token_logprobs, uniform_numbers
from rlhf_min.support import gpu_step
from rlhf_min.support.models import get_weights
from rlhf_min.support.options import RunOptions
from rlhf_min.support.precision import autocast, resolve_device
from tests.test_gpu_step import TARGETS, both
from tests.test_resume import RUNS, Crash, disturbed, fail
from tests.test_rollout import FAMILIES, build, roll

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and TEST_CUDA=1")


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """As every script sets up a GPU, but for TF32, which would hide small differences."""
    resolve_device(RunOptions(device="cuda"))
    torch.set_float32_matmul_precision("highest")
    for name in ("STEPS", "REFUSED"):
        monkeypatch.setattr(gpu_step, name, {})


def with_adapters(policy, family):
    """The policy with adapters that change what it computes, where the family has modules for them."""
    if family in TARGETS:
        add_lora(policy, 2, 8, target_modules=[TARGETS[family]])
    for layer in lora_layers(policy).values():
        torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(0))
    return policy


@pytest.mark.parametrize("adapters", [False, True], ids=["dense", "LoRA"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mamba"])
def test_scores_are_those_of_a_cpu(family, adapters):
    """Log-probs of padded answers, the same model on both devices."""
    policy = with_adapters(build(family), family if adapters else "")
    rollout = roll(policy)
    expected = token_logprobs(policy, rollout, 0.7)[rollout.mask]
    found = token_logprobs(policy.cuda(), rollout._replace(**{k: v.cuda() for k, v in rollout._asdict().items()}), 0.7)
    torch.testing.assert_close(found.cpu()[rollout.mask], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("adapters", [False, True], ids=["dense", "LoRA"])
@pytest.mark.parametrize("family", TARGETS)
def test_the_graph_is_used_and_equals_the_plain_loop(family, adapters):
    """The same tokens from a recorded graph, and again from the same one."""
    policy = with_adapters(build(family), family if adapters else "").cuda()
    for seed in range(2):
        (tokens, _), (found, _) = both(policy, seed=seed)
        assert torch.equal(tokens, found)
    (step,) = gpu_step.STEPS.values()
    assert isinstance(step.graph, torch.cuda.CUDAGraph)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("length", [64, 192])
def test_padded_batches_have_finite_gradients(length, precision):
    """Short prompts beside a long one: rows of padding see nothing, for which cuDNN's attention may give NaN."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=2, pad_token_id=0,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5)  # fmt: skip
    policy = LlamaForCausalLM(config).cuda().eval()
    policy.generation_config.eos_token_id, policy.generation_config.pad_token_id = [1], 0
    prompts = [[2] * (length // 2), [3], [4, 5]] * 4
    with autocast(policy.device, precision):
        rollout = sample(policy, prompts, uniform_numbers(12, length, torch.Generator().manual_seed(0)), 1.0)
        logprobs = token_logprobs(policy, rollout, 1.0)
    assert not gpu_step.REFUSED and logprobs.isfinite().all()
    logprobs.masked_fill(~rollout.mask, 0.0).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in policy.parameters())


def test_a_skipped_step_and_resume(in_world, tmp_path, monkeypatch):
    """At a scale of 2¹⁹ float16 overflows in the first steps, which are skipped; a run that died goes on to its end."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**19))
    flags = [*RUNS["fp16"][1].split(), "--device", "cuda", "--steps", "8", "--out", str(tmp_path / "run")]
    with disturbed(train_reinforce.RunLog, "step", 4, fail(Crash)), pytest.raises(Crash):
        train_reinforce.main(flags)
    train_reinforce.main(["--out", str(tmp_path / "run"), "--resume"])
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(1, 9)]
    assert rows[0]["grad_norm"] is None and rows[-1]["grad_norm"] > 0  # JSON has no infinity


def test_merging_is_that_of_a_cpu():
    init, *policies = (get_weights(build().float()) for _ in range(4))
    expected = warp.merge(init, policies)
    on_gpu = [{name: w.cuda() for name, w in weights.items()} for weights in (init, *policies)]
    found = warp.merge(on_gpu[0], on_gpu[1:])
    for name in expected:
        torch.testing.assert_close(found[name].cpu(), expected[name], atol=1e-5, rtol=0)
