"""Weight averaging of WARP (Ramé et al., 2406.16768) on weights as {name: tensor}.

Every function returns new values and leaves its inputs alone. A *task vector* is δ = θ − θ_init.
"""

import math
import re
import statistics

import torch


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
    """(Ω, ‖a‖, ‖b‖): the angle between two tensors of one shape, in [0, π], and their norms.

    With unit vectors u and v,  Ω = 2 atan2(‖u − v‖, ‖u + v‖)  in float64, exact also near 0 and π, where
    arccos ⟨u, v⟩ loses half its digits. Ω is 0 where a norm is.
    """
    a, b = a.double(), b.double()
    norm_a, norm_b = a.norm().item(), b.norm().item()
    if norm_a == 0.0 or norm_b == 0.0:
        return 0.0, norm_a, norm_b
    u, v = a / norm_a, b / norm_b
    return 2.0 * math.atan2((u - v).norm().item(), (u + v).norm().item()), norm_a, norm_b


def slerp(a, b, lam):
    """Spherical linear interpolation of two *task vectors* (eq. 3 of WARP; Shoemake 1985), along the arc between them:

        slerp(a, b, λ) = [ sin((1−λ)Ω) a + sin(λΩ) b ] / sin Ω,      Ω = ∠(a, b)

    λ = 0 gives a, λ = 1 gives b; equal norms are kept, where the linear mean would shrink them. a, b: tensors of one
    shape. Returns a new tensor. Raises ValueError for opposite vectors.
    """
    omega, _, _ = angle(a, b)
    if omega < 1e-4:  # (nearly) the same direction, or a zero vector: the limit of the formula, linear
        return (1.0 - lam) * a + lam * b
    if math.pi - omega < 1e-4:
        raise ValueError("slerp of opposite task vectors is undefined: no direction lies between them")
    return (math.sin((1.0 - lam) * omega) * a + math.sin(lam * omega) * b) / math.sin(omega)


def group_names(names, by="block"):
    """Names that share one angle, {group: [name]}: a transformer block (WARP's "layer"), a tensor, or the whole model.

    Outside the blocks a module is a group of its own, e.g. an embedding or the last norm.
    """
    groups = {}
    for name in names:
        if by == "block":
            block = re.match(r".*?\.\d+(?=\.)", name)
            group = block.group() if block else name.rpartition(".")[0]
        elif by in ("tensor", "model"):
            group = name if by == "tensor" else "model"
        else:
            raise ValueError(f"by must be block, tensor or model, not {by!r}")
        groups.setdefault(group, []).append(name)
    return groups


def task_vector(policy, init, names):
    """δ = θ − θ_init of the named tensors, flattened into one vector (n,)."""
    return torch.cat([(policy[name] - init[name]).flatten() for name in names])


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
        acc, *deltas = (task_vector(policy, init, names) for policy in policies)  # (n,) each
        for m, delta in enumerate(deltas, start=2):
            acc = slerp(acc, delta, 1.0 / m)
        pieces = acc.split([init[name].numel() for name in names])
        merged |= {name: init[name] + piece.view_as(init[name]) for name, piece in zip(names, pieces)}
    return {name: merged[name] for name in init}


def task_vector_geometry(init, policies, by="block"):
    """How the first two task vectors lie: median and range over the groups of the angle (degrees) and of ‖δ_1‖/‖δ_2‖.

    The paper finds angles near 90° and norm ratios of .95 to 1.15. Groups in which nothing moved are left out; with a
    single policy there is nothing to compare, and both are None.
    """
    angles, ratios = [], []
    for names in group_names(init, by).values() if len(policies) > 1 else ():
        omega, norm_1, norm_2 = angle(*(task_vector(policy, init, names) for policy in policies[:2]))
        if norm_1 and norm_2:
            angles.append(math.degrees(omega))
            ratios.append(norm_1 / norm_2)
    return {"angle_degrees": _spread(angles), "norm_ratio": _spread(ratios)}


def _spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None
