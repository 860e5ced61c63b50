"""REINFORCE on a handful of numbers: every expected value is worked out in a comment."""

import math
from types import SimpleNamespace

import pytest
import torch

from rlhf_min.data import Prompt
from rlhf_min.models import get_weights
from rlhf_min.parallel import ALONE
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
from train_reinforce import ReinforceOptions, train_policy


def tensor(values, **kwargs):
    return torch.tensor(values, dtype=torch.float64, **kwargs)


# two answers; the second ends after two tokens, and behind its end stands what a mask must hide
LOGPROBS = [[-1.0, -2.0, -0.5], [-0.25, -1.0, -77.0]]
REF_LOGPROBS = [[-1.5, -2.5, -1.0], [-0.5, -0.5, math.nan]]
MASK = [[True, True, True], [True, True, False]]


def test_shaped_reward_value():
    """T14: R = r − β kl: a positive KL lowers the reward."""
    shaped = shaped_reward(tensor([1.0, 2.0]), tensor([0.5, -3.0]), 0.1)
    torch.testing.assert_close(shaped, tensor([0.95, 2.3]))  # 1 − .1 · .5, 2 + .1 · 3


@pytest.mark.parametrize("batch", [1, 64])
def test_beta_is_not_divided(batch):
    """T15: with a log-ratio of 4 and β = .25 every reward of 3 becomes 2, whatever the batch size."""
    shaped = shaped_reward(torch.full((batch,), 3.0), torch.full((batch,), 4.0), 0.25)
    assert shaped.tolist() == [2.0] * batch


def test_shaped_reward_leaves_reward_alone():
    """T16: the raw reward is logged after shaping, so shaping must not change it (or the KL) in place."""
    reward, kl = tensor([1.0, 2.0]), tensor([0.5, -3.0])
    shaped_reward(reward, kl, 0.1)
    assert reward.tolist() == [1.0, 2.0]
    assert kl.tolist() == [0.5, -3.0]


def test_shaped_reward_is_constant():
    """T14: the shaped reward is detached, though reward and KL may carry gradients."""
    reward, kl = tensor([1.0], requires_grad=True), tensor([0.5], requires_grad=True)
    assert not shaped_reward(reward, kl, 0.1).requires_grad


def test_baseline_sees_only_the_past():
    """T17: scripted rewards 1, 2, 3 meet the baselines 0, 1, 1.5, so the advantages are 1, 1, 1.5."""
    baseline, advantages = MovingAverageBaseline(), []
    for reward in (1.0, 2.0, 3.0):
        advantages.append(reward - baseline.value)
        baseline.update(tensor([reward]))
    assert advantages == [1.0, 1.0, 1.5]
    assert baseline.value == 2.0


def test_baseline_averages_answers():
    """T17: two steps of two answers: the mean of all four; duplicating every answer leaves it unchanged."""
    once, twice = MovingAverageBaseline(), MovingAverageBaseline()
    for rewards in (tensor([1.0, 2.0]), tensor([-4.0, 9.0])):
        once.update(rewards)
        twice.update(torch.cat([rewards, rewards]))
    assert once.value == twice.value == 2.0  # (1 + 2 − 4 + 9) / 4
    assert isinstance(once.value, float)  # no graph is kept over steps


def test_baseline_adds_up_in_float64():
    """T17: rewards are summed in float64: 1001 times 1/8 is 125.125, which bfloat16 would round to 125."""
    baseline = MovingAverageBaseline()
    for _ in range(7):
        baseline.update(torch.full((1001,), 0.125, dtype=torch.bfloat16))
    assert baseline.value == 0.125


def test_leave_one_out_by_hand():
    """T18: the baseline of an answer is the mean of the *other* answers to its prompt, one prompt a row."""
    # 1 − (2 + 6)/2, 2 − (1 + 6)/2, 6 − (1 + 2)/2;  the second prompt, whose rewards are larger, on its own
    advantages = leave_one_out(tensor([[1.0, 2.0, 6.0], [10.0, 10.0, 13.0]]))
    torch.testing.assert_close(advantages, tensor([[-3.0, -1.5, 4.5], [-1.5, -1.5, 3.0]]))
    # k = 2: the difference of the two
    torch.testing.assert_close(leave_one_out(tensor([[1.0, 4.0]])), tensor([[-3.0, 3.0]]))


@pytest.mark.parametrize("k", [2, 3, 4, 7])
def test_leave_one_out_is_reward_minus_mean_of_others(k):
    """T18: A_i = R_i − mean of the others, by a double loop; it sums to 0 over the answers to a prompt."""
    rewards = torch.randn(5, k, dtype=torch.float64) + 10 * torch.arange(5.0)[:, None]
    advantages = leave_one_out(rewards)
    for row, got in zip(rewards.tolist(), advantages.tolist()):
        others = [[r for j, r in enumerate(row) if j != i] for i in range(k)]
        assert got == pytest.approx([r - sum(rest) / (k - 1) for r, rest in zip(row, others)], abs=1e-12)
    assert advantages.sum(-1).abs().max() < 1e-12
    torch.testing.assert_close(advantages, k / (k - 1) * (rewards - rewards.mean(-1, keepdim=True)))


def test_leave_one_out_groups_by_prompt():
    """T18: what a prompt is worth drops out whole; grouped across the prompts it would come in as an advantage."""
    rewards = torch.randn(4, 3, dtype=torch.float64)
    worth = tensor([0.0, 5.0, -20.0, 100.0])[:, None]
    torch.testing.assert_close(leave_one_out(rewards + worth), leave_one_out(rewards), atol=1e-12, rtol=0)
    flat = (rewards + worth).flatten()  # as train_reinforce.py has it: the answers to a prompt in a row
    torch.testing.assert_close(leave_one_out(flat.view(-1, 3)).flatten(), leave_one_out(rewards).flatten())
    interleaved = leave_one_out(flat.view(3, -1).T).T.flatten()  # as if prompts came first: x1 x2 x3 x4 x1 x2 ...
    assert (interleaved - leave_one_out(rewards).flatten()).abs().max() > 10


@pytest.mark.parametrize("shape", [(4, 1), (1, 1), (4, 0), (4,), (), (2, 2, 2)])
def test_leave_one_out_needs_two_answers(shape):
    """T18: with one answer there is no other, and k/(k − 1) is infinite; a flat batch does not say what k is."""
    with pytest.raises(ValueError, match=r"\(P, k\)"):
        leave_one_out(torch.zeros(shape))


def test_sigma_weight_by_hand():
    """T33: f(σ) = 1/(1 + σ): 1 where the judge is certain, as every scalar head is, and less the more it doubts."""
    torch.testing.assert_close(sigma_weight(tensor([0.0, 0.25, 1.0, 3.0])), tensor([1.0, 0.8, 0.5, 0.25]))


def test_kl_estimates_by_hand():
    """T11: d is the *sum* over the answer's tokens, policy minus reference, and k2 and k3 are taken of that sum."""
    # answer 1: d = .5 + .5 + .5 = 1.5;  answer 2, two tokens: d = .25 − .5 = −.25
    arguments = tensor(LOGPROBS), tensor(REF_LOGPROBS), torch.tensor(MASK)
    torch.testing.assert_close(kl_estimate(*arguments), tensor([1.5, -0.25]))  # k1 is the default
    torch.testing.assert_close(kl_estimate(*arguments, kind="k1"), tensor([1.5, -0.25]))
    # d²/2 = 1.125, .03125 (token by token it would be .375 for answer 1)
    torch.testing.assert_close(kl_estimate(*arguments, kind="k2"), tensor([1.125, 0.03125]))
    # e^(−1.5) − 1 + 1.5 = .2231302 + .5;  e^.25 − 1 − .25 = 1.2840254 − 1.25
    torch.testing.assert_close(kl_estimate(*arguments, kind="k3"), tensor([0.7231302, 0.0340254]), atol=1e-7, rtol=0)


def test_kl_estimate_refuses_another_kind():
    """T58: an unknown estimator is an error, not a silent default."""
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), kind="k4")


def test_kl_of_a_model_with_itself():
    """T54: identical log-probs give exactly 0 for every estimator, also for k3 near 0, where e^(−d) − 1 would not."""
    logprobs, mask = torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool)
    for kind in ("k1", "k2", "k3"):
        assert kl_estimate(logprobs, logprobs.clone(), mask, kind).tolist() == [0.0, 0.0, 0.0]
    logits = torch.randn(3, 4, 5)
    assert prefix_kl(logits, logits.clone(), mask).tolist() == [0.0, 0.0, 0.0]
    # d = 1e−9: k3 = d²/2 = 5e−19, far below the 1e−16 that rounding would leave
    tiny = kl_estimate(tensor([[1e-9]]), tensor([[0.0]]), torch.tensor([[True]]), "k3")
    assert abs(tiny.item()) < 1e-17


def test_kl_adds_over_tokens_and_not_over_the_batch():
    """T11: the KL of an answer in two halves is the sum of the halves'; a duplicated batch has the same mean KL."""
    logprobs, ref_logprobs, mask = torch.randn(3, 6), torch.randn(3, 6), torch.ones(3, 6, dtype=torch.bool)
    whole = kl_estimate(logprobs, ref_logprobs, mask)
    halves = [kl_estimate(logprobs[:, h], ref_logprobs[:, h], mask[:, h]) for h in (slice(3), slice(3, 6))]
    torch.testing.assert_close(whole, sum(halves))
    double = kl_estimate(*(torch.cat([x, x]) for x in (logprobs, ref_logprobs, mask)))
    torch.testing.assert_close(double.mean(), whole.mean())


def test_prefix_kl_by_hand():
    """T53: Σ_t Σ_v π (log π − log π_ref), the policy first, tokens behind the mask left out, shifts ignored."""
    # π = (.5, .5), π_ref = (.75, .25): .5 log(.5/.75) + .5 log(.5/.25) = .1438410;  the other way round .1308120
    even, uneven = tensor([0.5, 0.5]).log(), tensor([0.75, 0.25]).log()
    logits = torch.stack([even, uneven, even])[None]  # (1, 3, 2)
    ref_logits = torch.stack([uneven, even, uneven])[None] + 7.0  # logits, not log-probs: a constant must not matter
    mask = torch.tensor([[True, True, False]])
    kl = prefix_kl(logits, ref_logits, mask)
    assert kl.shape == (1,)
    assert kl.item() == pytest.approx(0.1438410 + 0.1308120, abs=1e-6)


def test_prefix_kl_hides_what_is_behind_the_end():
    """T1: NaN logits behind the first EOS (of padding, say) do not reach the KL."""
    logits, mask = torch.zeros(1, 2, 3), torch.tensor([[True, False]])
    assert prefix_kl(logits, torch.tensor([[[0.0] * 3, [math.nan] * 3]]), mask).item() == pytest.approx(0.0, abs=1e-7)


def test_policy_gradient_loss_value():
    """T13: L = −mean_B [A Σ_t log π]: minus, a sum over tokens, a mean over answers."""
    # sums −3.5 and −1.25 (the third token of the second answer is masked); −(2 · −3.5 − 4 · −1.25) / 2 = 1
    loss = policy_gradient_loss(tensor(LOGPROBS), tensor([2.0, -4.0]), torch.tensor(MASK))
    assert loss.item() == pytest.approx(1.0)


def test_policy_gradient_loss_gradient():
    """T61: every token of an answer gets −A/B, no token behind its end gets any: token- and answer-level agree."""
    logprobs = tensor(LOGPROBS, requires_grad=True)
    policy_gradient_loss(logprobs, tensor([2.0, -4.0]), torch.tensor(MASK)).backward()
    torch.testing.assert_close(logprobs.grad, tensor([[-1.0, -1.0, -1.0], [2.0, 2.0, 0.0]]))


def test_masked_infinities_do_not_poison():
    """T1: −inf behind the first EOS (a forbidden pad, say) leaves value and gradient finite."""
    logprobs = tensor([[-1.0, -math.inf]], requires_grad=True)
    loss = policy_gradient_loss(logprobs, tensor([1.0]), torch.tensor([[True, False]]))
    loss.backward()
    assert loss.item() == 1.0
    assert logprobs.grad.tolist() == [[-1.0, 0.0]]


def test_advantage_is_a_constant():
    """T14: no gradient flows into the advantage, even if the caller forgot to detach it."""
    logprobs, mask = tensor(LOGPROBS, requires_grad=True), torch.tensor(MASK)
    advantage = kl_estimate(logprobs, tensor(REF_LOGPROBS), mask)
    policy_gradient_loss(logprobs, advantage, mask).backward()
    # A = (1.5, −.25) as constants: −A/B = −.75 and .125
    torch.testing.assert_close(logprobs.grad, tensor([[-0.75] * 3, [0.125, 0.125, 0.0]]))


@pytest.mark.parametrize("shape", [(2, 1), (2, 3), (1,), (3,), ()])
def test_advantage_of_another_shape_is_refused(shape):
    """T24: an advantage that is not (B,) would broadcast against the (B,) answers; it is refused."""
    with pytest.raises(ValueError, match="advantage"):
        policy_gradient_loss(tensor(LOGPROBS), torch.ones(shape), torch.tensor(MASK))


def test_duplicated_batch_leaves_loss_and_gradient():
    """T11: the batch is a mean: the same answers twice give the same loss and the same gradient."""
    theta = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    advantage, mask = tensor([2.0, -4.0]), torch.tensor(MASK)
    once = policy_gradient_loss(theta, advantage, mask)
    twice = policy_gradient_loss(*(torch.cat([x, x]) for x in (theta, advantage, mask)))
    torch.testing.assert_close(twice, once)
    torch.testing.assert_close(*(torch.autograd.grad(loss, theta)[0] for loss in (twice, once)))


def test_bandit_gradient_is_exact():
    """T13: on a three-armed bandit the loss, weighted by the probabilities, has the gradient −∂/∂θ Σ_a π_a r_a."""
    theta, rewards = tensor([0.3, -0.2, 0.1], requires_grad=True), tensor([0.0, 0.5, 1.0])
    exact = torch.autograd.grad(theta.softmax(-1) @ rewards, theta)[0]
    probabilities = theta.softmax(-1).detach()
    advantage = 3 * probabilities * (rewards - 0.7)  # a mean over three arms is the expectation; the baseline drops out
    loss = policy_gradient_loss(theta.log_softmax(-1)[:, None], advantage, torch.ones(3, 1, dtype=torch.bool))
    torch.testing.assert_close(torch.autograd.grad(loss, theta)[0], -exact)


def test_bandit_learns():
    """T13: the right sign: 60 sampled steps raise the best arm's probability from a tenth to above .9."""
    theta = tensor([1.0, 1.0, -1.0], requires_grad=True)
    rewards, baseline, mask = tensor([0.0, 0.5, 1.0]), MovingAverageBaseline(), torch.ones(32, 1, dtype=torch.bool)
    assert theta.softmax(-1)[2] < 0.1
    for _ in range(60):
        arms = torch.multinomial(theta.softmax(-1).detach(), 32, replacement=True)  # (B,)
        logprobs = theta.log_softmax(-1)[arms, None]  # (B, 1)
        shaped = shaped_reward(rewards[arms], torch.zeros(32), 0.1)
        loss = policy_gradient_loss(logprobs, shaped - baseline.value, mask)
        theta.data -= torch.autograd.grad(loss, theta)[0]
        baseline.update(shaped)
    assert theta.softmax(-1)[2] > 0.9


def test_baseline_lowers_the_variance():
    """T17: with rewards far from 0 the past mean removes most of the spread of the gradient; that is what it is for."""
    theta, rewards = tensor([0.3, -0.2, 0.1], requires_grad=True), tensor([10.0, 10.5, 11.0])

    def variance(value):  # Var over arms of (R − b) ∇ log π, summed over coordinates, by enumeration
        scores = torch.stack([torch.autograd.grad(theta.log_softmax(-1)[a], theta)[0] for a in range(3)])  # (3, 3)
        samples, p = (rewards - value)[:, None] * scores, theta.softmax(-1).detach()[:, None]
        return ((p * samples**2).sum(0) - (p * samples).sum(0) ** 2).sum().item()

    baseline = MovingAverageBaseline()
    baseline.update(rewards)
    assert variance(baseline.value) < variance(0.0) / 100


# The step of train_reinforce.py


def metrics_of(steps, policy, tokenizer, judge, **options):
    """The metrics of the first steps on four prompts of different lengths, at β = 0 unless asked."""
    lines = []
    log = SimpleNamespace(
        team=ALONE,
        progress=lambda title, steps, state: range(1, steps + 1),
        step=lambda show, **line: lines.append(line),
    )
    options = {"beta": 0.0, "batch_size": 12, "max_length": 12, "temperature": 1.0, "precision": "fp32", **options}
    options = ReinforceOptions(steps=steps, lr=1e-2, **options)
    prompts = [Prompt(tokenizer(text)["input_ids"], text) for text in ("I", "The", "The film", "The film was")]
    train_policy(policy, tokenizer, judge, prompts, get_weights(policy), options, log)
    return lines


def prompt_judge(prompts, completions, ended):
    """A reward that depends on the prompt alone, and no doubt."""
    return torch.tensor([float(len(prompt)) for prompt in prompts]), torch.zeros(len(prompts))


@pytest.mark.parametrize("k", [2, 3])
def test_a_reward_of_the_prompt_alone_teaches_nothing(tiny_policy, tiny_tokenizer, k):
    """T18: compared with answers to the *same* prompt every advantage is 0, so that not one weight moves."""
    before = get_weights(tiny_policy)
    lines = metrics_of(3, tiny_policy, tiny_tokenizer, prompt_judge, num_generations=k, baseline="leave-one-out")
    assert [line["grad_norm"] for line in lines] == [0.0, 0.0, 0.0]
    assert all(line["reward_std"] > 1 for line in lines)
    assert all(weight.equal(before[name]) for name, weight in get_weights(tiny_policy).items())
    lines = metrics_of(1, tiny_policy, tiny_tokenizer, prompt_judge, num_generations=k)  # the moving average does move
    assert lines[0]["grad_norm"] > 0.1


def doubting_judge(prompts, completions, ended):
    """Reward 6 and σ = 1 for the first half of the answers, reward 4 and σ = 3 for the rest."""
    half = len(prompts) // 2
    return torch.tensor([6.0] * half + [4.0] * half), torch.tensor([1.0] * half + [3.0] * half)


# off: b = A = (6 + 4)/2. advantage: A = (6/2 + 4/4)/2 = 2, and b is of rewards without σ.
# penalty, λ = ½: R = 5.5, 2.5
@pytest.mark.parametrize(
    ("flags", "advantage", "baseline"),
    [
        ({"sigma": "off", "sigma_coefficient": 7.0}, 5.0, 5.0),
        ({"sigma": "advantage", "sigma_coefficient": 7.0}, 2.0, 5.0),
        ({"sigma": "penalty", "sigma_coefficient": 0.5}, 4.0, 4.0),
    ],
)
def test_where_sigma_enters(tiny_policy, tiny_tokenizer, flags, advantage, baseline):
    """T33: f(σ) weights the advantage and leaves the baseline alone; λσ is taken from the reward, and so from both."""
    first, second = metrics_of(2, tiny_policy, tiny_tokenizer, doubting_judge, **flags)
    assert (first["reward"], first["sigma"], first["baseline"]) == (5.0, 2.0, 0.0)  # T16: the raw reward is logged
    assert first["advantage"] == pytest.approx(advantage)
    assert second["baseline"] == pytest.approx(baseline)


def test_an_answer_without_an_end_pays(tiny_policy, tiny_tokenizer):
    """T22: --missing-eos-penalty is taken from the reward of each answer that was cut off, and of no other."""
    ends = []

    def judge(prompts, completions, ended):
        ends.append(ended.double().mean().item())
        return torch.full((len(prompts),), 2.0), torch.zeros(len(prompts))

    first, second = metrics_of(2, tiny_policy, tiny_tokenizer, judge, missing_eos_penalty=3.0, max_length=60)
    assert 0 < ends[0] < 1
    assert first["reward"] == 2.0
    assert first["completions/clipped_ratio"] == pytest.approx(1 - ends[0])
    assert second["baseline"] == pytest.approx(2 - 3 * (1 - ends[0]))


def test_step_metrics_by_hand():
    """Two answers, of 3 and 1 tokens: the entropy is per token, (.5 + 1 + 1.5 + 2) / 4, the rest per answer."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rollout = Rollout(torch.zeros(2, 5, dtype=torch.long), mask, mask, torch.tensor([False, True]))
    logprobs = torch.tensor([[-0.5, -1.0, -1.5], [-2.0, -9.0, -9.0]], requires_grad=True)
    metrics = step_metrics(ALONE, rollout, logprobs, reward=torch.tensor([1.0, 4.0]), kl=torch.tensor([0.0, 0.5]))
    assert metrics == pytest.approx({
        "reward": 2.5, "reward_std": 1.5, "kl": 0.25, "entropy": 1.25, "completions/mean_length": 2.0,
        "completions/clipped_ratio": 0.5,
    })  # fmt: skip
