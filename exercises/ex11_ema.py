"""Exercise 11: a moving average of weights. Check it with  python exercises/check.py 11

WARP measures the KL to an average of the policy's own past. EMA is short for exponential moving average. It follows the
policy slowly: after every step it goes a small part μ of the way.
"""


def ema_update(ema, policy, mu):
    """One update.

        θ_ema ← (1 − μ) θ_ema + μ θ

    ema, policy: {name: tensor} with the same names; mu: a number. Returns a *new* dictionary of new tensors without a
    gradient, in float32. The arguments keep their values.

    A number to start with: θ_ema = 0, θ = 1 and μ = .01 give .01, and 100 updates give 1 − .99^100 = .634.
    Why float32? The weights may be bfloat16, which keeps 8 significant bits. There, .02 + .01 · (.024 − .02) rounds
    back to .02.
    """
    raise NotImplementedError
