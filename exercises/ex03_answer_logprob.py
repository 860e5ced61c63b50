"""Exercise 3: how likely is an answer? Check it with  python exercises/check.py 3

A language model reads a row of tokens. At every position it gives one number, a logit, to each of the V tokens that
could come *next*. Each row is a prompt x of P tokens, then an answer y of T tokens.
"""


def answer_logprob(logits, tokens, mask):
    """The log-probability of each answer, in nats.

        log π(y|x) = Σ_t mask_t log π(y_t | x, y_<t),      π = softmax(logits)

    logits: (B, P+T, V); tokens: (B, P+T); mask: bool (B, T), True on the tokens that count. So T is the width of the
    mask, and the answer is the last T tokens of a row. Returns (B,). Keep the gradient.

    A number to start with: if all logits are 0, each of the V tokens has probability 1/V. An answer of 3 tokens then
    has log π = −3 log V.
    """
    raise NotImplementedError
