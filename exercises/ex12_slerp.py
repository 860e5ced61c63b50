"""Exercise 12: SLERP, a walk along an arc. Check it with  python exercises/check.py 12

Two runs moved the weights by the vectors a and b, about equally far. Their mean is shorter than both, so it has lost
some of what they learnt. Spherical linear interpolation (SLERP) walks from a to b along an arc and keeps the length.
"""


def slerp(a, b, lam):
    """A point on the arc from a to b.

        slerp(a, b, λ) = [ sin((1−λ)Ω) a + sin(λΩ) b ] / sin Ω,      Ω = the angle between a and b

    a, b: (n,); lam: λ in [0, 1], a number. Returns (n,). λ = 0 gives a, λ = 1 gives b. The formula takes a and b as
    they are; only for Ω you need their directions.

    A number to start with: a = (1, 0), b = (0, 1), λ = ½ give (.7071, .7071).
    Make it robust: where a and b have the same direction, return (1−λ) a + λ b, the limit of the formula. Return it,
    too, where one of them is 0 and has no direction. Where they are opposite, of whatever lengths, raise a ValueError:
    no direction lies between them. float32 rounds, so an angle within .01 of π counts as opposite.
    """
    raise NotImplementedError
