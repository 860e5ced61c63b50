"""Weight averaging on vectors of two to four numbers, whose angles and norms are known."""

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_min.support.models import trained_weights
from rlhf_min.warp import angle, ema_update, group_names, interpolate, merge, slerp, task_vector_geometry


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def at(radians, norm=1.0):
    """The vector of the plane in that direction."""
    return vector(norm * math.cos(radians), norm * math.sin(radians))


def close(got, expected, **tolerance):
    torch.testing.assert_close(got, expected, **tolerance)


# EMA and LITI


@pytest.mark.parametrize("average", [interpolate, ema_update])
def test_averages_by_hand(average):
    """The weight .1, be it η or μ, goes a tenth of the way from the first weights to the second."""
    new = average({"w": vector(1.0, 2.0), "v": vector(10.0)}, {"w": vector(11.0, -8.0), "v": vector(20.0)}, 0.1)
    close(new, {"w": vector(2.0, 1.0), "v": vector(11.0)})  # .9 · 1 + .1 · 11,  .9 · 2 − .1 · 8,  .9 · 10 + .1 · 20


def test_ema_in_half_precision_does_not_stall():
    """From bfloat16 weights, too, 1000 updates at μ = .001 come within 1e-5 of 1 − .999^1000, kept in float32."""
    ema, policy = {"w": torch.zeros(1, dtype=torch.bfloat16)}, {"w": torch.ones(1, dtype=torch.bfloat16)}
    for _ in range(1000):
        ema = ema_update(ema, policy, 0.001)
    assert ema["w"].dtype == torch.float32
    assert ema["w"].item() == pytest.approx(1 - 0.999**1000, abs=1e-5)  # .63230; in bfloat16 it stops below .26


def test_ema_is_new_and_has_no_gradient():
    """The anchor carries no graph of the policy, and neither argument changes."""
    ema, policy = {"w": torch.zeros(2)}, {"w": torch.nn.Parameter(torch.ones(2))}
    assert not ema_update(ema, policy, 0.5)["w"].requires_grad
    assert (ema["w"].tolist(), policy["w"].tolist()) == ([0.0, 0.0], [1.0, 1.0])


@pytest.mark.parametrize("average", [interpolate, ema_update])
def test_averages_have_their_ends_to_the_bit(average):
    """A weight of 0 gives the start and a weight of 1 the end, bit for bit in float32, in new tensors."""
    start, end = {"w": torch.randn(100)}, {"w": 1e3 * torch.randn(100)}
    for weight, expected in ((0.0, start), (1.0, end)):
        new = average(start, end, weight)
        assert torch.equal(new["w"], expected["w"])
        assert new["w"].data_ptr() != expected["w"].data_ptr()


# Angles


@pytest.mark.parametrize("omega", [math.pi / 2, math.pi / 3, 1e-3, 1e-8, math.pi - 1e-7])
def test_angle_is_exact(omega):
    """The angle has nine digits, also at 1e-8, where the cosine rounds to 1, so that arccos gives 0."""
    assert angle(at(0, 3.0), at(omega, 0.5)) == pytest.approx(omega, rel=1e-9)
    assert math.acos(min(1.0, (at(0) @ at(1e-8)).item())) == 0.0


def test_angle_of_float32_weights():
    """Float32 vectors are measured in float64: every entry off by one part in 2^20 is an angle of 2^-20."""
    a = torch.ones(10_000)
    b = a + 2**-20 * torch.tensor([1.0, -1.0]).repeat(5_000)  # exact in float32, and b − a is orthogonal to a
    assert angle(a, b) == pytest.approx(2**-20, rel=1e-9)


# SLERP


def test_slerp_on_the_circle():
    """A third of the way from 0° to 90° is 30°, (√3/2, 1/2): λ belongs to the second vector."""
    close(slerp(at(0), at(math.pi / 2), 1 / 3), vector(math.sqrt(3) / 2, 0.5))


@pytest.mark.parametrize("omega", [2e-4, 0.05, 1.0, math.pi / 2, 3.0])
@pytest.mark.parametrize("lam", [0.2, 0.5])
def test_slerp_keeps_the_norm(omega, lam):
    """Between equal norms l slerp keeps l, and the linear mean has l √(1 − 2 (1 − cos Ω)(λ − λ²))."""
    length, a, b = 2.5, at(0.4, 2.5), at(0.4 + omega, 2.5)
    assert slerp(a, b, lam).norm().item() == pytest.approx(length, rel=1e-10)
    linear = length * math.sqrt(1 - 2 * (1 - math.cos(omega)) * (lam - lam**2))
    assert interpolate({"w": a}, {"w": b}, lam)["w"].norm().item() == pytest.approx(linear, rel=1e-10)


def test_slerp_of_unequal_norms():
    """At 90° and λ = ½ the norm is √((l1² + l2²)/2): the vectors themselves are averaged, not their directions."""
    close(slerp(vector(1.0, 0.0), vector(0.0, 7.0), 0.5), vector(1.0, 7.0) / math.sqrt(2))  # norm 5 = √((1 + 49)/2)


def test_slerp_of_the_same_direction_is_linear():
    """Between u and 3u, and from or to a zero vector, slerp is the linear mean."""
    u = torch.randn(5, dtype=torch.float64)
    close(slerp(u, 3 * u, 0.25), 1.5 * u)
    close(slerp(torch.zeros_like(u), u, 0.3), 0.3 * u)
    close(slerp(u, torch.zeros_like(u), 0.3), 0.7 * u)


def test_opposite_vectors_are_refused():
    """No direction lies between u and −u; slerp and merge say so instead of dividing by sin π."""
    u = torch.randn(5)
    for refused in (
        lambda: slerp(u, -2 * u, 0.5),
        lambda: merge({"w": torch.zeros(5)}, [{"w": u}, {"w": -u}]),
        lambda: slerp(at(0), at(math.pi - 5e-3), 0.5),
    ):
        with pytest.raises(ValueError, match="opposite"):
            refused()
    close(slerp(at(0), at(math.pi - 0.02), 0.5).norm().item(), 1.0)  # nearly opposite still has an arc


# Groups


def test_groups_of_gpt2_and_llama(tiny_policy):
    """A block is all tensors of one transformer layer; embeddings and last norm are groups of their own."""
    groups = group_names(trained_weights(tiny_policy))
    outside = {f"transformer.{name}" for name in ("wte", "wpe", "ln_f")}
    assert set(groups) == {"transformer.h.0", "transformer.h.1"} | outside
    assert len(groups["transformer.h.0"]) == 12  # two norms, c_attn, two c_proj, c_fc: weight and bias each
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    groups = group_names(trained_weights(LlamaForCausalLM(config)))
    assert set(groups) == {"model.layers.0", "model.layers.1", "model.embed_tokens", "model.norm", "lm_head"}


def test_group_kinds():
    """Block 1 is not block 10; a group by tensor is a tensor, and a group by model is all of them."""
    names = ["m.h.1.a.w", "m.h.1.a.b", "m.h.10.a.w", "m.ln.w"]
    assert group_names(names) == {"m.h.1": names[:2], "m.h.10": names[2:3], "m.ln": names[3:]}
    assert group_names(names, "tensor") == {name: [name] for name in names}
    assert list(group_names(names, "model").values()) == [names]


# Merging

INIT = {"x": vector(5.0, -5.0, 1.0, 0.0)}


def orthonormal(m):
    """The policies θ_init + e_1, ..., θ_init + e_m."""
    return [{"x": INIT["x"] + delta} for delta in torch.eye(4, dtype=torch.float64)[:m]]


@pytest.mark.parametrize("m, weights", [
    (1, [1.0, 0.0, 0.0, 0.0]),
    # fold 2: λ = 1/2 at 90°: sin 45° = .7071 each
    (2, [0.70711, 0.70711, 0.0, 0.0]),
    # fold 3: λ = 1/3: .7071 · sin 60° = .6124, and sin 30° = .5
    (3, [0.61237, 0.61237, 0.5, 0.0]),
    # fold 4: λ = 1/4: sin 67.5° = .92388 of these, and sin 22.5° = .38268
    (4, [0.56576, 0.56576, 0.46194, 0.38268]),
])  # fmt: skip
def test_merge_weights_of_orthonormal_task_vectors(m, weights):
    """Slerp folds the m-th policy in at λ = 1/m: not 1/√M each, but of norm 1; how="linear" gives each exactly 1/M."""
    delta = merge(INIT, orthonormal(m))["x"] - INIT["x"]
    close(delta, vector(*weights), atol=1e-5, rtol=0)
    assert delta.norm().item() == pytest.approx(1.0)
    close(merge(INIT, orthonormal(m), how="linear")["x"] - INIT["x"], vector(*[1 / m] * m, *[0.0] * (4 - m)))


def test_one_angle_per_group():
    """Tensors at 90° and 0° get other weights by tensor (.7071, .5) than with their common angle of 60°."""
    # δ1 = (1, 0 | 1), δ2 = (0, 1 | 1): ⟨δ1, δ2⟩ = 1, norms √2: cos Ω = 1/2; sin 30° / sin 60° = .57735
    init = {"m.h.0.a": vector(0.0, 0.0), "m.h.0.b": vector(0.0)}
    thetas = [{"m.h.0.a": at(angle), "m.h.0.b": vector(1.0)} for angle in (0.0, math.pi / 2)]
    by_tensor = {"m.h.0.a": vector(0.70711, 0.70711), "m.h.0.b": vector(1.0)}
    common = {"m.h.0.a": vector(0.57735, 0.57735), "m.h.0.b": vector(1.15470)}
    close(merge(init, thetas, "tensor"), by_tensor, atol=1e-5, rtol=0)
    for by in ([], ["block"], ["model"]):  # block is the default
        close(merge(init, thetas, *by), common, atol=1e-5, rtol=0)


def test_merge_leaves_its_inputs():
    """The inputs stay the same after merging, and writing into the result does not reach them."""
    for m in (1, 3):
        init, thetas = copy.deepcopy(INIT), orthonormal(m)
        merge(init, thetas)["x"].zero_()
        close((init, thetas), (INIT, orthonormal(m)), rtol=0, atol=0)


# Geometry


def test_geometry_by_hand():
    """The geometry is of angles in degrees and norm ratios over the groups; one that did not move is left out."""
    init = {f"h.{i}.w": torch.zeros(2) for i in range(4)}
    first = {"h.0.w": at(0, 2.0), "h.1.w": at(0, 1.0), "h.2.w": at(0, 3.0), "h.3.w": vector(0.0, 0.0)}
    second = {"h.0.w": at(math.pi / 2), "h.1.w": at(math.pi / 3, 2.0), "h.2.w": at(math.pi / 6, 3.0), "h.3.w": at(1.0)}
    spread = task_vector_geometry(init, [first, second])
    assert spread["angle_degrees"] == pytest.approx({"median": 60.0, "min": 30.0, "max": 90.0})
    assert spread["norm_ratio"] == pytest.approx({"median": 1.0, "min": 0.5, "max": 2.0})
    # as one vector: ⟨δ1, δ2⟩ = 0 + 1 + 9 · .8660254 = 8.7942286, norms √14 and √15 (1, 4, 9 and 1 of h.3)
    whole = task_vector_geometry(init, [first, second], "model")
    degrees = math.degrees(math.acos(8.7942286 / math.sqrt(14 * 15)))
    assert whole["angle_degrees"] == pytest.approx(dict.fromkeys(("median", "min", "max"), degrees))
    assert whole["norm_ratio"] == pytest.approx(dict.fromkeys(("median", "min", "max"), math.sqrt(14 / 15)))


def test_geometry_is_of_task_vectors():
    """The angle is that of θ − θ_init, not of the weights, which all but coincide; a single run has none."""
    assert task_vector_geometry(INIT, orthonormal(2))["angle_degrees"]["median"] == pytest.approx(90.0)
    assert task_vector_geometry(INIT, orthonormal(1)) == {"angle_degrees": None, "norm_ratio": None}
