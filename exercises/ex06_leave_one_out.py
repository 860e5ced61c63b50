"""Exercise 6: leave one out. Check it with  python exercises/check.py 6

Some prompts are easy, and every answer to them has a high reward. To take that away, the policy writes k answers to
each prompt. The baseline of an answer is what the k − 1 others got. The method is known as RLOO.
"""


def leave_one_out(rewards):
    """The advantage of every answer.

        A_i = R_i − 1/(k−1) Σ_{j≠i} R_j          j runs over the other answers to the same prompt

    rewards: (P, k), a row of k ≥ 2 answers for each of P prompts. Returns (P, k). For k = 1 raise a ValueError.

    A number to start with: the rewards 0, 0, 3 have A = −1.5, −1.5, 3.
    """
    raise NotImplementedError
