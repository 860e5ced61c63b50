"""The losses against numbers worked out by hand and against double loops over the ratings, in float64."""

import math

import pytest
import torch

from rlhf_min.losses import ordinal_loss, pairwise_loss, preference_logprob, rating_mean_std

exact = {"atol": 1e-12, "rtol": 0}


def vector(*values, **kwargs):
    return torch.tensor(values, dtype=torch.float64, **kwargs)


def close(got, expected, **tolerance):
    torch.testing.assert_close(got, expected, **tolerance)


def test_hand_computed_values():
    """The loss is the mean of −log σ(r_w − r_l), lower where the better answer has the higher reward."""
    # −log σ(1) = log(1 + e⁻¹) = .3132617,  −log σ(0) = log 2 = .6931472;  their mean is .5032044
    loss = pairwise_loss(vector(2.0, 0.5), vector(1.0, 0.5))
    assert loss.item() == pytest.approx(0.5032044, abs=1e-7)
    # the other way round: −log σ(−1) = log(1 + e) = 1.3132617
    assert pairwise_loss(vector(1.0), vector(2.0)).item() == pytest.approx(1.3132617, abs=1e-7)


def test_margin_is_subtracted():
    """The better answer must win by the margin: a difference of 3 at a margin of 2 costs what 1 costs without."""
    loss = pairwise_loss(vector(3.0), vector(0.0), margin=vector(2.0))
    assert loss.item() == pytest.approx(0.3132617, abs=1e-7)  # −log σ(1)


@pytest.mark.parametrize(
    "shapes", [((3, 1), 3, 3), (3, (3, 1), 3), (3, 3, (3, 1)), ((2, 3), (2, 3), (2, 3)), (2, 1, 2)]
)
def test_rewards_of_another_shape_are_refused(shapes):
    """The loss refuses all shapes but (B,): a (B, 1) beside a (B,) would broadcast to (B, B) without a word."""
    with pytest.raises(ValueError, match="must be"):
        pairwise_loss(*map(torch.zeros, shapes))


def test_centering_value():
    """The centering term is c (r_w + r_l)², a mean over the batch."""
    # sums 3 and −1, squares 9 and 1, mean 5;  .01 · 5 = .05
    chosen, rejected = vector(2.0, 0.0), vector(1.0, -1.0)
    plain = pairwise_loss(chosen, rejected)
    centered = pairwise_loss(chosen, rejected, center_coefficient=0.01)
    assert (centered - plain).item() == pytest.approx(0.05, abs=1e-12)


def test_log_space():
    """A pair that is wrong by 200 costs 200 and has the full gradient −1, in float32; log(σ) would be −inf."""
    chosen = torch.tensor([-100.0], requires_grad=True)
    loss = pairwise_loss(chosen, torch.tensor([100.0]))
    loss.backward()
    assert loss.item() == pytest.approx(200.0)
    assert chosen.grad.item() == pytest.approx(-1.0)
    assert math.isfinite(pairwise_loss(torch.tensor([100.0]), torch.tensor([-100.0])).item())


# Distributions over the ratings 1..K

K = 10
TIES = ["strict", "half"]
both_ties = pytest.mark.parametrize("ties", TIES)


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
@both_ties
def test_ordinal_loss_equals_the_double_loop(ties, k):
    """The log P(w ≻ l), the loss and its gradients are those of the double loop over both ratings."""
    chosen, rejected = (random_logits(k=k, requires_grad=True) for _ in range(2))
    logprob = brute_force(chosen, rejected, ties).log()
    close(preference_logprob(chosen, rejected, ties), logprob, **exact)
    loss = ordinal_loss(chosen, rejected, ties)
    close(loss, -logprob.mean(), **exact)
    got, want = (torch.autograd.grad(value, (chosen, rejected)) for value in (loss, -logprob.mean()))
    close(got, want, **exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("won, lost, strict, half", [
    (10, 1, 0.0, 0.0),
    (2, 1, 0.0, 0.0),
    # w is certainly a 1 and l a 10. Strict: w needs ≥ 2 and l ≤ 9, each e^−100; of these pairs 45 have i > j. Half:
    # the ties 1 = 1 and 10 = 10 cost e^−100 each and count half, together e^−100
    (1, 10, 200 - math.log(45), 100.0),
    # both are certainly a k. Strict: k − 1 ratings for l below and 10 − k for w above, each e^−100
    *[(k, k, 100 - math.log(9), math.log(2)) for k in (1, 5, 10)],
])  # fmt: skip
def test_certain_ratings(won, lost, strict, half, dtype):
    """A certain win costs nothing, a certain loss 200 − log 45, and a certain tie 100 − log 9, or log 2 as half."""
    for ties, cost in (("strict", strict), ("half", half)):
        loss = ordinal_loss(peak(won, dtype=dtype), peak(lost, dtype=dtype), ties).item()
        assert loss == pytest.approx(cost, rel=1e-6 if dtype == torch.float32 else 1e-12, abs=1e-12)


@pytest.mark.parametrize("k, strict", [(2, 0.25), (5, 0.4), (10, 0.45)])
def test_uniform_ratings(k, strict):
    """A model that knows nothing has P = (1 − 1/K)/2, a loss of .7985 for K = 10, and log 2 with half ties."""
    zeros = torch.zeros(3, k, dtype=torch.float64)
    assert ordinal_loss(zeros, zeros).item() == pytest.approx(-math.log(strict), abs=1e-12)  # strict is the default
    assert ordinal_loss(zeros, zeros, "half").item() == pytest.approx(math.log(2), abs=1e-12)


@both_ties
def test_the_most_wrong_pair_has_the_full_gradient(ties):
    """At logits ±60, in float32, 1 against 10 costs 240 − log 45 or 120 and pulls with the full gradient."""
    # −log(P + 1e-8) would stand at 18.42 with a gradient of 0
    chosen, rejected = ((peak(rating, 120.0, torch.float32) - 60).requires_grad_() for rating in (1, 10))
    assert chosen.tolist() == [[60.0] + [-60.0] * 9]
    loss = ordinal_loss(chosen, rejected, ties)
    assert loss.item() == pytest.approx({"strict": 240 - math.log(45), "half": 120.0}[ties], rel=1e-6)
    loss.backward()
    # strict: p_w(1) = 1 and q_w(1) = 0. half: the two ties share the posterior, q_w(1) = q_l(10) = ½
    largest = {"strict": 1.0, "half": 0.5}[ties]
    for grad in (chosen.grad, rejected.grad):
        assert grad.abs().max().item() == pytest.approx(largest, abs=1e-5)
    assert chosen.grad[0, 0] > 0 and rejected.grad[0, 9] > 0  # a step down takes the 1 from w and the 10 from l


def test_strict_ties_push_twins_to_uniform_and_half_ties_leave_them():
    """Two answers with one distribution have the strict P = (1 − Σ p²)/2, best at uniform, and the half P = ½."""
    logits = vector(0, 0, 0, 0, 0, 0, 1, 3, 1, 0)[None].requires_grad_()
    assert rating_mean_std(logits)[0].item() > 7
    assert torch.autograd.grad(ordinal_loss(logits, logits, "half"), logits)[0].abs().max() < 1e-12
    for _ in range(300):
        logits.data -= 3 * torch.autograd.grad(ordinal_loss(logits, logits, "strict"), logits)[0]
    close(logits.softmax(-1), torch.full((1, K), 0.1, dtype=torch.float64), atol=1e-3, rtol=0)
    mean, std = rating_mean_std(logits)
    assert mean.item() == pytest.approx(5.5, abs=0.02)
    assert std.item() == pytest.approx(math.sqrt(8.25), abs=0.02)  # not what the model doubts, but what the loss likes


@both_ties
def test_ordinal_centering_value(ties):
    """The centering term is c (E_w + E_l − (K+1))², a mean over the batch."""
    fours = torch.tensor([[0, 0, 0, 100.0]], dtype=torch.float64)
    for chosen, rejected, value in (
        # ratings 10 and 7 make 17 − 11 = 6, squared 36; ratings 8 and 3 make 0; the mean is 18, .01 · 18 = .18
        (torch.cat([peak(10), peak(8)]), torch.cat([peak(7), peak(3)]), 0.18),
        # K = 4: uniform ratings have E = 2.5 each, which make K + 1; certain 4s make 8 − 5 = 3, squared 9
        (0 * fours, 0 * fours, 0.0),
        (fours, fours, 0.09),
    ):
        plain, centered = (ordinal_loss(chosen, rejected, ties, c) for c in (0.0, 0.01))
        assert (centered - plain).item() == pytest.approx(value, abs=1e-12)


@both_ties
def test_certain_ratings_have_finite_gradients_with_centering(ties):
    """A one-hot has a finite gradient: the root in σ, whose slope is infinite at 0, is no part of the loss."""
    chosen, rejected = (peak(rating, 1e4, torch.float32).requires_grad_() for rating in (10, 1))
    ordinal_loss(chosen, rejected, ties, 0.01).backward()
    assert chosen.grad.isfinite().all() and rejected.grad.isfinite().all()


@pytest.mark.parametrize("w, v", [((2, 10), (2, 9)), ((2, 10), (1, 10)), (10, 10), ((2, 1), (2, 1)), ((2, 10), 10)])
def test_other_shapes_of_logits_are_refused(w, v):
    """The loss refuses all but (B, K) twice, K ≥ 2, which would broadcast; a scalar head is no rating."""
    with pytest.raises(ValueError, match="must be"):
        ordinal_loss(torch.zeros(w), torch.zeros(v))


def test_another_name_for_ties_is_refused():
    """An unknown treatment of ties is an error, not a silent default."""
    with pytest.raises(ValueError, match="strict or half"):
        ordinal_loss(torch.zeros(1, K), torch.zeros(1, K), "none")


def test_certain_rating_is_its_own_mean():
    """Ratings count from 1: a one-hot at k has E = k and σ = 0, exactly."""
    mean, std = rating_mean_std(torch.cat([peak(k, 1e4, torch.float32) for k in range(1, K + 1)]))
    assert (mean.tolist(), std.tolist()) == ([*range(1, K + 1)], [0.0] * K)


def test_mean_and_deviation_by_hand():
    """Each row has its own E = Σ k p(k) and σ² = Σ (k − E)² p(k), for K = 10 and for K = 3."""
    # uniform: E = 5.5, σ² = (10² − 1)/12 = 8.25. ¾ on 2 and ¼ on 10: E = 4, σ² = ¾ · 4 + ¼ · 36 = 12
    two = torch.full((K,), -torch.inf, dtype=torch.float64)
    two[1], two[9] = math.log(0.75), math.log(0.25)
    close(rating_mean_std(torch.stack([torch.full_like(two, 3.0), two])), (vector(5.5, 4.0), vector(8.25, 12.0).sqrt()))
    # p = (¼, ¼, ½): E = 2.25, σ² = ¼ · 1.5625 + ¼ · .0625 + ½ · .5625 = .6875
    close(rating_mean_std(vector(0.25, 0.25, 0.5).log()[None]), (vector(2.25), vector(0.6875).sqrt()))


def test_deviation_is_never_nan():
    """Where one rating is all but certain, σ in float32 is that of float64; E[k²] − E² would round to below 0."""
    noise = torch.randn(2000, K)
    heights = torch.linspace(0, 25, 2000)[:, None]
    logits = torch.cat([noise * heights, noise * 1e4, noise + heights * torch.eye(K)[torch.arange(2000) % K]])
    mean, std = rating_mean_std(logits)
    exact_mean, exact_std = rating_mean_std(logits.double())
    assert mean.isfinite().all() and std.isfinite().all() and (std >= 0).all()
    close(mean.double(), exact_mean, atol=1e-5, rtol=0)
    close(std.double(), exact_std, atol=1e-5, rtol=1e-3)
