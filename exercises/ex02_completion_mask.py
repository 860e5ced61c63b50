"""Exercise 2: which tokens belong to an answer? Check it with  python exercises/check.py 2

A sampler writes B answers side by side. A short answer ends with the token EOS ("end of sequence"), and the rest of its
row is filled up with padding. Many models have no padding token of their own, so the padding is EOS, too.
"""


def completion_mask(tokens, eos_id):
    """True on every token of the answer, its first EOS included. False behind that. All True where there is no EOS.

    tokens: (B, T), whole numbers; eos_id: a number. Returns bool (B, T).

    An example with eos_id = 9:     tokens   5 6 9 9 9   →   T T T F F
                                             5 6 7 8 8   →   T T T T T
    """
    raise NotImplementedError
