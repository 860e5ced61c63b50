"""Exercise 7: three estimates of one KL divergence. Check it with  python exercises/check.py 7

KL(π ‖ π_ref) = E_{y~π}[ log π(y) − log π_ref(y) ] says how far the policy π is from a reference π_ref. The sum over all
answers is too long, so it is estimated from answers that were drawn *from π*. Write d = log π(y) − log π_ref(y).
"""


def kl_estimates(logp, ref_logp):
    """Three estimates per answer.

        k1 = d            k2 = d² / 2            k3 = e^s − 1 − s

    What is s in k3? Choose its sign so that E_{y~π}[k3] is KL(π ‖ π_ref). Hint: Σ_y π(y) e^s must be 1.

    logp, ref_logp: (B,), log π(y) and log π_ref(y) of answers that were drawn from π. Returns (k1, k2, k3), each (B,).
    Keep the gradient: PyTorch must be able to differentiate what you return.
    """
    raise NotImplementedError


# Some libraries do not put the estimate into the reward. They add it to the loss, and PyTorch differentiates it. The
# answers are drawn already, so the expected gradient is Σ_y π(y) ∇k(y), and π(y) in front is a constant. What is this
# the gradient of? Put one of "nothing", "KL(π ‖ π_ref)", "KL(π_ref ‖ π)" in place of each "". "nothing" means that it
# is 0. Pen and paper help: ∇k = (∂k/∂d) ∇ log π(y), and Σ_y π(y) ∇ log π(y) = 0.
GRADIENT_OF = {"k1": "", "k2": "", "k3": ""}
