"""The losses against numbers worked out by hand and against double loops over the ratings, in float64."""

import math

import pytest
import torch

from rlhf_min.losses import ordinal_loss, pairwise_loss, preference_logprob, rating_mean_std


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


# Distributions over the ratings 1..K

K = 10
TIES = ["strict", "half"]


def random_logits(rows=6, k=K, **kwargs):
    return 2 * torch.randn(rows, k, dtype=torch.float64, **kwargs)


def peak(rating, height=100.0, dtype=torch.float64):
    """(1, K) logits of a distribution that is one-hot up to e^(−height)."""
    logits = torch.zeros(1, K, dtype=dtype)
    logits[0, rating - 1] = height
    return logits


def brute_force(chosen_logits, rejected_logits, ties):
    """(B,): P(w ≻ l), a double loop over the ratings, straight from its definition."""
    rows = []
    for p_w, p_l in zip(chosen_logits.softmax(-1), rejected_logits.softmax(-1)):
        total = p_w.new_zeros(())
        for i in range(1, len(p_w) + 1):
            for j in range(1, len(p_l) + 1):
                credit = 1.0 if i > j else 0.5 if i == j and ties == "half" else 0.0
                total = total + credit * p_w[i - 1] * p_l[j - 1]
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("k", [2, 3, K])
@pytest.mark.parametrize("ties", TIES)
def test_ordinal_loss_equals_the_double_loop(ties, k):
    """T28, T31: log P(w ≻ l), the loss and its gradients are those of the double loop over both ratings."""
    chosen, rejected = (random_logits(k=k, requires_grad=True) for _ in range(2))
    exact = brute_force(chosen, rejected, ties).log()
    torch.testing.assert_close(preference_logprob(chosen, rejected, ties), exact, atol=1e-12, rtol=0)
    loss = ordinal_loss(chosen, rejected, ties)
    torch.testing.assert_close(loss, -exact.mean(), atol=1e-12, rtol=0)
    got, want = (torch.autograd.grad(value, (chosen, rejected)) for value in (loss, -exact.mean()))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_strict_ties_are_the_default():
    """T29: without a word about ties a tie is an error, as in the report."""
    chosen, rejected = random_logits(), random_logits()
    assert torch.equal(preference_logprob(chosen, rejected), preference_logprob(chosen, rejected, "strict"))
    assert ordinal_loss(chosen, rejected) == ordinal_loss(chosen, rejected, "strict")
    assert ordinal_loss(chosen, rejected) > ordinal_loss(chosen, rejected, "half")


def posterior(chosen, rejected, ties):
    """q_w, q_l (B, K): the two distributions given that w won, by a double loop over p_w(i) p_l(j) credit(i, j)."""
    p_w, p_l = chosen.softmax(-1), rejected.softmax(-1)
    i, j = torch.arange(K)[:, None], torch.arange(K)
    credit = (i > j).double() + (0.5 * (i == j).double() if ties == "half" else 0)
    joint = p_w[:, :, None] * p_l[:, None, :] * credit
    joint = joint / joint.sum((1, 2), keepdim=True)
    return joint.sum(2), joint.sum(1)


@pytest.mark.parametrize("ties", TIES)
def test_ordinal_gradient_is_prior_minus_posterior(ties):
    """T28: ∂L/∂z_w = (p_w − q_w) / B with q_w(i) ∝ p_w(i) F_l(i−1), and ∂L/∂z_l = (p_l − q_l) / B likewise."""
    chosen, rejected = (random_logits(4, requires_grad=True) for _ in range(2))
    got = torch.autograd.grad(ordinal_loss(chosen, rejected, ties), (chosen, rejected))
    q_w, q_l = posterior(chosen, rejected, ties)
    if ties == "strict":  # q_w again, from its formula: F_l(i−1) is the mass strictly below i
        below = torch.cat([torch.zeros(4, 1), rejected.softmax(-1).cumsum(-1)[:, :-1]], dim=1)
        again = chosen.softmax(-1) * below
        torch.testing.assert_close(q_w, again / again.sum(-1, keepdim=True))
        assert (q_w[:, 0] == 0).all() and (q_l[:, -1] == 0).all()  # who won has no 1, who lost has no 10
    torch.testing.assert_close(got[0], (chosen.softmax(-1) - q_w) / 4, atol=1e-12, rtol=0)
    torch.testing.assert_close(got[1], (rejected.softmax(-1) - q_l) / 4, atol=1e-12, rtol=0)


@pytest.mark.parametrize("ties", TIES)
def test_ordinal_gradient_agrees_with_finite_differences(ties):
    """T28: gradcheck, the centering term included."""
    chosen, rejected = (random_logits(3, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda w, r: ordinal_loss(w, r, ties, 0.1), (chosen, rejected))


# w is certainly a 1 and l certainly a 10. Strict: w needs ≥ 2 and l ≤ 9, each e^−100; of these pairs 45 have i > j, so
# L = 200 − log 45. Half: the ties 1 = 1 and 10 = 10 cost e^−100 each and count half, together e^−100, so L = 100.
SWAPPED = {"strict": 200 - math.log(45), "half": 100.0}
# Both are certainly a k. Strict: k − 1 ratings for l below and 10 − k for w above, each e^−100: L = 100 − log 9.
EQUAL = {"strict": 100 - math.log(9), "half": math.log(2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ties", TIES)
def test_certain_ratings(ties, dtype):
    """T31: a certain 10 against a certain 1 costs nothing, swapped it costs 200 − log 45, and 100 with half ties."""
    assert ordinal_loss(peak(10, dtype=dtype), peak(1, dtype=dtype), ties).item() == pytest.approx(0.0, abs=1e-12)
    swapped = ordinal_loss(peak(1, dtype=dtype), peak(10, dtype=dtype), ties).item()
    assert swapped == pytest.approx(SWAPPED[ties], rel=1e-6)
    assert ordinal_loss(peak(2, dtype=dtype), peak(1, dtype=dtype), ties).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("rating", [1, 5, 10])
@pytest.mark.parametrize("ties", TIES)
def test_two_certain_equal_ratings(ties, rating):
    """T31, T29: i = j is no win: it costs 100 − log 9 under strict ties, and log 2, a coin's toss, under half."""
    assert ordinal_loss(peak(rating), peak(rating), ties).item() == pytest.approx(EQUAL[ties], rel=1e-12)


@pytest.mark.parametrize("k, strict", [(2, 0.25), (5, 0.4), (10, 0.45)])
def test_uniform_ratings(k, strict):
    """T30: the loss of a model that knows nothing: P = (1 − 1/K)/2, so .7985 for K = 10; log 2 with half ties."""
    zeros = torch.zeros(3, k, dtype=torch.float64)
    assert ordinal_loss(zeros, zeros).item() == pytest.approx(-math.log(strict), abs=1e-12)
    assert ordinal_loss(zeros, zeros, "half").item() == pytest.approx(math.log(2), abs=1e-12)
    if k == 10:
        assert ordinal_loss(zeros, zeros).item() == pytest.approx(0.7985, abs=5e-5)


def test_the_two_orders_and_the_tie_share_all_probability():
    """T29: P(w ≻ l) + P(l ≻ w) + P(tie) = 1 when strict; half gives the tie to both, so that two orders make 1."""
    chosen, rejected = random_logits(), random_logits()
    tie = (chosen.softmax(-1) * rejected.softmax(-1)).sum(-1)
    assert tie.min() > 0.001
    both = {ties: preference_logprob(chosen, rejected, ties).exp() + preference_logprob(rejected, chosen, ties).exp()
            for ties in TIES}  # fmt: skip
    one = torch.ones_like(tie)
    torch.testing.assert_close(both["strict"] + tie, one, atol=1e-12, rtol=0)
    torch.testing.assert_close(both["half"], one, atol=1e-12, rtol=0)
    itself = preference_logprob(chosen, chosen, "half").exp()
    torch.testing.assert_close(itself, one / 2, atol=1e-12, rtol=0)  # a coin's toss against itself, whatever it is


@pytest.mark.parametrize("ties", TIES)
def test_the_most_wrong_pair_has_the_full_gradient(ties):
    """T28: at logits ±60, in float32, 1 against 10 costs 240 − log 45 or 120 and pulls with the full gradient.

    −log(P + 1e-8) would stand at 18.42 with a gradient of 0.
    """
    chosen, rejected = ((peak(rating, 120.0, torch.float32) - 60).requires_grad_() for rating in (1, 10))
    assert chosen.tolist() == [[60.0] + [-60.0] * 9]
    loss = ordinal_loss(chosen, rejected, ties)
    assert loss.item() == pytest.approx({"strict": 240 - math.log(45), "half": 120.0}[ties], rel=1e-6)
    loss.backward()
    # strict: p_w(1) = 1 and q_w(1) = 0. half: the two ties share the posterior, q_w(1) = q_l(10) = ½
    largest = {"strict": 1.0, "half": 0.5}[ties]
    assert chosen.grad.abs().max().item() == pytest.approx(largest, abs=1e-5)
    assert rejected.grad.abs().max().item() == pytest.approx(largest, abs=1e-5)
    assert chosen.grad[0, 0] > 0 and rejected.grad[0, 9] > 0  # a step down takes the 1 from w and the 10 from l


@pytest.mark.parametrize("ties", TIES)
def test_extreme_logits_have_finite_gradients(ties):
    """T28: 300 pairs of logits drawn from {−60, 60}, in float32: loss and gradient are finite, and those of float64."""
    signs = torch.randint(2, (2, 300, K), generator=torch.Generator().manual_seed(3))
    signs[0, :150, 5:] = signs[1, :150, :5] = 0  # in half of the pairs w has no rating above 5, and l none below 6
    results = []
    for dtype in (torch.float32, torch.float64):
        chosen, rejected = (side.requires_grad_() for side in 120 * signs.to(dtype) - 60)
        loss = -preference_logprob(chosen, rejected, ties)
        gradients = torch.autograd.grad(loss.sum(), (chosen, rejected))
        results.append([tensor.double() for tensor in (loss.detach(), *gradients)])
    for single, double in zip(*results):
        assert single.isfinite().all()
        torch.testing.assert_close(single, double, atol=1e-4, rtol=1e-5)
    assert (results[0][0][:150] > 100).sum() > 120


def test_strict_ties_push_twins_to_uniform_and_half_ties_leave_them():
    """T30: two answers with one distribution: strict P = (1 − Σ p²)/2 is best at uniform; half is ½, whatever it is."""
    start = torch.tensor([[0.0, 0, 0, 0, 0, 0, 1, 3, 1, 0]], dtype=torch.float64)
    logits = start.clone().requires_grad_()
    assert rating_mean_std(logits)[0].item() > 7
    assert torch.autograd.grad(ordinal_loss(logits, logits, "half"), logits)[0].abs().max() < 1e-12
    for _ in range(500):
        logits.data -= 2 * torch.autograd.grad(ordinal_loss(logits, logits, "strict"), logits)[0]
    torch.testing.assert_close(logits.softmax(-1), torch.full((1, K), 0.1, dtype=torch.float64), atol=1e-3, rtol=0)
    mean, std = rating_mean_std(logits)
    assert mean.item() == pytest.approx(5.5, abs=0.02)
    assert std.item() == pytest.approx(math.sqrt(8.25), abs=0.02)  # not what the model doubts, but what the loss likes


@pytest.mark.parametrize("ties", TIES)
def test_ordinal_centering_value(ties):
    """T25: the centering term is c (E_w + E_l − (K+1))², a mean over the batch."""
    # ratings 10 and 7 make 17 − 11 = 6, squared 36; ratings 8 and 3 make 0; the mean is 18, .01 · 18 = .18
    chosen, rejected = torch.cat([peak(10), peak(8)]), torch.cat([peak(7), peak(3)])
    plain, centered = (ordinal_loss(chosen, rejected, ties, c) for c in (0.0, 0.01))
    assert (centered - plain).item() == pytest.approx(0.18, abs=1e-12)
    # K = 4: uniform ratings have E = 2.5 each, which make K + 1; certain 4s make 8 − 5 = 3, squared 9
    uniform, fours = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([[0, 0, 0, 100.0]], dtype=torch.float64)
    for logits, value in ((uniform, 0.0), (fours, 0.09)):
        plain, centered = (ordinal_loss(logits, logits, ties, c) for c in (0.0, 0.01))
        assert (centered - plain).item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("ties", TIES)
def test_ordinal_loss_without_centering(ties):
    """T25: a coefficient of 0, the default, leaves −log P alone, in the loss and in the gradient."""
    chosen, rejected = (random_logits(requires_grad=True) for _ in range(2))
    plain = -preference_logprob(chosen, rejected, ties).mean()
    for loss in (ordinal_loss(chosen, rejected, ties), ordinal_loss(chosen, rejected, ties, center_coefficient=0.0)):
        assert loss == plain
        torch.testing.assert_close(*(torch.autograd.grad(x, chosen, retain_graph=True) for x in (loss, plain)))


@pytest.mark.parametrize("ties", TIES)
def test_certain_ratings_have_finite_gradients_with_centering(ties):
    """T32: the root in σ, whose slope is infinite at 0, is no part of the loss: a one-hot has a finite gradient."""
    chosen, rejected = (peak(rating, 1e4, torch.float32).requires_grad_() for rating in (10, 1))
    ordinal_loss(chosen, rejected, ties, 0.01).backward()
    assert chosen.grad.isfinite().all() and rejected.grad.isfinite().all()


@pytest.mark.parametrize("shapes", [((2, 10), (2, 9)), ((2, 10), (1, 10)), ((10,), (10,)), ((2, 1), (2, 1)),
                                    ((2, 3, 10), (2, 3, 10)), ((2, 10), (10,))])  # fmt: skip
@pytest.mark.parametrize("loss", [preference_logprob, ordinal_loss])
def test_other_shapes_of_logits_are_refused(loss, shapes):
    """T24: what is not (B, K) twice, K ≥ 2, would broadcast or sum over the wrong axis; a scalar head is no rating."""
    with pytest.raises(ValueError, match="must both be"):
        loss(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("ties", ["Strict", "", None, "none"])
def test_another_name_for_ties_is_refused(ties):
    """T29: an unknown treatment of ties is an error, not a silent default."""
    with pytest.raises(ValueError, match="strict or half"):
        ordinal_loss(torch.zeros(1, K), torch.zeros(1, K), ties)


@pytest.mark.parametrize("rating", range(1, K + 1))
def test_certain_rating_is_its_own_mean(rating):
    """T32: ratings count from 1: one-hot at k has E = k and σ = 0, exactly."""
    mean, std = rating_mean_std(peak(rating, 1e4, torch.float32))
    assert (mean.tolist(), std.tolist()) == ([rating], [0.0])


def test_mean_and_deviation_by_hand():
    """T32: E = Σ k p(k) and σ² = Σ (k − E)² p(k), for K = 10 and for K = 3, each row on its own."""
    # uniform: E = 5.5, σ² = (10² − 1)/12 = 8.25. ¾ on 2 and ¼ on 10: E = 4, σ² = ¾ · 4 + ¼ · 36 = 12
    two = torch.full((K,), -torch.inf, dtype=torch.float64)
    two[1], two[9] = math.log(0.75), math.log(0.25)
    mean, std = rating_mean_std(torch.stack([torch.full_like(two, 3.0), two]))
    assert (mean.shape, std.shape) == ((2,), (2,))
    torch.testing.assert_close(mean, vector(5.5, 4.0))
    torch.testing.assert_close(std, vector(math.sqrt(8.25), math.sqrt(12)))
    # p = (¼, ¼, ½): E = 2.25, σ² = ¼ · 1.5625 + ¼ · .0625 + ½ · .5625 = .6875
    mean, std = rating_mean_std(vector(0.25, 0.25, 0.5).log()[None])
    assert mean.item() == pytest.approx(2.25)
    assert std.item() == pytest.approx(math.sqrt(0.6875))


def test_deviation_is_never_nan():
    """T32: in float32 E[k²] − E² rounds to below 0 or to noise where one rating is all but certain; σ does neither."""
    noise = torch.randn(2000, K)
    heights = torch.linspace(0, 25, 2000)[:, None]
    logits = torch.cat([noise * heights, noise * 1e4, noise + heights * torch.eye(K)[torch.arange(2000) % K]])
    mean, std = rating_mean_std(logits)
    exact_mean, exact_std = rating_mean_std(logits.double())
    assert mean.isfinite().all() and std.isfinite().all() and (std >= 0).all()
    torch.testing.assert_close(mean.double(), exact_mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(std.double(), exact_std, atol=1e-5, rtol=1e-3)


def test_a_constant_in_the_logits_changes_nothing():
    """T32: logits count up to a constant: distribution, loss, mean and deviation do not see it."""
    chosen, rejected = random_logits(), random_logits()
    shift = torch.randn(6, 1, dtype=torch.float64) * 50
    torch.testing.assert_close(rating_mean_std(chosen + shift), rating_mean_std(chosen))
    for ties in TIES:
        moved = ordinal_loss(chosen + shift, rejected - shift, ties, 0.01)
        torch.testing.assert_close(moved, ordinal_loss(chosen, rejected, ties, 0.01))
