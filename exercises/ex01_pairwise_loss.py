"""Exercise 1: the pairwise loss, with a margin. Check it with  python exercises/check.py 1

People compared two answers and preferred one. A reward model gives the preferred answer the number r_w (the winner) and
the other one r_l (the loser). The loss is small where r_w is larger than r_l by more than a margin.
"""


def pairwise_loss(chosen, rejected, margin):
    """The Bradley–Terry loss.

        L = mean_B [ −log σ(r_w − r_l − margin) ],      σ(x) = 1 / (1 + e^(−x))

    chosen holds r_w, rejected holds r_l. All three arguments are tensors (B,), a number for each of B pairs. Returns a
    scalar tensor.

    A number to start with: r_w = 3, r_l = 2, margin = 1 give −log σ(0) = log 2 = .693.
    Make it robust: rewards may be as large as 1000, and a chosen of shape (B, 1) must raise a ValueError. Without that,
    (B, 1) − (B,) is (B, B), and torch says nothing.
    """
    raise NotImplementedError
