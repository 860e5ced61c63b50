"""Devices, mixed precision and the optimizer step."""

import copy
import ctypes
import math
import subprocess
import sys

import pytest
import torch

from rlhf_min.errors import UserError
from rlhf_min.precision import Optimizer, autocast, pick_device, pick_precision

CPU = torch.device("cpu")


def parameter(*values):
    return torch.nn.Parameter(torch.tensor(values))


def push(optimizer, weights, *gradient):
    """One step whose gradient of `weights` is `gradient`."""
    optimizer.backward((weights * torch.tensor(gradient)).sum())
    return optimizer.step()


def test_an_overflow_in_fp16_skips_the_whole_step():
    """T55: with an infinite gradient weights, moments, step count and learning rate stay, and the scale halves."""
    weights = parameter(1.0, 2.0)
    optimizer = Optimizer([weights], 0.1, CPU, "fp16", warmup_steps=9)
    assert push(optimizer, weights, 3.0, 4.0) == (pytest.approx(5.0), True)
    before, moments = weights.detach().clone(), copy.deepcopy(optimizer.adam.state[weights])
    scale = optimizer.scaler.get_scale()

    optimizer.backward(weights.sum())
    weights.grad[0] = math.inf
    grad_norm, moved = optimizer.step()
    assert (grad_norm, moved) == (math.inf, False)
    assert torch.equal(weights, before)
    after = optimizer.adam.state[weights]
    assert all(torch.equal(after[name], moments[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    skipped_lr = optimizer.lr
    assert optimizer.scaler.get_scale() == scale / 2
    assert weights.grad is None

    assert push(optimizer, weights, 3.0, 4.0) == (pytest.approx(5.0), True)
    assert not torch.equal(weights, before)
    assert optimizer.adam.state[weights]["step"] == 2
    assert optimizer.lr == skipped_lr  # the schedule has not moved either: this step has the rate of the skipped one
    assert optimizer.scaler.get_scale() == scale / 2


def test_a_norm_that_overflows_though_no_gradient_does():
    """T55: `moved` is False only where the weights stayed: finite gradients whose norm is infinite must not differ."""
    weights = parameter(1.0, 2.0)
    optimizer = Optimizer([weights], 0.1, CPU, "fp16")
    push(optimizer, weights, 3.0, 4.0)
    before = weights.detach().clone()
    optimizer.backward(weights.sum())
    weights.grad.fill_(1e30)
    _, moved = optimizer.step()
    assert moved == (not torch.equal(weights, before))


def test_the_gradient_is_unscaled_before_it_is_clipped():
    """T55: fp16 with a scale of 65,536 reports the gradient norm of fp32 to 1 %, and moves the weights like it."""
    torch.manual_seed(0)
    model, inputs = torch.nn.Linear(8, 1), torch.randn(16, 8)
    norms, weights = {}, {}
    for precision in ("fp32", "fp16"):
        twin = copy.deepcopy(model)
        optimizer = Optimizer(twin.parameters(), 0.1, CPU, precision, max_grad_norm=0.01)
        for _ in range(3):
            with autocast(CPU, precision):
                out = twin(inputs)
            optimizer.backward((out.float() ** 2).mean())
            norms.setdefault(precision, []).append(optimizer.step()[0])
        weights[precision] = twin.weight.detach()
    assert min(norms["fp32"]) > 0.01  # clipping is at work
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.01)
    torch.testing.assert_close(weights["fp16"], weights["fp32"], atol=2e-3, rtol=0)
    assert (weights["fp32"] - model.weight).abs().max() > 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_zero_gradient_leaves_the_weights_alone(precision):
    """T57: without weight decay, which torch sets to 0.01 unasked, a zero gradient changes nothing."""
    weights = parameter(1.0, -2.0)
    optimizer = Optimizer([weights], 0.1, CPU, precision)
    for _ in range(10):
        assert push(optimizer, weights, 0.0, 0.0) == (0.0, True)
    assert weights.tolist() == [1.0, -2.0]


def test_weight_decay_is_there_where_it_is_asked_for():
    """T57: weight decay d shrinks the weights by 1 − lr d a step."""
    weights = parameter(1.0, -2.0)
    push(Optimizer([weights], 0.1, CPU, "fp32", weight_decay=0.5), weights, 0.0, 0.0)
    assert weights.tolist() == pytest.approx([0.95, -1.9])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_is_not_finite_stops_the_run(value, precision):
    """T58: a loss of NaN or infinity raises with a remedy, and no weight has moved."""
    weights = parameter(1.0, 2.0)
    optimizer = Optimizer([weights], 0.1, CPU, precision)
    with pytest.raises(UserError, match="diverged; lower --lr"):
        optimizer.backward(weights.sum() * value)
    assert weights.tolist() == [1.0, 2.0]
    assert weights.grad is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_stops_the_run(precision):
    """T58: without a scaler to skip the step, a gradient of NaN raises, and no weight has moved."""
    weights = parameter(0.0, 2.0)
    optimizer = Optimizer([weights], 0.1, CPU, precision)
    optimizer.backward(weights.sqrt().sum())  # the gradient at 0 is infinite
    with pytest.raises(UserError, match="gradient norm is"):
        optimizer.step()
    assert weights.tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    "warmup, decay, rates",
    [
        (0, None, [1, 1, 1, 1]),
        (3, None, [1 / 4, 2 / 4, 3 / 4, 1, 1]),
        (0, 4, [1, 3 / 4, 2 / 4, 1 / 4]),
        (2, 6, [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        (5, 3, [1 / 6, 2 / 6, 3 / 6, 0]),  # a warm-up longer than the run: what is left of it
    ],
)
def test_learning_rate_by_hand(warmup, decay, rates):
    """The learning rate of each step: lr k / (w + 1) in the warm-up of w steps, then constant or linear to 0."""
    weights, used = parameter(1.0, 2.0), []
    optimizer = Optimizer([weights], 0.5, CPU, "fp32", warmup, decay)
    for _ in rates:
        push(optimizer, weights, 1.0, 1.0)
        used.append(optimizer.lr)
    assert used == pytest.approx([0.5 * rate for rate in rates])


def test_the_first_step_of_adam_has_the_length_of_the_learning_rate():
    """T12: a step goes against the gradient: Adam's first one by lr in every coordinate."""
    weights = parameter(1.0, 2.0)
    push(Optimizer([weights], 0.1, CPU, "fp32", warmup_steps=1), weights, 3.0, -4.0)
    assert weights.tolist() == pytest.approx([0.95, 2.05])


@pytest.mark.parametrize("limit, clipped", [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])])
def test_clipping(limit, clipped):
    """A gradient of norm 5 is clipped to the limit before Adam sees it; the norm that is reported is the one before."""
    weights, seen = parameter(1.0, 2.0), []
    optimizer = Optimizer([weights], 0.1, CPU, "fp32", max_grad_norm=limit)
    optimizer.adam.register_step_pre_hook(lambda *_: seen.append(weights.grad.tolist()))
    assert push(optimizer, weights, 3.0, 4.0)[0] == pytest.approx(5.0)
    assert seen == [pytest.approx(clipped, rel=1e-5)]


def test_gradients_add_up_until_the_step():
    """Several backward calls are one step on the sum of the gradients, after which nothing is left over."""
    weights = parameter(1.0, 2.0)
    optimizer = Optimizer([weights], 0.1, CPU, "fp16")
    optimizer.backward((weights * torch.tensor([3.0, 0.0])).sum())
    assert push(optimizer, weights, 0.0, 4.0)[0] == pytest.approx(5.0)
    assert push(optimizer, weights, 0.0, 1.0)[0] == pytest.approx(1.0)
    assert optimizer.adam.state[weights]["step"] == 2


def test_frozen_parameters_stay():
    """T12: a parameter that needs no gradient is not given to Adam."""
    weights, frozen = parameter(1.0, 2.0), parameter(3.0)
    frozen.requires_grad = False
    optimizer = Optimizer([weights, frozen], 0.1, CPU, "fp32", weight_decay=0.5)
    push(optimizer, weights, 1.0, 1.0)
    assert frozen.tolist() == [3.0]
    assert optimizer.parameters == [weights]


@pytest.mark.parametrize("precision, dtype", [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_autocast_computes_in_its_precision(precision, dtype):
    """T65: matrix products are in half precision, the weights and their gradients in float32; fp32 changes nothing."""
    model = torch.nn.Linear(4, 4)
    with autocast(CPU, precision):
        out = model(torch.ones(1, 4))
    assert out.dtype == getattr(torch, dtype)
    out.float().sum().backward()
    assert {model.weight.dtype, model.weight.grad.dtype} == {torch.float32}


@pytest.mark.parametrize("name", ["banana", "cuda:99", "cuda:-1", "", "meta"])
def test_a_device_that_is_not_there(name):
    """A device that is unknown, or that can hold no numbers, is refused by the flag's name."""
    with pytest.raises(UserError, match="--device"):
        pick_device(name)


def test_auto_is_what_the_machine_has(monkeypatch):
    """`auto` is the CPU in fp32 without a GPU; bf16 on a GPU that has it, else fp16; any other choice stays."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    assert pick_precision("auto", CPU) == "fp32"
    for supported, precision in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, supported=supported: supported)
        assert pick_precision("auto", torch.device("cuda")) == precision
    assert pick_precision("fp16", CPU) == "fp16"


def test_the_memory_of_large_tensors_is_kept():
    """Page faults of a second tensor of 64 MB, 16,384 pages: one a page if it is new, none if it is the first's."""
    code = """if True:
        import resource, torch
        from rlhf_min.precision import keep_memory
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        def second():
            torch.ones(2**24)
            before = faults()
            torch.ones(2**24)
            return faults() - before
        new = second()
        keep_memory()
        print(new, min(second() for _ in range(5)))"""  # older glibcs now and then place one anew
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("no glibc")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new, kept = map(int, run.stdout.split())
    assert new > 20 * max(kept, 1)
