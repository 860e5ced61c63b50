"""Exercise 8: the KL inside the objective. Check it with  python exercises/check.py 8

REINFORCE should raise  E_{y~π}[ r(y) ] − β KL(π ‖ π_ref):  much reward, but not far from the reference. The usual way
is to put the KL into the reward and to change nothing else.
"""


def shaped_reward(reward, logp, ref_logp, beta):
    """The shaped reward of each answer.

        R = r − β [ log π(y|x) − log π_ref(y|x) ]

    reward, logp, ref_logp: (B,); beta: a number. logp has a graph behind it. Returns (B,), a constant for autograd: the
    step R ∇ log π(y|x) already has the whole gradient in expectation.

    A number to start with: r = 1, log π = −2, log π_ref = −5, β = .1 give R = .7.
    """
    raise NotImplementedError
