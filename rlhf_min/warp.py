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
    """(Ω, ‖a‖, ‖b‖) of two vectors, each a list of tensors: the angle between them in [0, π] and their norms.

    With unit vectors u and v,  Ω = 2 atan2(‖u − v‖, ‖u + v‖)  in float64, exact also near 0 and π, where
    arccos ⟨u, v⟩ loses half its digits. Ω is 0 where a norm is.
    """
    a, b = [x.double() for x in a], [x.double() for x in b]
    norm_a = math.sqrt(sum((x * x).sum().item() for x in a))
    norm_b = math.sqrt(sum((x * x).sum().item() for x in b))
    if norm_a == 0.0 or norm_b == 0.0:
        return 0.0, norm_a, norm_b
    minus = sum(((x / norm_a - y / norm_b) ** 2).sum().item() for x, y in zip(a, b))
    plus = sum(((x / norm_a + y / norm_b) ** 2).sum().item() for x, y in zip(a, b))
    return 2.0 * math.atan2(math.sqrt(minus), math.sqrt(plus)), norm_a, norm_b


def _slerp_weights(omega, lam):
    """The factors of a and b in slerp(a, b, λ)."""
    if omega < 1e-4:  # (nearly) the same direction, or a zero vector: the limit of the formula, linear
        return 1.0 - lam, lam
    if math.pi - omega < 1e-4:
        raise ValueError("slerp of opposite task vectors is undefined: no direction lies between them")
    return math.sin((1.0 - lam) * omega) / math.sin(omega), math.sin(lam * omega) / math.sin(omega)


def slerp(a, b, lam):
    """Spherical linear interpolation of two *task vectors* (eq. 3 of WARP; Shoemake 1985), along the arc between them:

        slerp(a, b, λ) = sin((1−λ)Ω) / sin Ω · a + sin(λΩ) / sin Ω · b,      Ω = ∠(a, b)

    λ = 0 gives a, λ = 1 gives b; equal norms are kept, where the linear mean would shrink them. a, b: tensors of one
    shape. Returns a new tensor. Raises ValueError for opposite vectors.
    """
    omega, _, _ = angle([a], [b])
    weight_a, weight_b = _slerp_weights(omega, lam)
    return weight_a * a + weight_b * b


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


def merge(init, policies, by="block"):
    """θ_slerp: the policies' task vectors merged along the arc, group by group (Algorithm 1, line 9; eq. 26 for M > 2).

        δ_m = θ_m − θ_init;   acc ← δ_1;   acc ← slerp(acc, δ_m, λ = 1/m) for m = 2..M;   θ_slerp = θ_init + acc

    init: {name: tensor}; policies: M ≥ 1 such dictionaries. Returns a new dictionary. For M = 2 this is λ = ½; for
    more the order matters, and three orthonormal task vectors get the weights (.612, .612, .5), not 1/√3 each.
    """
    if not policies:
        raise ValueError("merge needs at least one policy")
    merged = {}
    for names in group_names(init, by).values():
        acc = [policies[0][name] - init[name] for name in names]
        for m, policy in enumerate(policies[1:], start=2):
            delta = [policy[name] - init[name] for name in names]
            omega, _, _ = angle(acc, delta)
            weight_acc, weight_delta = _slerp_weights(omega, 1.0 / m)
            acc = [weight_acc * a + weight_delta * d for a, d in zip(acc, delta)]
        merged |= {name: init[name] + a for name, a in zip(names, acc)}
    return {name: merged[name] for name in init}


def task_vector_geometry(init, policies, by="block"):
    """How the first two task vectors lie: median and range over the groups of the angle (degrees) and of ‖δ_1‖/‖δ_2‖.

    The paper finds angles near 90° and norm ratios of .95 to 1.15. Groups in which nothing moved are left out; with a
    single policy there is nothing to compare, and both are None.
    """
    angles, ratios = [], []
    for names in group_names(init, by).values() if len(policies) > 1 else ():
        first, second = ([policy[name] - init[name] for name in names] for policy in policies[:2])
        omega, norm_first, norm_second = angle(first, second)
        if norm_first and norm_second:
            angles.append(math.degrees(omega))
            ratios.append(norm_first / norm_second)
    return {"angle_degrees": _spread(angles), "norm_ratio": _spread(ratios)}


def _spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None
