"""Exercise 13: merge three policies. Check it with  python exercises/check.py 13

M runs begin at the same weights θ_init and end in θ¹, ..., θ^M. What run m has learnt is its task vector
δ_m = θ^m − θ_init. SLERP merges two vectors. For more, fold: merge the first two, then merge the result with the third.
"""


def merge(init, policies, slerp):
    """The merged weights.

        δ ← δ_1;      δ ← slerp(δ, δ_m, λ = 1/m)  for m = 2, ..., M;      θ_slerp = θ_init + δ

    init: (n,); policies: a list of M ≥ 1 tensors (n,). slerp(a, b, lam) is given. Returns a new tensor (n,).

    A question to think about first: δ_1, δ_2, δ_3 are orthogonal and have length 1. Is the result δ the same mixture of
    all three? And is its length 1?
    """
    raise NotImplementedError
