"""Exercise 10: E, σ, and what a weight f(σ) does to the gradient. Check it with  python exercises/check.py 10

A distribution over ratings has a mean E, which is the reward, and a standard deviation σ, which says how unsure the
reward model is. It is tempting to trust unsure rewards less: A = (R − b) f(σ), with f(σ) = 1 / (1 + σ).
"""


def rating_mean_std(logits):
    """Mean and standard deviation of the rating.

        E = Σ_k k p(k),      σ² = Σ_k (k − E)² p(k),      k = 1, ..., K,      p = softmax(logits)

    logits: (B, K). Returns (E, σ), each (B,).
    A number to start with: for K = 10 and all logits 0, E = 5.5 and σ = √8.25 = 2.872.
    Make it robust: σ must also be right where p is nearly sure of one rating.
    """
    raise NotImplementedError


def bias_of_sigma_weight(logp, sigma, baseline):
    """How much the expected step changes when the baseline is b instead of 0.

        step(b) = Σ_y π(y) (R(y) − b) f(σ(y)) ∇ log π(y),      bias = step(b) − step(0)

    R drops out of the difference. Without f the bias would be 0, because Σ_y π(y) ∇ log π(y) = 0.

    There are n possible answers y. The policy is a softmax of n numbers z, one for each answer, and ∇ is the gradient
    with respect to z: ∂ log π(y) / ∂z_i = 1[y = i] − π(i). logp: (n,), log π(y) of all answers; sigma: (n,), σ(y);
    baseline: b, a number. Returns (n,), the bias.

    A number to start with: two answers with π = ½, σ = 0 and 1, so f = 1 and ½, and b = 1 give a bias of (−⅛, ⅛).
    """
    raise NotImplementedError
