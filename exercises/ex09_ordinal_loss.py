"""Exercise 9: a loss for ratings. Check it with  python exercises/check.py 9

This reward model does not give an answer one number. It gives it a distribution over the ratings 1, ..., K, as
softmax of K logits. Draw a rating i for the better answer w, and a rating j for the worse answer l. How likely is
i > j?
"""


def ordinal_loss(chosen_logits, rejected_logits):
    """The strict ordinal loss: ties i = j count as errors.

        L = mean_B [ −log Σ_{i>j} p_w(i) p_l(j) ],      p = softmax(logits)

    chosen_logits, rejected_logits: (B, K). Returns a scalar.

    A number to start with: for K = 10 and all logits 0, 45 of 100 pairs have i > j, so L = −log .45 = .7985.
    Make it robust: with logits such as ±400 the products are e^(−800) and less, which is 0 even in float64, and both
    the loss and its gradient must still be right. Stay in log space from the first line to the last.
    """
    raise NotImplementedError
