"""Weight averaging on vectors of two to four numbers, whose angles and norms are known."""

import copy
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_min.models import get_weights, set_weights, trained_weights
from rlhf_min.warp import (
    PIECE,
    SMALL,
    angle,
    ema_update,
    group_names,
    inner_products,
    interpolate,
    merge,
    slerp,
    task_vector_geometry,
)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def at(radians, norm=1.0):
    """The vector of the plane in that direction."""
    return vector(norm * math.cos(radians), norm * math.sin(radians))


def close(got, expected, **tolerance):
    torch.testing.assert_close(got, expected, **tolerance)


# EMA


def test_ema_value():
    """T34: (1 − μ) θ_ema + μ θ: at μ = .1 a tenth of the policy."""
    new = ema_update({"w": vector(1.0, 2.0)}, {"w": vector(11.0, -8.0)}, 0.1)
    close(new["w"], vector(2.0, 1.0))  # .9 · 1 + .1 · 11,  .9 · 2 − .1 · 8


def test_ema_limits():
    """T34: μ = 0 leaves the anchor, μ = 1 makes it the policy, both to the bit."""
    ema, policy = {"w": torch.randn(50)}, {"w": torch.randn(50)}
    assert torch.equal(ema_update(ema, policy, 0.0)["w"], ema["w"])
    assert torch.equal(ema_update(ema, policy, 1.0)["w"], policy["w"])


def test_ema_closed_form():
    """T34: after t updates from 0 towards a policy that stays at 1 the anchor is 1 − (1 − μ)^t."""
    ema = {"w": vector(0.0)}
    for _ in range(100):
        ema = ema_update(ema, {"w": vector(1.0)}, 0.01)
    close(ema["w"], vector(1 - 0.99**100))  # .6339677


def test_ema_in_half_precision_does_not_stall():
    """T36: from bfloat16 weights, too, 1000 updates at μ = .001 come within 1e-5 of 1 − .999^1000, kept in float32."""
    ema, policy = {"w": torch.zeros(1, dtype=torch.bfloat16)}, {"w": torch.ones(1, dtype=torch.bfloat16)}
    for _ in range(1000):
        ema = ema_update(ema, policy, 0.001)
    assert ema["w"].dtype == torch.float32
    assert ema["w"].item() == pytest.approx(1 - 0.999**1000, abs=1e-5)  # .63230; in bfloat16 it stops below .26
    assert ema_update({"w": vector(0.0)}, {"w": vector(1.0)}, 0.5)["w"].dtype == torch.float64


def test_ema_is_new_and_has_no_gradient():
    """T34: the anchor carries no graph of the policy, and neither argument changes."""
    ema, policy = {"w": torch.zeros(2)}, {"w": torch.nn.Parameter(torch.ones(2))}
    new = ema_update(ema, policy, 0.5)
    assert not new["w"].requires_grad
    assert ema["w"].tolist() == [0.0, 0.0]
    assert policy["w"].tolist() == [1.0, 1.0]


# LITI


def test_interpolate_orientation():
    """T47: η = .3 goes three tenths of the way from start to end."""
    new = interpolate({"w": vector(10.0), "v": vector(0.0)}, {"w": vector(20.0), "v": vector(-1.0)}, 0.3)
    close(new, {"w": vector(13.0), "v": vector(-0.3)})  # .7 · 10 + .3 · 20


def test_interpolate_ends_to_the_bit():
    """T47: η = 0 gives the start and η = 1 the end, bit for bit in float32, and in new tensors."""
    start, end = {"w": torch.randn(100)}, {"w": 1e3 * torch.randn(100)}
    for weight, expected in ((0.0, start), (1.0, end)):
        new = interpolate(start, end, weight)
        assert torch.equal(new["w"], expected["w"])
        assert new["w"].data_ptr() != expected["w"].data_ptr()


# Angles


@pytest.mark.parametrize("omega", [math.pi / 2, math.pi / 3, 1e-3, 1e-7, 1e-9, math.pi - 1e-7])
def test_angle_is_exact(omega):
    """T42: Ω to nine digits, also where arccos is off (at 1e-9 it gives 0)."""
    assert angle(at(0, 3.0), at(omega, 0.5)) == pytest.approx(omega, rel=1e-9)


def test_angle_near_zero_beats_arccos():
    """T42: at Ω = 1e-8 the cosine rounds to 1, so that arccos ⟨u, v⟩ is wrong by all of it."""
    a, b = at(0), at(1e-8)
    assert math.acos(min(1.0, (a @ b).item())) == 0.0
    assert angle(a, b) == pytest.approx(1e-8, rel=1e-9)


def test_inner_products_over_several_tensors():
    """T41: the tensors of a group make one long vector, whatever their shapes; the others have no part in it."""
    init = {"x": vector(1.0, 1.0), "y": torch.full((2, 1), 3.0, dtype=torch.float64), "z": vector(9.0)}
    a = init | {"x": vector(2.0, 1.0)}
    b = init | {"x": vector(2.0, 1.0), "y": torch.tensor([[4.0], [3.0]], dtype=torch.float64), "z": vector(0.0)}
    # (1, 0, 0, 0) and (1, 0, 1, 0): ‖δ_1‖² = 1, ⟨δ_1, δ_2⟩ = 1, ‖δ_2‖² = 2
    assert inner_products(init, [a, b], ["x", "y"]).tolist() == [[1.0, 1.0], [1.0, 2.0]]


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-12), (torch.float64, 1e-12)])
def test_inner_products_of_large_tensors(dtype, rel):
    """Pieces that come out uneven, in float32 by its own products, in bfloat16 after a subtraction without rounding."""
    start, *ends = (torch.randn(2 * PIECE + SMALL + 3).to(dtype) for _ in range(3))
    deltas = [end.double() - start.double() for end in ends]
    expected = torch.tensor([[(x @ y).item() for x in deltas] for y in deltas], dtype=torch.float64)
    found = inner_products({"w": start}, [{"w": end} for end in ends], ["w"])
    torch.testing.assert_close(found, expected, rtol=0, atol=rel * expected.max().item())


def test_angle_of_float32_weights():
    """T42: float32 vectors are measured in float64: every entry off by one part in 2^20 is an angle of 2^-20."""
    a = torch.ones(10_000)
    b = a + 2**-20 * torch.tensor([1.0, -1.0]).repeat(5_000)  # exact in float32, and b − a is orthogonal to a
    assert angle(a, b) == pytest.approx(2**-20, rel=1e-9)


def test_angle_with_a_zero_vector():
    """T42: a run that moved nothing has no direction: Ω is 0."""
    assert angle(vector(0.0, 0.0), vector(3.0, 4.0)) == 0
    assert angle(vector(3.0, 4.0), vector(0.0, 0.0)) == 0


# SLERP


def test_slerp_on_the_circle():
    """T43: a third of the way from 0° to 90° is 30°, (√3/2, 1/2): λ belongs to the second vector."""
    close(slerp(at(0), at(math.pi / 2), 1 / 3), vector(math.sqrt(3) / 2, 0.5))


def test_slerp_ends_and_symmetry():
    """T43: λ = 0 gives a, λ = 1 gives b, and slerp(a, b, λ) = slerp(b, a, 1 − λ)."""
    a, b = torch.randn(2, 3, 4, dtype=torch.float64)
    close(slerp(a, b, 0.0), a)
    close(slerp(a, b, 1.0), b)
    close(slerp(a, b, 0.2), slerp(b, a, 0.8))


@pytest.mark.parametrize("omega", [2e-4, 0.05, 1.0, math.pi / 2, 3.0])
@pytest.mark.parametrize("lam", [0.2, 0.5])
def test_slerp_keeps_the_norm(omega, lam):
    """T44: equal norms l: slerp keeps l, the linear mean has l √(1 − 2 (1 − cos Ω)(λ − λ²))."""
    length, a, b = 2.5, at(0.4, 2.5), at(0.4 + omega, 2.5)
    assert slerp(a, b, lam).norm().item() == pytest.approx(length, rel=1e-10)
    linear = length * math.sqrt(1 - 2 * (1 - math.cos(omega)) * (lam - lam**2))
    assert interpolate({"w": a}, {"w": b}, lam)["w"].norm().item() == pytest.approx(linear, rel=1e-10)


def test_slerp_of_unequal_norms():
    """T44: at 90° and λ = ½ the norm is √((l1² + l2²)/2); the vectors themselves are averaged, not their directions."""
    close(slerp(vector(1.0, 0.0), vector(0.0, 7.0), 0.5), vector(1.0, 7.0) / math.sqrt(2))  # norm 5 = √((1 + 49)/2)


def test_slerp_of_the_same_direction_is_linear():
    """T42: slerp(u, u) = u, slerp(u, 3u) = (1 + 2λ) u, and from a zero vector the mean is linear."""
    u = torch.randn(5, dtype=torch.float64)
    close(slerp(u, u, 0.3), u)
    close(slerp(u, 3 * u, 0.25), 1.5 * u)
    close(slerp(torch.zeros_like(u), u, 0.3), 0.3 * u)
    close(slerp(u, torch.zeros_like(u), 0.3), 0.7 * u)


def test_slerp_in_float32_is_finite():
    """T42: float32 vectors at 0, 1e-8, ..., 1e-3 from each other give what the linear mean gives, never NaN."""
    u, v = torch.randn(2, 100)
    for distance in (0.0, 1e-8, 1e-6, 1e-4, 1e-3):
        w = u + distance * v
        close(slerp(u, w, 0.5), (u + w) / 2, rtol=1e-5, atol=1e-6)
        assert slerp(u, w, 0.5).dtype == torch.float32


def test_opposite_vectors_are_refused():
    """T42: no direction lies between u and −u; slerp and merge say so instead of dividing by sin π."""
    u = torch.randn(5)
    with pytest.raises(ValueError, match="opposite"):
        slerp(u, -2 * u, 0.5)
    with pytest.raises(ValueError, match="opposite"):
        merge({"w": torch.zeros(5)}, [{"w": u}, {"w": -u}])
    with pytest.raises(ValueError, match="opposite"):
        slerp(at(0), at(math.pi - 5e-3), 0.5)
    close(slerp(at(0), at(math.pi - 0.02), 0.5).norm().item(), 1.0)  # nearly opposite still has an arc


def test_merging_near_opposite_vectors():
    """T42: merge knows Ω from float32 products; down to where it refuses, the point of its arc keeps the norm."""
    u, v = torch.linalg.qr(torch.randn(2 * SMALL, 2)).Q.T.contiguous()  # orthonormal
    for omega in (1e-3, 0.1, math.pi - 0.02):
        w = math.cos(omega) * u + math.sin(omega) * v
        merged = merge({"w": torch.zeros_like(u)}, [{"w": u}, {"w": w}])
        assert merged["w"].norm().item() == pytest.approx(1.0, rel=1e-2)


def test_slerp_leaves_its_inputs():
    """T46: slerp is a new tensor."""
    a, b = at(0), at(1.0)
    before = a.clone(), b.clone()
    slerp(a, b, 0.5).zero_()
    slerp(a, b, 0.0).zero_()
    close((a, b), before)


# Groups


def test_groups_of_gpt2_and_llama(tiny_policy):
    """T41: a block is all tensors of one transformer layer; embeddings and last norm are groups of their own."""
    groups = group_names(trained_weights(tiny_policy))
    outside = {f"transformer.{name}" for name in ("wte", "wpe", "ln_f")}
    assert set(groups) == {"transformer.h.0", "transformer.h.1"} | outside
    assert len(groups["transformer.h.0"]) == 12  # two norms, c_attn, two c_proj, c_fc: weight and bias each
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    groups = group_names(trained_weights(LlamaForCausalLM(config)))
    assert set(groups) == {"model.layers.0", "model.layers.1", "model.embed_tokens", "model.norm", "lm_head"}


def test_group_kinds():
    """T41: block 1 is not block 10, a tensor is a group by tensor, all is one group by model, else an error."""
    names = ["m.h.1.a.w", "m.h.1.a.b", "m.h.10.a.w", "m.ln.w"]
    assert group_names(names) == {"m.h.1": names[:2], "m.h.10": names[2:3], "m.ln": names[3:]}
    assert group_names(names, "tensor") == {name: [name] for name in names}
    assert list(group_names(names, "model").values()) == [names]
    with pytest.raises(KeyError, match="layer"):
        group_names(names, "layer")


# Merging

INIT = {"x": vector(5.0, -5.0, 1.0, 0.0)}


def policies(*deltas):
    """θ_init plus each task vector."""
    return [{"x": INIT["x"] + delta} for delta in deltas]


def orthonormal(m):
    return policies(*torch.eye(4, dtype=torch.float64)[:m])


@pytest.mark.parametrize(
    ("m", "weights"),
    [
        (1, [1.0, 0.0, 0.0, 0.0]),
        # fold 2: λ = 1/2 at 90°: sin 45° = .7071 each
        (2, [0.70711, 0.70711, 0.0, 0.0]),
        # fold 3: λ = 1/3: .7071 · sin 60° = .6124, and sin 30° = .5
        (3, [0.61237, 0.61237, 0.5, 0.0]),
        # fold 4: λ = 1/4: sin 67.5° = .92388 of these, and sin 22.5° = .38268
        (4, [0.56576, 0.56576, 0.46194, 0.38268]),
    ],
)
def test_merge_weights_of_orthonormal_task_vectors(m, weights):
    """T45: M = 1 returns θ_1; every further policy is folded in at λ = 1/m: not 1/√M each, but of norm 1."""
    delta = merge(INIT, orthonormal(m))["x"] - INIT["x"]
    close(delta, vector(*weights), atol=1e-5, rtol=0)
    assert delta.norm().item() == pytest.approx(1.0)


def test_merge_is_slerp_of_task_vectors():
    """T40: moving θ_init and both policies by one constant moves the result by it: weights themselves have no angle."""
    shift = vector(100.0, -3.0, 7.0, 0.5)
    plain = merge(INIT, orthonormal(2))["x"]
    moved = merge({"x": INIT["x"] + shift}, [{"x": p["x"] + shift} for p in orthonormal(2)])["x"]
    close(moved, plain + shift)
    close(plain, INIT["x"] + slerp(*torch.eye(4, dtype=torch.float64)[:2], 0.5))


def test_one_angle_per_group():
    """T41: tensors at 90° and 0° get other weights by tensor (.7071, .5) than with their common angle of 60°."""
    # δ1 = (1, 0 | 1), δ2 = (0, 1 | 1): ⟨δ1, δ2⟩ = 1, norms √2: cos Ω = 1/2; sin 30° / sin 60° = .57735
    init = {"m.h.0.a": vector(0.0, 0.0), "m.h.0.b": vector(0.0)}
    thetas = [
        {"m.h.0.a": vector(1.0, 0.0), "m.h.0.b": vector(1.0)},
        {"m.h.0.a": at(math.pi / 2), "m.h.0.b": vector(1.0)},
    ]
    by_tensor = {"m.h.0.a": vector(0.70711, 0.70711), "m.h.0.b": vector(1.0)}
    common = {"m.h.0.a": vector(0.57735, 0.57735), "m.h.0.b": vector(1.15470)}
    close(merge(init, thetas, "tensor"), by_tensor, atol=1e-5, rtol=0)
    for by in ("block", "model"):
        close(merge(init, thetas, by), common, atol=1e-5, rtol=0)
    close(merge(init, thetas), common, atol=1e-5, rtol=0)  # block is the default


def test_angle_of_the_model_spans_blocks():
    """T41: over two blocks the model's one angle differs from each block's own."""
    init = {"h.0.w": vector(0.0, 0.0), "h.1.w": vector(0.0)}
    thetas = [{"h.0.w": at(0), "h.1.w": vector(1.0)}, {"h.0.w": at(math.pi / 2), "h.1.w": vector(1.0)}]
    close(merge(init, thetas, "block")["h.1.w"], vector(1.0))
    close(merge(init, thetas, "model")["h.1.w"], vector(2 / math.sqrt(3)))


@pytest.mark.parametrize("m", [2, 3, 5])
def test_merge_is_the_fold_of_slerp(m):
    """T45: the merge by inner products alone is acc ← slerp(acc, δ_m, 1/m), over pieces that do not come out even."""
    init = {"a": torch.randn(PIECE + 5000, dtype=torch.float64), "h.0.w": torch.randn(3, 7, dtype=torch.float64)}
    thetas = [{name: w + torch.randn_like(w) + 1 for name, w in init.items()} for _ in range(m)]
    merged = merge(init, thetas)
    for name, start in init.items():
        acc = thetas[0][name] - start
        for count, theta in enumerate(thetas[1:], start=2):
            acc = slerp(acc, theta[name] - start, 1 / count)
        close(merged[name], start + acc)


def test_merge_of_idle_runs():
    """T42: policies that are θ_init still, or all the same, merge to themselves."""
    close(merge(INIT, [INIT, INIT, INIT]), INIT)
    same = policies(vector(1.0, 2.0, 3.0, 4.0)) * 3
    close(merge(INIT, same), same[0])


def test_merge_of_nothing_is_refused():
    """T45: no policies is an error, not θ_init."""
    with pytest.raises(ValueError, match="at least one"):
        merge(INIT, [])


def test_merge_leaves_its_inputs():
    """T46: θ_init and the θ_m are the same after merging, and writing into the result does not reach them."""
    for m in (1, 3):
        init, thetas = copy.deepcopy(INIT), orthonormal(m)
        merge(init, thetas)["x"].zero_()
        close(init, INIT, rtol=0, atol=0)
        close(thetas, orthonormal(m), rtol=0, atol=0)


def test_merge_moves_every_weight_of_gpt2(tiny_policy):
    """T48: every trained name is merged, in its place, the tied embedding once; the head follows, buffers stay."""
    init = get_weights(tiny_policy)
    assert tiny_policy.lm_head.weight is tiny_policy.transformer.wte.weight
    assert "lm_head.weight" not in init
    thetas = [{name: w + 0.1 * torch.randn_like(w) for name, w in init.items()} for _ in range(2)]
    merged = merge(init, thetas, "tensor")
    assert list(merged) == list(init)
    for name in init:
        expected = init[name] + slerp(thetas[0][name] - init[name], thetas[1][name] - init[name], 0.5)
        close(merged[name], expected)
        assert not torch.equal(merged[name], init[name])
    buffers = {name: b.clone() for name, b in tiny_policy.named_buffers()}
    set_weights(tiny_policy, merged)
    assert torch.equal(tiny_policy.lm_head.weight, merged["transformer.wte.weight"])
    close(dict(tiny_policy.named_buffers()), buffers)


def test_merge_ignores_frozen_weights():
    """T48: what is not trained is no part of the dictionaries, and comes through a merge untouched."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4, n_positions=8, n_layer=1, n_embd=8, n_head=1))
    model.transformer.wpe.weight.requires_grad_(False)
    before, init = model.transformer.wpe.weight.clone(), get_weights(model)
    set_weights(model, merge(init, [{name: w + 1 for name, w in init.items()}]))
    assert torch.equal(model.transformer.wpe.weight, before)
    close(model.transformer.ln_f.bias.data, torch.ones(8))  # from 0


# Geometry


def test_geometry_by_hand():
    """T41: angles in degrees and norm ratios first/second over the groups; a group that did not move is left out."""
    init = {f"h.{i}.w": torch.zeros(2) for i in range(4)}
    first = {"h.0.w": at(0, 2.0), "h.1.w": at(0, 1.0), "h.2.w": at(0, 3.0), "h.3.w": vector(0.0, 0.0)}
    second = {"h.0.w": at(math.pi / 2), "h.1.w": at(math.pi / 3, 2.0), "h.2.w": at(math.pi / 6, 3.0), "h.3.w": at(1.0)}
    spread = task_vector_geometry(init, [first, second])
    assert spread["angle_degrees"] == pytest.approx({"median": 60.0, "min": 30.0, "max": 90.0})
    assert spread["norm_ratio"] == pytest.approx({"median": 1.0, "min": 0.5, "max": 2.0})
    # as one vector: ⟨δ1, δ2⟩ = 0 + 1 + 9 · .8660254 = 8.7942286, norms √14 and √15
    ratio = math.sqrt(14 / 15)
    degrees = math.degrees(math.acos(8.7942286 / math.sqrt(14 * 15)))
    whole = task_vector_geometry(init, [first, second], "model")
    assert whole["angle_degrees"] == pytest.approx(dict.fromkeys(("median", "min", "max"), degrees))
    assert whole["norm_ratio"] == pytest.approx(dict.fromkeys(("median", "min", "max"), ratio))


def test_geometry_is_of_task_vectors():
    """T40: the angle is that of θ − θ_init, not of the weights, which all but coincide."""
    spread = task_vector_geometry(INIT, orthonormal(2))
    assert spread["angle_degrees"]["median"] == pytest.approx(90.0)


def test_geometry_of_one_policy():
    """T45: a single run has nothing to compare with: None, and no error."""
    assert task_vector_geometry(INIT, orthonormal(1)) == {"angle_degrees": None, "norm_ratio": None}
