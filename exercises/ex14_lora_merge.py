"""Exercise 14: put LoRA's adapter into the weights. Check it with  python exercises/check.py 14

LoRA freezes a matrix W and trains two thin ones, A and B, whose product is the change:

    y = W x + (α/r) B A x,      W (out, in),      A (r, in),      B (out, r)

GPT-2 is an exception. Its Conv1D stores the transpose of W, (in, out), and A and B stay as they are.
"""


def merged_weight(weight, A, B, alpha, transposed):
    """W with the adapter in it, in the layout of `weight`.

    weight: (out, in), or (in, out) where transposed is True; A: (r, in); B: (out, r); alpha: α, a number. Returns a new
    tensor of the shape of `weight`.

    A number to start with: W = [[5]], A = [[2]], B = [[3]], α = 4 and r = 1 give [[29]].
    """
    raise NotImplementedError


def mean_change(adapters, alpha):
    """The mean of the changes (α/r) B A of several adapters, as one matrix (out, in).

    adapters: a list of pairs (A, B), with A (r, in) and B (out, r), all of the same rank r.
    A question to think about first: is this the change that the mean of all A and the mean of all B would make?
    """
    raise NotImplementedError
