"""Devices, mixed precision and the optimizer step."""

import copy
import math

import pytest
import torch

from rlhf_min.support.errors import UserError
from rlhf_min.support.options import RunOptions
from rlhf_min.support.precision import Optimizer, autocast, resolve_device

CPU = torch.device("cpu")


def begin(*values, lr=0.1, precision="fp32", **options):
    """(the only weights of a model, an optimizer of them)."""
    model = torch.nn.Module()
    model.device, model.weights = CPU, torch.nn.Parameter(torch.tensor(values))
    return model.weights, Optimizer(model, lr, precision, **options)


def push(optimizer, weights, *gradient):
    """One step whose gradient of `weights` is `gradient`; returns its norm."""
    optimizer.backward((weights * torch.tensor(gradient)).sum())
    assert optimizer.step()
    return optimizer.metrics["grad_norm"]


def test_an_overflow_in_fp16_skips_the_whole_step():
    """With an infinite gradient weights, moments, step count and learning rate stay, and the loss scale halves."""
    weights, optimizer = begin(1.0, 2.0, precision="fp16", warmup_steps=9)
    assert push(optimizer, weights, 3.0, 4.0) == pytest.approx(5.0)
    before, moments = weights.detach().clone(), copy.deepcopy(optimizer.adam.state[weights])
    scale = optimizer.scaler.get_scale()

    optimizer.backward(weights.sum())
    weights.grad[0] = math.inf
    assert not optimizer.step()
    skipped = optimizer.metrics
    assert skipped["grad_norm"] == math.inf
    assert torch.equal(weights, before) and weights.grad is None
    after = optimizer.adam.state[weights]
    assert all(torch.equal(after[name], moments[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert optimizer.scaler.get_scale() == scale / 2

    assert push(optimizer, weights, 3.0, 4.0) == pytest.approx(5.0)
    assert not torch.equal(weights, before)
    assert optimizer.adam.state[weights]["step"] == 2
    assert optimizer.metrics["learning_rate"] == skipped["learning_rate"] == pytest.approx(0.02)  # the second of ten
    assert optimizer.scaler.get_scale() == scale / 2


def test_a_norm_that_overflows_though_no_gradient_does():
    """A step says that the weights moved exactly where they did, even if only the norm of the gradient overflows."""
    weights, optimizer = begin(1.0, 2.0, precision="fp16")
    push(optimizer, weights, 3.0, 4.0)
    before = weights.detach().clone()
    optimizer.backward(weights.sum())
    weights.grad.fill_(1e30)
    assert optimizer.step() == (not torch.equal(weights, before))


def test_the_gradient_is_unscaled_before_it_is_clipped():
    """With a loss scale of 65,536, fp16 reports the gradient norm of fp32 to 1 %, and moves the weights like it."""
    model, inputs = torch.nn.Linear(8, 1), torch.randn(16, 8)
    norms, weights = {}, {}
    for precision in ("fp32", "fp16"):
        twin = copy.deepcopy(model)
        twin.device = CPU
        optimizer = Optimizer(twin, 0.1, precision, max_grad_norm=0.01)
        for _ in range(3):
            with optimizer.autocast():
                out = twin(inputs)
            optimizer.backward((out.float() ** 2).mean())
            optimizer.step()
            norms.setdefault(precision, []).append(optimizer.metrics["grad_norm"])
        weights[precision] = twin.weight.detach()
    assert min(norms["fp32"]) > 0.01  # clipping is at work
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.01)
    torch.testing.assert_close(weights["fp16"], weights["fp32"], atol=2e-3, rtol=0)
    assert (weights["fp32"] - model.weight).abs().max() > 0.1


@pytest.mark.parametrize("decay, end", [(0.0, [1.0, -2.0]), (0.5, [0.95, -1.9])])
def test_a_zero_gradient_moves_nothing_but_by_weight_decay(decay, end):
    """Weights shrink by 1 − lr d a step, here 1 − 0.1 · 0.5; by default not at all, where torch has a d of 0.01."""
    weights, optimizer = begin(1.0, -2.0, weight_decay=decay)
    assert push(optimizer, weights, 0.0, 0.0) == 0.0
    assert weights.tolist() == pytest.approx(end, rel=1e-6)


@pytest.mark.parametrize("precision, loss, message", [
    ("fp32", lambda weights: weights.sum() * math.nan, "loss is nan: the run diverged; lower --lr"),
    ("fp16", lambda weights: weights.sum() * math.inf, "loss is inf: the run diverged; lower --lr"),
    ("bf16", lambda weights: weights.sqrt().sum(), "gradient norm is inf"),  # the gradient at 0 is infinite
])  # fmt: skip
def test_numbers_that_are_not_finite_stop_the_run(precision, loss, message):
    """A loss that is not finite raises an error, as does a gradient that no scaler skips, and no weight has moved."""
    weights, optimizer = begin(0.0, 2.0, precision=precision)
    with pytest.raises(UserError, match=message):
        optimizer.backward(loss(weights))
        optimizer.step()
    assert weights.tolist() == [0.0, 2.0]


SCHEDULES = [  # warm-up w, steps until 0, rates
    (0, None, [1, 1, 1, 1]),
    (3, None, [1 / 4, 2 / 4, 3 / 4, 1, 1]),
    (2, 6, [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
    (5, 3, [1 / 6, 2 / 6, 3 / 6, 0]),  # a warm-up longer than the run: what is left of it
]


@pytest.mark.parametrize("warmup, decay, rates", SCHEDULES)
def test_learning_rate_by_hand(warmup, decay, rates):
    """The rate is lr k / (w + 1) in step k of a warm-up of w steps, then constant or linear to 0.

    Adam goes against the gradient, and by the whole rate in every coordinate where the gradient is always the same.
    """
    weights, optimizer = begin(1.0, 2.0, lr=0.5, warmup_steps=warmup, decay_steps=decay)
    for step, rate in enumerate(rates, 1):
        push(optimizer, weights, 3.0, -4.0)
        assert optimizer.metrics["learning_rate"] == pytest.approx(0.5 * rate)
        way = 0.5 * sum(rates[:step])
        assert weights.tolist() == pytest.approx([1.0 - way, 2.0 + way], abs=1e-5)


@pytest.mark.parametrize("limit, clipped", [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0]), (0.0, [3.0, 4.0])])
def test_clipping(limit, clipped):
    """Adam sees a gradient of norm 5 clipped to the limit, where 0 is none; the norm before is what is reported."""
    weights, optimizer = begin(1.0, 2.0, max_grad_norm=limit)
    seen = []
    optimizer.adam.register_step_pre_hook(lambda *_: seen.append(weights.grad.tolist()))
    assert push(optimizer, weights, 3.0, 4.0) == pytest.approx(5.0)
    assert seen == [pytest.approx(clipped, rel=1e-5)]
    assert optimizer.metrics["clipped"] == (limit == 1.0)


def test_gradients_add_up_until_the_step():
    """Several backward calls make one step on the sum of the gradients, and nothing is left over for the next."""
    weights, optimizer = begin(1.0, 2.0, precision="fp16")
    optimizer.backward((weights * torch.tensor([3.0, 0.0])).sum())
    assert push(optimizer, weights, 0.0, 4.0) == pytest.approx(5.0)
    assert push(optimizer, weights, 0.0, 1.0) == pytest.approx(1.0)
    assert optimizer.adam.state[weights]["step"] == 2


@pytest.mark.parametrize("precision, dtype", [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_autocast_computes_in_its_precision(precision, dtype):
    """Matrix products are in half precision, weights and gradients in float32; fp32 changes nothing."""
    model = torch.nn.Linear(4, 4)
    with autocast(CPU, precision):
        out = model(torch.ones(1, 4))
    assert out.dtype == getattr(torch, dtype)
    out.float().sum().backward()
    assert {model.weight.dtype, model.weight.grad.dtype} == {torch.float32}


@pytest.mark.parametrize("name", ["banana", "cuda:99", "cuda:-1", "meta"])
def test_a_device_that_is_not_there(name):
    """A device that is unknown, or that can hold no numbers, is refused by the flag's name."""
    with pytest.raises(UserError, match="--device"):
        resolve_device(RunOptions(device=name))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_auto_is_what_the_machine_has():
    """Without a GPU `auto` is the CPU in fp32, and the options say so; a precision that is named stays."""
    for precision, resolved in (("auto", "fp32"), ("fp16", "fp16")):
        options = RunOptions(precision=precision)
        assert resolve_device(options) == CPU and (options.device, options.precision) == ("cpu", resolved)
