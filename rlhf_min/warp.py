"""Weight averaging of WARP (Ramé et al., 2406.16768) on weights as {name: tensor}.

Every function returns new values and leaves its inputs alone. A *task vector* is δ = θ − θ_init.
"""

import math
import re
import statistics

import torch

PIECE = 2**19  # numbers of a tensor that are worked on at a time, so that they stay in a cache
SMALL = 2**17  # below, a product in float64 costs next to nothing


def ema_update(ema, policy, mu):
    """Exponential moving average of weights, taken after each step:  θ_ema ← (1 − μ) θ_ema + μ θ  (section 3.1).

    ema, policy: {name: tensor}. Returns a new dictionary in float32 (or float64): in bfloat16 a small μ would round
    to no update at all.
    """
    new = {}
    for name, old in ema.items():
        dtype = torch.promote_types(old.dtype, torch.float32)
        new[name] = torch.lerp(old.to(dtype), policy[name].detach().to(dtype), mu)
    return new


def interpolate(start, end, weight):
    """Linear interpolation of weights, (1 − w) θ_start + w θ_end; LITI with w = η (section 3.3).

    start, end: {name: tensor}. Returns a new dictionary; w = 0 gives `start`, w = 1 gives `end`, to the bit.
    """
    return {name: torch.lerp(start[name], end[name], weight) for name in start}


def angle(a, b):
    """Ω, the angle between two tensors of one shape, in [0, π].

    With unit vectors u and v,  Ω = 2 atan2(‖u − v‖, ‖u + v‖)  in float64, exact also near 0 and π, where
    arccos ⟨u, v⟩ loses half its digits. Ω is 0 where a norm is.
    """
    a, b = a.double(), b.double()
    norm_a, norm_b = a.norm().item(), b.norm().item()
    if norm_a == 0.0 or norm_b == 0.0:
        return 0.0
    u, v = a / norm_a, b / norm_b
    return 2.0 * math.atan2((u - v).norm().item(), (u + v).norm().item())


def slerp(a, b, lam):
    """Spherical linear interpolation of two *task vectors* (eq. 3 of WARP; Shoemake 1985), along the arc between them:

        slerp(a, b, λ) = [ sin((1−λ)Ω) a + sin(λΩ) b ] / sin Ω,      Ω = ∠(a, b)

    λ = 0 gives a, λ = 1 gives b; equal norms are kept, where the linear mean would shrink them. a, b: tensors of one
    shape. Returns a new tensor. Raises ValueError for vectors that are opposite, or nearly. `merge` folds this over M
    task vectors, from their inner products alone.
    """
    keep, take = _arc_weights(angle(a, b), lam)
    return keep * a + take * b


def _arc_weights(omega, lam):
    """sin((1−λ)Ω) / sin Ω and sin(λΩ) / sin Ω; ValueError near Ω = π, where no arc is the shortest."""
    if omega < 1e-4:  # (nearly) the same direction, or a zero vector: the limit of the formula, linear
        return 1.0 - lam, lam
    if math.pi - omega < 1e-2:
        raise ValueError("slerp of opposite task vectors is undefined: no direction lies between them")
    return math.sin((1.0 - lam) * omega) / math.sin(omega), math.sin(lam * omega) / math.sin(omega)


def group_names(names, by="block"):
    """Names that share one angle, {group: [name]}: a transformer block (WARP's "layer"), a tensor, or the whole model.

    Outside the blocks a module is a group of its own, e.g. an embedding or the last norm.
    """
    groups = {}
    for name in names:
        block = re.match(r".*?\.\d+(?=\.)", name)
        group = {"block": block.group() if block else name.rpartition(".")[0], "tensor": name, "model": "model"}
        groups.setdefault(group[by], []).append(name)
    return groups


def inner_products(init, policies, names):
    """The Gram matrix G_ij = ⟨δ_i, δ_j⟩ of the policies' task vectors over the named tensors: (M, M), float64.

    In pieces that fit a cache, whose products are added up in float64; small ones are multiplied in it, too, and so
    are weights in other than float32.
    """
    count, some = len(policies), init[names[0]]
    lower, products = torch.tril_indices(count, count), []
    buffers = torch.empty(count, PIECE, device=some.device)  # the same again and again: new memory costs more
    for name in names:
        for start, *ends in _pieces(weights[name] for weights in (init, *policies)):
            if len(start) < SMALL or start.dtype != torch.float32:
                deltas = [end.double() - start for end in ends]  # (n,) each
            else:
                deltas = [torch.sub(end, start, out=delta) for end, delta in zip(ends, buffers[:, : len(start)])]
            products.append(torch.stack([torch.dot(deltas[i], deltas[j]) for i, j in zip(*lower.tolist())]).double())
    gram = torch.zeros(count, count, dtype=torch.float64, device=some.device)
    gram[*lower] = torch.stack(products).sum(0)
    return gram + gram.tril(-1).T


def combine(init, policies, coefficients):
    """θ_init + Σ_m c_m δ_m = (1 − Σ_m c_m) θ_init + Σ_m c_m θ_m of one tensor, as a new one."""
    result = torch.empty(init.shape, dtype=init.dtype, device=init.device)
    for out, start, *ends in _pieces((result, init, *policies)):
        torch.mul(start, 1.0 - sum(coefficients), out=out)
        for c, end in zip(coefficients, ends):
            out.add_(end, alpha=c)
    return result


def _pieces(tensors):
    """Yield the same PIECE numbers of each tensor, (n,) each; of a contiguous one, they are views."""
    return zip(*(tensor.flatten().split(PIECE) for tensor in tensors))


def slerp_coefficients(gram):
    """c_m of the merged task vector Σ_m c_m δ_m, M numbers, from the inner products (M, M) of the δ_m.

    The vector that is merged so far is a combination of the δ_m, so the angle to the next one needs no more than G:
    ‖acc‖² = cᵀ G c and ⟨acc, δ_m⟩ = (G c)_m.
    """
    gram, count = gram.tolist(), len(gram)
    c = [1.0] + [0.0] * (count - 1)
    for m in range(1, count):
        products = [math.fsum(gram[i][j] * c[j] for j in range(count)) for i in range(count)]  # G c
        square = math.fsum(c[i] * products[i] for i in range(count))
        keep, take = _arc_weights(_angle_of(square, gram[m][m], products[m]), 1.0 / (m + 1))
        c = [keep * c[i] for i in range(m)] + [take] + [0.0] * (count - m - 1)
    return c


def _angle_of(square_a, square_b, product):
    """∠(a, b) from ‖a‖², ‖b‖² and ⟨a, b⟩; 0 where a norm is.

    Products of float32 weights are good to 1e-7, so Ω is to some 5e-4 near 0, where SLERP is linear anyway, and near
    π, where it is refused.
    """
    if square_a <= 0.0 or square_b <= 0.0:
        return 0.0
    return math.atan2(math.sqrt(max(0.0, square_a * square_b - product**2)), product)


def merge(init, policies, by="block"):
    """θ_slerp: the policies' task vectors merged along the arc, group by group (Algorithm 1; eq. 26 for M > 2).

        δ_m = θ_m − θ_init;   acc ← δ_1;   acc ← slerp(acc, δ_m, λ = 1/m) for m = 2..M;   θ_slerp = θ_init + acc

    init: {name: tensor}; policies: M ≥ 1 such dictionaries. Returns a new dictionary. For M = 2 this is λ = ½; for
    more the order matters, and three orthonormal task vectors get the weights (.612, .612, .5), not 1/√3 each.
    """
    if not policies:
        raise ValueError("merge needs at least one policy")
    merged = {}
    for names in group_names(init, by).values():
        coefficients = slerp_coefficients(inner_products(init, policies, names))
        merged |= {name: combine(init[name], [policy[name] for policy in policies], coefficients) for name in names}
    return {name: merged[name] for name in init}


def task_vector_geometry(init, policies, by="block"):
    """How the first two task vectors lie: median and range over the groups of the angle (degrees) and of ‖δ_1‖/‖δ_2‖.

    The paper finds angles near 90° and norm ratios of .95 to 1.15. Groups in which nothing moved are left out; with a
    single policy there is nothing to compare, and both are None.
    """
    angles, ratios = [], []
    for names in group_names(init, by).values() if len(policies) > 1 else ():
        (square_1, product), (_, square_2) = inner_products(init, policies[:2], names).tolist()
        if square_1 and square_2:
            angles.append(math.degrees(_angle_of(square_1, square_2, product)))
            ratios.append(math.sqrt(square_1 / square_2))
    return {"angle_degrees": _spread(angles), "norm_ratio": _spread(ratios)}


def _spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None
