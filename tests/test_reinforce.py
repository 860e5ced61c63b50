"""REINFORCE on a handful of numbers: every expected value is worked out in a comment."""

import math

import pytest
import torch

from rlhf_min.reinforce import (
    MovingAverageBaseline,
    kl_estimate,
    leave_one_out,
    policy_gradient_loss,
    prefix_kl,
    shaped_reward,
    sigma_weight,
    step_metrics,
)
from rlhf_min.rollout import Rollout
from rlhf_min.support.parallel import ALONE


def tensor(values, **kwargs):
    return torch.tensor(values, dtype=torch.float64, **kwargs)


def close(got, expected, **tolerance):
    torch.testing.assert_close(got, expected, **tolerance)


# two answers; the second ends after two tokens, and behind its end stands what a mask must hide
LOGPROBS = [[-1.0, -2.0, -0.5], [-0.25, -1.0, -math.inf]]
REF_LOGPROBS = [[-1.5, -2.5, -1.0], [-0.5, -0.5, math.nan]]
MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_shaped_reward():
    """A positive KL lowers the reward by β kl, as a new tensor that carries no gradient."""
    reward, kl = tensor([1.0, 2.0], requires_grad=True), tensor([0.5, -3.0], requires_grad=True)
    shaped = shaped_reward(reward, kl, 0.1)
    close(shaped, tensor([0.95, 2.3]))  # 1 − .1 · .5, 2 + .1 · 3
    assert not shaped.requires_grad
    assert (reward.tolist(), kl.tolist()) == ([1.0, 2.0], [0.5, -3.0])  # they are logged as they are


def test_baseline_averages_all_past_answers():
    """The baseline is 0, then the mean over all answers of all batches so far, whatever their sizes."""
    baseline, values = MovingAverageBaseline(), []
    for rewards in ([1.0, 2.0], [-3.0], [-4.0, 9.0]):
        values.append(baseline.value)
        baseline.update(tensor(rewards, requires_grad=True))
    assert [*values, baseline.value] == [0.0, 1.5, 0.0, 1.0]  # (1 + 2) / 2, (1 + 2 − 3) / 3, (1 + 2 − 3 − 4 + 9) / 5
    assert isinstance(baseline.value, float)  # no graph is kept over steps


def test_leave_one_out_by_hand():
    """The baseline of an answer is the mean of the *other* answers to its prompt, one prompt a row."""
    # 1 − (2 + 6)/2, 2 − (1 + 6)/2, 6 − (1 + 2)/2;  the second prompt, whose rewards are larger, on its own
    advantages = leave_one_out(tensor([[1.0, 2.0, 6.0], [10.0, 10.0, 13.0]]))
    close(advantages, tensor([[-3.0, -1.5, 4.5], [-1.5, -1.5, 3.0]]))
    close(leave_one_out(tensor([[1.0, 4.0]])), tensor([[-3.0, 3.0]]))  # k = 2: the difference of the two


def test_sigma_weight_by_hand():
    """The weight f(σ) = 1/(1 + σ) is 1 where the judge is certain, and less the more it doubts."""
    close(sigma_weight(tensor([0.0, 0.25, 1.0, 3.0])), tensor([1.0, 0.8, 0.5, 0.25]))


def test_kl_estimates_by_hand():
    """The difference d is the *sum* over an answer's tokens, policy minus reference; k2 and k3 are taken of that."""
    # answer 1: d = .5 + .5 + .5 = 1.5;  answer 2, two tokens: d = .25 − .5 = −.25
    arguments = tensor(LOGPROBS), tensor(REF_LOGPROBS), MASK
    close(kl_estimate(*arguments), tensor([1.5, -0.25]))  # k1 is the default
    close(kl_estimate(*arguments, kind="k1"), tensor([1.5, -0.25]))
    # d²/2 = 1.125, .03125 (token by token it would be .375 for answer 1)
    close(kl_estimate(*arguments, kind="k2"), tensor([1.125, 0.03125]))
    # e^(−1.5) − 1 + 1.5 = .2231302 + .5;  e^.25 − 1 − .25 = 1.2840254 − 1.25
    close(kl_estimate(*arguments, kind="k3"), tensor([0.7231302, 0.0340254]), atol=1e-7, rtol=0)


def test_kl_of_a_model_with_itself():
    """Identical log-probs give exactly 0 for every estimator, also for k3 near 0, where e^(−d) − 1 would not."""
    logprobs, mask = torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool)
    for kind in ("k1", "k2", "k3"):
        assert kl_estimate(logprobs, logprobs.clone(), mask, kind).tolist() == [0.0, 0.0, 0.0]
    logits = torch.randn(3, 4, 5)
    assert prefix_kl(logits, logits.clone(), mask).tolist() == [0.0, 0.0, 0.0]
    # d = 1e−9: k3 = d²/2 = 5e−19, far below the 1e−16 that rounding would leave
    tiny = kl_estimate(tensor([[1e-9]]), tensor([[0.0]]), torch.tensor([[True]]), "k3")
    assert abs(tiny.item()) < 1e-17


def test_prefix_kl_by_hand():
    """The sum Σ_t Σ_v π (log π − log π_ref) has the policy first and no token behind the mask, be it NaN."""
    # π = (.5, .5), π_ref = (.75, .25): .5 log(.5/.75) + .5 log(.5/.25) = .1438410; of (.9, .1) .5108256
    even = tensor([0.5, 0.5]).log()
    logits = torch.stack([even, even, even])[None]  # (1, 3, 2)
    others = tensor([[0.75, 0.25], [0.9, 0.1], [math.nan, math.nan]])
    ref_logits = others.log()[None] + 7.0  # logits: a constant must not matter
    kl = prefix_kl(logits, ref_logits, torch.tensor([[True, True, False]]))
    assert kl.shape == (1,)
    assert kl.item() == pytest.approx(0.1438410 + 0.5108256, abs=1e-6)


def test_policy_gradient_loss_value_and_gradient():
    """The loss is −mean_B [A Σ_t log π]; each token of an answer gets −A/B, and no token behind its end any."""
    logprobs = tensor(LOGPROBS, requires_grad=True)
    # sums −3.5 and −1.25 (the third token of the second answer is masked); −(2 · −3.5 − 4 · −1.25) / 2 = 1
    loss = policy_gradient_loss(logprobs, tensor([2.0, -4.0]), MASK)
    assert loss.item() == pytest.approx(1.0)
    loss.backward()
    close(logprobs.grad, tensor([[-1.0, -1.0, -1.0], [2.0, 2.0, 0.0]]))


def test_advantage_is_a_constant():
    """No gradient flows into the advantage, even if the caller forgot to detach it."""
    logprobs = tensor(LOGPROBS, requires_grad=True)
    advantage = kl_estimate(logprobs, tensor(REF_LOGPROBS), MASK)
    policy_gradient_loss(logprobs, advantage, MASK).backward()
    # A = (1.5, −.25) as constants: −A/B = −.75 and .125
    close(logprobs.grad, tensor([[-0.75] * 3, [0.125, 0.125, 0.0]]))


@pytest.mark.parametrize("shape", [(2, 1), (2, 3), (1,), ()])
def test_advantage_of_another_shape_is_refused(shape):
    """The loss refuses an advantage that is not (B,), which would broadcast against the (B,) answers."""
    with pytest.raises(ValueError, match="advantage"):
        policy_gradient_loss(tensor(LOGPROBS), torch.ones(shape), MASK)


@pytest.mark.parametrize("shape", [(4, 1), (4,), (2, 2, 2)])
def test_leave_one_out_needs_two_answers(shape):
    """Leave-one-out refuses a single answer, which has no other, and a flat batch, which does not say what k is."""
    with pytest.raises(ValueError, match=r"\(P, k\)"):
        leave_one_out(torch.zeros(shape))


def test_kl_estimate_refuses_another_kind():
    """An unknown estimator is an error, not a silent default."""
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), kind="k4")


def test_step_metrics_by_hand():
    """For answers of 3 and 1 tokens the entropy is per token, (.5 + 1 + 1.5 + 2) / 4, and the rest per answer."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rollout = Rollout(torch.zeros(2, 5, dtype=torch.long), mask, mask, torch.tensor([True, True]))
    logprobs = torch.tensor([[-0.5, -1.0, -1.5], [-2.0, -9.0, -9.0]], requires_grad=True)
    columns = {"reward": torch.tensor([1.0, 4.0]), "kl": torch.tensor([0.0, 0.5])}
    expected = {"reward": 2.5, "reward_std": 1.5, "kl": 0.25, "entropy": 1.25}
    expected |= {"completions/mean_length": 2.0, "completions/clipped_ratio": 0.0}
    assert step_metrics(ALONE, rollout, logprobs, columns) == pytest.approx(expected)
