"""Exercise 16: stop the hack. Check it with  python exercises/check.py 16  (two minutes on a laptop)

In the embedded world a reward model judges film reviews. It is not perfect: it likes reviews that talk of friends, for
example, which says nothing about the film. The gold score is the truth, and no training sees it. A policy that is
trained hard finds what the reward model likes and the gold score does not. That is a reward hack.

Here the learning rate is high, 3e-4. The check trains a policy with REINFORCE for 150 steps from θ_sft to θ, with the
reward

    R = r − β log[ π_θ(y|x) / π_sft(y|x) ]

and judges the policy (1−η) θ_sft + η θ. With β = 0 and η = 1 the reward rises from −.1 to 1.8, and the gold score
*falls* from .05 to .00: the policy no longer writes reviews.

Choose β and η. You pass if the gold score is at least .65 by two standard errors (mean − 2 · error ≥ .65) on 256
prompts that are held out for this exercise. Each try prints reward, gold and KL: look at all three before the next one.
"""

BETA = None  # β ≥ 0, the weight of the KL
ETA = None  # η in [0, 1], how far to go from θ_sft to θ
