"""What the checks are made of: compare a learner's numbers with the right ones, and recognise the usual wrong ones."""

import torch

TOLERANCE = 1e-6  # of 1 + |right value|; float32 rounds at 1e-7


class NotYet(Exception):
    """What the learner reads: what is wrong, and what to think about."""


def same(got, right, mistakes=(), what="your result"):
    """NotYet unless `got` is `right` up to rounding. mistakes: [(a usual wrong value, what to think about)]."""
    right = torch.as_tensor(right, dtype=torch.float64).detach()
    if not isinstance(got, torch.Tensor):
        raise NotYet(f"{what} is a {type(got).__name__}; a tensor is due")
    if got.shape != right.shape:
        raise NotYet(f"{what} has the shape {tuple(got.shape)}; {tuple(right.shape)} is due")
    if close(got, right):
        return
    for value, hint in mistakes:
        if close(got, value):
            raise NotYet(hint)
    text = f"{what} is {show(got)}, and {show(right)} is due."
    error = (got.detach().double() - right).abs().max()
    if not error.isfinite():
        raise NotYet(f"{text} Look for log 0, 0/0, 0 · ∞ or ∞ − ∞")
    if error < 0.02:
        text += f" They differ by {error:.0e}, and rounding is 1e-7: 1e-3 where 1e-6 is due is a bug."
        text += " Look for an ε that is added, a clamp, or a limit that is taken too early"
    raise NotYet(text)


def close(got, right):
    """Equal up to rounding? ∞ equals ∞, and NaN equals NaN, so that these can be recognised, too."""
    got, right = (torch.as_tensor(value, dtype=torch.float64).detach() for value in (got, right))
    return got.shape == right.shape and torch.allclose(got, right, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def show(tensor):
    """A tensor as a short text, with four decimals."""
    values = (tensor.detach().double() * 1e4).round() / 1e4 + 0.0  # + 0.0: no −0
    return str(values.tolist())


def gradient(scalar, inputs, what="your loss"):
    """∂ scalar / ∂ inputs; 0 where there is no path. NotYet where the graph is cut."""
    if not isinstance(scalar, torch.Tensor) or scalar.shape != ():
        raise NotYet(f"{what} must be a scalar tensor, of shape ()")
    if not scalar.requires_grad:
        raise NotYet(f"{what} has no gradient. Something cuts the graph: detach, item, no_grad, or a new tensor")
    return torch.autograd.grad(scalar, inputs, retain_graph=True, materialize_grads=True)


def must_refuse(function, arguments, hint):
    """NotYet unless the call raises a ValueError."""
    try:
        function(*arguments)
    except ValueError:
        return
    except NotImplementedError:
        raise
    except Exception as error:
        raise NotYet(f"you raise {type(error).__name__} where a ValueError is due: {error}") from None
    raise NotYet(hint)


def numbers(*shape, seed=0):
    """Normal random numbers, the same ones in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
