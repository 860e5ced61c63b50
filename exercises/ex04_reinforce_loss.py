"""Exercise 4: the loss of REINFORCE. Check it with  python exercises/check.py 4

An answer that was better than expected has an advantage A > 0, and the policy should make it more likely. PyTorch's
optimizers go downhill on a loss. So we need a loss whose gradient, with a minus, is the step that we want.
"""


def reinforce_loss(logprobs, advantage, mask):
    """A scalar whose gradient is −mean_B [ A ∇ log π(y|x) ].

        L = −mean_B [ A · log π(y|x) ],      log π(y|x) = Σ_t mask_t log π(y_t | x, y_<t)

    logprobs: (B, T), one number per token; advantage: (B,), one number per answer; mask: bool (B, T). Returns a scalar.

    The whole answer is one action: all of its tokens share one A, and the length of an answer divides nothing.
    A is a constant: no gradient may flow into it. Behind the mask logprobs may be anything, even −∞.
    A number to start with: one answer of two tokens with log-probs −1 and −2, and A = 2, give L = 6.
    """
    raise NotImplementedError
