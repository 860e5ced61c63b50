"""The pairwise loss against numbers worked out by hand, in float64."""

import math

import pytest
import torch

from rlhf_min.losses import pairwise_loss


def vector(*values, **kwargs):
    return torch.tensor(values, dtype=torch.float64, **kwargs)


def test_hand_computed_values():
    """T23: the mean of −log σ(r_w − r_l): lower when the better answer has the higher reward."""
    # −log σ(1) = log(1 + e⁻¹) = .3132617,  −log σ(0) = log 2 = .6931472;  their mean is .5032044
    loss = pairwise_loss(vector(2.0, 0.5), vector(1.0, 0.5))
    assert loss.item() == pytest.approx(0.5032044, abs=1e-7)
    # the other way round: −log σ(−1) = log(1 + e) = 1.3132617
    assert pairwise_loss(vector(1.0), vector(2.0)).item() == pytest.approx(1.3132617, abs=1e-7)


def test_margin_is_subtracted():
    """T24: the better answer must win by the margin: a difference of 3 at a margin of 2 costs what 1 costs at none."""
    loss = pairwise_loss(vector(3.0), vector(0.0), margin=vector(2.0))
    assert loss.item() == pytest.approx(0.3132617, abs=1e-7)  # −log σ(1)


def test_zero_margin_is_no_margin():
    """T24: a margin of 0 changes nothing, at a batch where a broadcast to (B, B) would change the mean."""
    chosen, rejected = torch.randn(2, 5, dtype=torch.float64)
    assert pairwise_loss(chosen, rejected, margin=torch.zeros_like(chosen)) == pairwise_loss(chosen, rejected)


@pytest.mark.parametrize("column", ["chosen", "rejected", "margin"])
def test_column_vectors_are_refused(column):
    """T24: (B, 1) beside (B,) would broadcast to (B, B) without a word; it is an error whichever argument it is."""
    arguments = dict.fromkeys(["chosen", "rejected", "margin"], vector(1.0, 2.0, 3.0))
    arguments[column] = arguments[column].unsqueeze(-1)
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        pairwise_loss(**arguments)


def test_matrices_and_other_lengths_are_refused():
    """T24: three (B, K) arguments of one shape are refused, too, and so is a single reward against a batch."""
    with pytest.raises(ValueError):
        pairwise_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError):
        pairwise_loss(vector(1.0, 2.0), vector(1.0))


def test_centering_value():
    """T25: the centering term is c (r_w + r_l)², a mean over the batch."""
    # sums 3 and −1, squares 9 and 1, mean 5;  .01 · 5 = .05
    chosen, rejected = vector(2.0, 0.0), vector(1.0, -1.0)
    plain = pairwise_loss(chosen, rejected)
    centered = pairwise_loss(chosen, rejected, center_coefficient=0.01)
    assert (centered - plain).item() == pytest.approx(0.05, abs=1e-12)


def test_only_centering_sees_a_constant():
    """T25: a constant k added to every reward leaves the loss at c = 0 and costs c [(s + 2k)² − s²] otherwise."""
    chosen, rejected, k = vector(1.0), vector(-0.5), 3.0  # s = .5: (6.5² − .5²) · .01 = .42
    shift = [
        (pairwise_loss(chosen + k, rejected + k, None, c) - pairwise_loss(chosen, rejected, None, c)).item()
        for c in (0.0, 0.01)
    ]
    assert shift == pytest.approx([0.0, 0.42], abs=1e-12)


def test_gradient_closed_form_and_finite_differences():
    """T25: ∂L/∂r_w = (2cs − σ(−d)) / B, ∂L/∂r_l = (2cs + σ(−d)) / B; d = r_w − r_l − margin, s = r_w + r_l."""
    chosen, rejected = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    margin, c = vector(0.0, 0.5, 1.0, 2.0), 0.1
    got = torch.autograd.grad(pairwise_loss(chosen, rejected, margin, c), (chosen, rejected))
    wrong, total = torch.sigmoid(rejected - chosen + margin), chosen + rejected
    torch.testing.assert_close(got[0], (-wrong + 2 * c * total) / 4)
    torch.testing.assert_close(got[1], (wrong + 2 * c * total) / 4)
    assert torch.autograd.gradcheck(lambda w, r: pairwise_loss(w, r, margin, c), (chosen, rejected))


def test_log_space():
    """T28: a pair that is wrong by 200 costs 200 and has the full gradient −1, in float32; log(σ) would be −inf."""
    chosen = torch.tensor([-100.0], requires_grad=True)
    loss = pairwise_loss(chosen, torch.tensor([100.0]))
    loss.backward()
    assert loss.item() == pytest.approx(200.0)
    assert chosen.grad.item() == pytest.approx(-1.0)
    assert math.isfinite(pairwise_loss(torch.tensor([100.0]), torch.tensor([-100.0])).item())
