"""Weight averaging of WARP (Ramé et al., 2406.16768) on weights as {name: tensor}.

A *task vector* is δ = θ − θ_init, what a run has learnt. Every function returns new values and leaves its inputs alone.
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
        new[name] = torch.lerp(old.to(dtype), policy[name].detach().to(dtype), mu)  # the shape of the weight
    return new


def interpolate(start, end, weight):
    """Linear interpolation of weights, (1 − w) θ_start + w θ_end; LITI with w = η (section 3.3).

    start, end: {name: tensor}. Returns a new dictionary. w = 0 gives `start` and w = 1 gives `end`, to the bit.
    """
    return {name: torch.lerp(start[name], end[name], weight) for name in start}


def angle(a, b):
    """Ω, the angle between two tensors of one shape, a float in [0, π].

    With unit vectors u and v,  Ω = 2 atan2(‖u − v‖, ‖u + v‖)  in float64. This is exact also near 0 and π, where
    arccos ⟨u, v⟩ loses half its digits. Ω is 0 where a norm is.
    """
    a, b = a.double(), b.double()  # any shape
    norm_a, norm_b = a.norm().item(), b.norm().item()
    if norm_a == 0.0 or norm_b == 0.0:
        return 0.0
    u, v = a / norm_a, b / norm_b  # that shape
    return 2.0 * math.atan2((u - v).norm().item(), (u + v).norm().item())


def slerp(a, b, lam):
    """Spherical linear interpolation of two *task vectors* (eq. 3 of WARP; Shoemake 1985), along the arc between them:

        slerp(a, b, λ) = [ sin((1−λ)Ω) a + sin(λΩ) b ] / sin Ω,      Ω = ∠(a, b)

    λ = 0 gives a, λ = 1 gives b. Equal norms are kept, where the linear mean would shrink them. a, b: tensors of one
    shape. Returns a new tensor. Raises ValueError for opposite vectors: no direction lies between them.
    """
    omega = angle(a, b)
    if omega < 1e-4:  # (nearly) the same direction, or a zero vector: the limit of the formula
        return (1.0 - lam) * a + lam * b
    if math.pi - omega < 1e-2:
        raise ValueError("slerp of opposite task vectors is undefined: no direction lies between them")
    return (math.sin((1.0 - lam) * omega) * a + math.sin(lam * omega) * b) / math.sin(omega)


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


def task_vector(init, policy, names):
    """δ = θ − θ_init over the named tensors, as one vector: {name: tensor} × 2 → (n,)."""
    return torch.cat([(policy[name] - init[name]).flatten() for name in names])


def merge(init, policies, by="block", how="slerp"):
    """θ_slerp: the policies' task vectors folded one after the other, group by group (Algorithm 1; eq. 26 for M > 2).

        δ ← δ_1;   δ ← slerp(δ, δ_m, λ = 1/m)  for m = 2..M;   θ_slerp = θ_init + δ,      δ_m = θ^m − θ_init

    For M = 2 this is λ = ½. For more the order matters: three orthonormal task vectors get the weights (.612, .612,
    .5), not 1/√3 each. With how = "linear" the fold is the plain mean. init: {name: tensor}; policies: M ≥ 1 such
    dictionaries. Returns a new dictionary.
    """
    fold = {"slerp": slerp, "linear": torch.lerp}[how]
    merged = {}
    for names in group_names(init, by).values():
        delta, *others = (task_vector(init, policy, names) for policy in policies)  # (n,) each
        for m, other in enumerate(others, start=2):
            delta = fold(delta, other, 1 / m)  # (n,)
        parts = delta.split([init[name].numel() for name in names])  # (n_i,) each
        merged |= {name: init[name] + part.view_as(init[name]) for name, part in zip(names, parts)}
    return merged


def task_vector_geometry(init, policies, by="block"):
    """How the first two task vectors lie: median and range over the groups of the angle (degrees) and of ‖δ_1‖/‖δ_2‖.

    The paper finds angles near 90° and norm ratios of .95 to 1.15. Groups in which nothing moved are left out. With a
    single policy there is nothing to compare, and both are None.
    """
    angles, ratios = [], []
    for names in group_names(init, by).values() if len(policies) > 1 else ():
        a, b = (task_vector(init, policy, names).double() for policy in policies[:2])  # (n,), (n,)
        if a.any() and b.any():
            angles.append(math.degrees(angle(a, b)))
            ratios.append((a.norm() / b.norm()).item())
    return {"angle_degrees": _spread(angles), "norm_ratio": _spread(ratios)}


def _spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None
