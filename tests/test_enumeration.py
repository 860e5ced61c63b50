"""The gold standard: a real language model so small that every answer it can give is written down.

Four tokens, of which 3 is EOS, and answers of at most three: an answer is 3, or a3, or ab3, or abc with a, b, c in 0..2
or c = 3: 1 + 3 + 9 + 27 = 40 answers to a prompt. Their probabilities come from prefixes of one length at a time,
without padding. They make every expectation a sum, and autograd through that sum makes every gradient exact. Of the
package's code only the lists of answers and batches have a part in it: what it computes is compared with these sums.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_min.data import Prompt
from rlhf_min.evaluation import judge_policy, mean_se
from rlhf_min.oracle import all_answers, all_batches
from rlhf_min.reinforce import (
    MovingAverageBaseline,
    kl_estimate,
    leave_one_out,
    policy_gradient_loss,
    prefix_kl,
    shaped_reward,
    sigma_weight,
)
from rlhf_min.rollout import Rollout, completion_logits, completion_mask, sample, token_logprobs, uniform_numbers
from rlhf_min.support.batches import pad
from rlhf_min.support.models import get_weights

EOS, LENGTH, TEMPERATURE, BETA = 3, 3, 0.8, 0.3
PROMPTS = [[0, 1], [2]]  # the second one is left-padded
ANSWERS = all_answers(EOS, LENGTH)
CASES = [(x, y) for x in PROMPTS for y in ANSWERS]  # N = 80
SHUFFLED = torch.randperm(len(CASES), generator=torch.Generator().manual_seed(5))
REWARD = torch.linspace(-1, 2, len(CASES), dtype=torch.float64)[SHUFFLED]  # r(x, y): any numbers will do
COMPLETIONS = torch.tensor([[*y, *[EOS] * (LENGTH - len(y))] for _, y in CASES])  # (N, T), padded with EOS
MASK = torch.tensor([[t < len(y) for t in range(LENGTH)] for _, y in CASES])  # (N, T), by construction


@pytest.fixture
def model():
    """A GPT-2 of one layer and width 8 in float64, its logits far from uniform."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 4, "n_positions": 8, "n_layer": 1, "n_embd": 8, "n_head": 2, "initializer_range": 0.5}
    config = GPT2Config(**sizes, eos_token_id=EOS, bos_token_id=EOS, pad_token_id=EOS)
    return GPT2LMHeadModel(config).double().eval()


@pytest.fixture
def reference(model):
    """The weights of another policy near the model's."""
    return {name: w + 0.1 * torch.randn_like(w) for name, w in get_weights(model).items()}


def exact_logits(model, weights=None):
    """(N, T, V): logits / temperature before every token of every answer, from its prefix; 0 behind the end."""
    table, prefixes = {}, {(*x, *y[:t]) for x, y in CASES for t in range(len(y))}
    for length in set(map(len, prefixes)):
        rows = [prefix for prefix in prefixes if len(prefix) == length]
        inputs = {"input_ids": torch.tensor(rows)}
        output = model(**inputs) if weights is None else torch.func.functional_call(model, weights, kwargs=inputs)
        table |= zip(rows, output.logits[:, -1] / TEMPERATURE)
    zero = torch.zeros(4, dtype=torch.float64)
    rows = [[table[(*x, *y[:t])] if t < len(y) else zero for t in range(LENGTH)] for x, y in CASES]
    return torch.stack([torch.stack(row) for row in rows])


def exact_logprobs(model, weights=None):
    """(N, T): log π(y_t | x, y_<t), 0 behind the end."""
    logp = exact_logits(model, weights).log_softmax(-1)  # (N, T, V)
    return logp.gather(-1, COMPLETIONS[:, :, None])[:, :, 0].masked_fill(~MASK, 0.0)


def close(got, expected, atol=1e-12):
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)


def expectation(logp, values):
    """E_x E_{y~π}[values], x uniform over the two prompts; log π (N,), values (N,)."""
    return (logp.exp() * values).sum() / len(PROMPTS)


def gradient(scalar, model):
    """∂ scalar / ∂θ as one vector; θ that it does not depend on count 0."""
    parts = torch.autograd.grad(scalar, list(model.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def enumeration_rollout():
    """All answers to both prompts as one batch, as if they had been sampled; pad is EOS."""
    tokens, attention_mask = pad([x for x, _ in CASES], EOS, "cpu", side="left")
    mask = completion_mask(COMPLETIONS, EOS)
    tokens, attention_mask = torch.cat([tokens, COMPLETIONS], dim=1), torch.cat([attention_mask, mask], dim=1)
    return Rollout(tokens, attention_mask, mask, COMPLETIONS.eq(EOS).any(-1))


def scored(model, weights):
    """What exact_logprobs should be, from the package."""
    return token_logprobs(model, enumeration_rollout(), TEMPERATURE, weights)


# token_logprobs works in float32, whatever the model: its rounding, 1e-7, is what limits the first of the two. The
# other feeds the same step with the exact log-probs in float64.
scorers = pytest.mark.parametrize("score, tolerance", [(scored, 2e-6), (exact_logprobs, 1e-10)])


def test_all_answers():
    """The 40 answers are distinct, and the completion mask of each, with pad == EOS, is its length."""
    assert len({tuple(y) for y in ANSWERS}) == 40
    assert torch.equal(enumeration_rollout().mask, MASK)


@scorers
def test_probabilities_sum_to_one(model, score, tolerance):
    """The probabilities of all answers to a prompt sum to 1: the EOS counts, and nothing behind it does."""
    logp = score(model, None).masked_fill(~MASK, 0.0).sum(-1).double()
    sums = logp.exp().view(len(PROMPTS), -1).sum(-1)
    close(sums, torch.ones_like(sums), atol=tolerance)


def test_logprobs_are_exact(model, reference):
    """Batched, padded log-probs are those of growing prefixes, at the model's own weights and at others."""
    for weights in (None, reference):
        close(scored(model, weights)[MASK].double(), exact_logprobs(model, weights)[MASK], atol=2e-6)


def objective(model, reference, reward=REWARD):
    """J = E[r] − β KL(π ‖ π_ref), straight from its definition, differentiable."""
    logp, ref_logp = exact_logprobs(model).sum(-1), exact_logprobs(model, reference).detach().sum(-1)
    return expectation(logp, reward) - BETA * expectation(logp, logp - ref_logp)


@pytest.mark.parametrize("baseline", [0.0, -1.7])
@scorers
def test_step_has_the_exact_gradient(model, reference, score, tolerance, baseline):
    """In expectation the step of train_warp.py goes up ∇J exactly, whatever the past's baseline."""
    exact = gradient(objective(model, reference), model)
    # the step, word for word, on all answers at once; a factor N p(x, y) makes the batch's mean an expectation
    logprobs = score(model, None)  # (N, T)
    with torch.no_grad():
        anchor_logprobs = score(model, reference)
        weight = len(CASES) * exact_logprobs(model).sum(-1).exp() / len(PROMPTS)  # (N,)
    anchor_kl = kl_estimate(logprobs.detach(), anchor_logprobs, MASK)
    shaped = shaped_reward(REWARD, anchor_kl, BETA)
    advantage = shaped - baseline
    got = gradient(policy_gradient_loss(logprobs, weight * advantage, MASK), model)
    assert exact.abs().max() > 0.1
    assert (got + exact).abs().max() < tolerance


def test_expected_estimates(model, reference):
    """The estimates k1 and k3 have the expectation KL(π ‖ π_ref), exactly; k2 has E[d²]/2, which is not the KL."""
    logprobs, ref_logprobs = exact_logprobs(model), exact_logprobs(model, reference)
    logp, d = logprobs.sum(-1), (logprobs - ref_logprobs).sum(-1)
    kl = expectation(logp, d)
    mean = {kind: expectation(logp, kl_estimate(logprobs, ref_logprobs, MASK, kind)) for kind in ("k1", "k2", "k3")}
    close(mean["k1"], kl)
    close(mean["k3"], kl)
    close(mean["k2"], expectation(logp, d**2) / 2)
    assert (mean["k2"] - kl).abs() > 0.05 * kl
    assert kl_estimate(logprobs, ref_logprobs, MASK, "k1").min() < 0
    assert kl_estimate(logprobs, ref_logprobs, MASK, "k3").min() >= 0


def test_prefix_kl_is_exact_in_expectation(model, reference):
    """The sum of next-token KLs over sampled prefixes has that expectation, too, at less variance than k1."""
    logprobs, ref_logprobs = exact_logprobs(model), exact_logprobs(model, reference)
    logp, k1 = logprobs.sum(-1), kl_estimate(logprobs, ref_logprobs, MASK)
    kl = expectation(logp, k1)
    estimate = prefix_kl(exact_logits(model), exact_logits(model, reference), MASK)
    close(expectation(logp, estimate), kl)
    assert expectation(logp, (estimate - kl) ** 2) < expectation(logp, (k1 - kl) ** 2) / 2
    rollout = enumeration_rollout()
    scored = [completion_logits(model, rollout, TEMPERATURE, weights) for weights in (None, reference)]
    close(prefix_kl(*scored, rollout.mask).double(), estimate, atol=2e-6)


def test_gradients_of_the_estimates_as_losses(model, reference):
    """Differentiated as losses, k1 gives 0, k2 the gradient of KL(π ‖ π_ref), k3 that of KL(π_ref ‖ π)."""
    logprobs, ref_logprobs = exact_logprobs(model), exact_logprobs(model, reference).detach()
    logp, ref_logp = logprobs.sum(-1), ref_logprobs.sum(-1)
    reverse = gradient(expectation(logp, logp - ref_logp), model)
    forward = gradient(expectation(ref_logp, ref_logp - logp), model)
    assert (reverse - forward).abs().max() > 0.01
    for kind, exact in (("k1", torch.zeros_like(reverse)), ("k2", reverse), ("k3", forward)):
        loss = expectation(logp.detach(), kl_estimate(logprobs, ref_logprobs, MASK, kind))  # answers are drawn, not π
        assert (gradient(loss, model) - exact).abs().max() < 1e-10, kind


def first_prompt(model, reference):
    """For one prompt, which is enough: log-probs (n, T), mask (n, T), p (n,), R (n,) and the exact ∇J."""
    n = len(ANSWERS)
    logprobs, ref_logprobs, mask = exact_logprobs(model)[:n], exact_logprobs(model, reference).detach()[:n], MASK[:n]
    shaped = shaped_reward(REWARD[:n], kl_estimate(logprobs.detach(), ref_logprobs, mask), BETA)
    logp, ref_logp = logprobs.sum(-1), ref_logprobs.sum(-1)
    exact = gradient((logp.exp() * (REWARD[:n] - BETA * (logp - ref_logp))).sum(), model)
    return logprobs, mask, logp.exp().detach(), shaped, exact


@pytest.mark.parametrize("k", [2, 3])
def test_baselines_over_all_batches(model, reference, k):
    """Over all batches of k answers, a mean that includes an answer's own reward scales ∇J by 1 − 1/k.

    The mean of the others, and the mean of an earlier batch, leave it as it is.
    """
    logprobs, mask, p, shaped, exact = first_prompt(model, reference)
    batches, probability = all_batches(p, k)  # (n^k, k), (n^k,)
    rewards, rows = shaped[batches], batches.flatten()
    own_mean = rewards.mean(-1, keepdim=True)
    others = (rewards.sum(-1, keepdim=True) - rewards) / (k - 1)
    # each batch is one prompt, (P, k) with P = 1, so the advantages of all batches are those of as many prompts
    assert torch.equal(leave_one_out(rewards)[7:8], leave_one_out(rewards[7:8]))
    for advantage, factor in ((rewards - own_mean, 1 - 1 / k), (rewards - others, 1.0), (leave_one_out(rewards), 1.0)):
        advantage = (len(batches) * probability[:, None] * advantage).flatten()  # times n^k p, for the batches' mean
        got = gradient(policy_gradient_loss(logprobs[rows], advantage, mask[rows]), model)
        assert (got + factor * exact).abs().max() < 1e-10


SIGMA = 2 + torch.rand(len(CASES), dtype=torch.float64, generator=torch.Generator().manual_seed(6))  # σ(x, y) in [2, 3]


def expected_step(model, reference, baseline=0.0, reward=REWARD, weight=1.0):
    """E[A ∇ log π] by enumeration of the step A = (R − b) · weight, R = reward − β kl; and R (N,)."""
    logprobs = exact_logprobs(model)
    kl = kl_estimate(logprobs.detach(), exact_logprobs(model, reference).detach(), MASK)
    shaped = shaped_reward(reward, kl, BETA)
    advantage = (shaped - baseline) * weight
    p = len(CASES) * logprobs.detach().sum(-1).exp() / len(PROMPTS)  # (N,), times N for the mean
    return -gradient(policy_gradient_loss(logprobs, p * advantage, MASK), model), shaped


def test_sigma_in_the_advantage_is_biased(model, reference):
    """The step E[(R − b) f(σ) ∇ log π] is ∇E[f R] − b ∇E[f], R as a constant: another one for every baseline b.

    With σ between 2 and 3 it is about a third of the step without f, whatever else it is. With b = 0 it climbs neither
    E[f r] − β KL nor E[f R], whose KL has a gradient of its own: 0 without f, and −β ∇E[f] with it.
    """
    f = sigma_weight(SIGMA)
    logp, ref_logp = exact_logprobs(model).sum(-1), exact_logprobs(model, reference).detach().sum(-1)
    slope_of_f = gradient(expectation(logp, f), model)
    steps = {}
    for b in (0.0, -1.7, 1.0):
        steps[b], shaped = expected_step(model, reference, b, weight=f)
        exact = gradient(expectation(logp, f * shaped), model) - b * slope_of_f
        assert (steps[b] - exact).abs().max() < 1e-10
    assert slope_of_f.norm() > 0.01
    for b in (-1.7, 1.0):
        assert ((steps[b] - steps[0.0]).norm() / abs(b)).item() == pytest.approx(slope_of_f.norm().item())
        assert (steps[b] - steps[0.0]).norm() > 0.01
    plain, _ = expected_step(model, reference)
    assert 0.2 < steps[0.0].norm() / plain.norm() < 0.4  # f is between 1/4 and 1/3
    assert (steps[0.0] - gradient(objective(model, reference, f * REWARD), model)).norm() > 0.01  # the KL outside
    kl_inside = gradient(expectation(logp, f * (REWARD - BETA * (logp - ref_logp))), model)
    close(kl_inside - steps[0.0], -BETA * slope_of_f, atol=1e-10)


@pytest.mark.parametrize(("update_first", "factor"), [(False, 1.0), (True, 0.75)])
def test_moving_average_over_two_steps(model, reference, update_first, factor):
    """Over all pairs of a past and a present answer the present step's expected gradient is ∇J.

    Updating the average before it is used, the classic mistake, puts the answer's own reward in: beside three past
    rewards it is a quarter of the mean, and ¾ of the gradient is left.
    """
    logprobs, mask, p, shaped, exact = first_prompt(model, reference)
    expected = torch.zeros_like(shaped)  # E over the past of each answer's advantage
    for past, now in itertools.product(range(len(p)), repeat=2):
        baseline = MovingAverageBaseline()
        baseline.update(shaped[past].repeat(3))  # three past rewards
        if update_first:
            baseline.update(shaped[now : now + 1])
        expected[now] += p[past] * (shaped[now] - baseline.value)
    got = gradient(policy_gradient_loss(logprobs, len(p) * p * expected, mask), model)
    assert (got + factor * exact).abs().max() < 1e-10


# Sampled


@pytest.fixture
def sampled(model):
    """(Rollout, index of each answer among ANSWERS) of 4000 answers to the first prompt, from the package's sampler."""
    generator = torch.Generator().manual_seed(0)
    rollout = sample(model, [PROMPTS[0]] * 4000, uniform_numbers(4000, 2 + LENGTH, generator), TEMPERATURE)
    index = {tuple(y): i for i, y in enumerate(ANSWERS)}
    return rollout, torch.tensor([index[tuple(c[m].tolist())] for c, m in zip(rollout.completions, rollout.mask)])


def test_sampled_answers_have_their_probabilities(model, sampled):
    """The sampler's 4000 answers, whole, follow the enumerated probabilities: chi-square."""
    n = len(ANSWERS)
    expected = 4000 * exact_logprobs(model).sum(-1).exp().detach()[:n]
    counts = torch.bincount(sampled[1], minlength=n).double()
    rare = expected < 5  # pooled, as the test wants it
    expected, counts = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (expected, counts))
    assert len(expected) > 15
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)  # mean and standard deviation of chi-square


def test_sampled_step_points_uphill(model, reference, sampled):
    """A step on 4000 sampled answers has ∇J's direction (cosine > .99) and size (within 4 standard errors)."""
    rollout, index = sampled
    exact_logprob, _, _, _, exact = first_prompt(model, reference)
    baseline = MovingAverageBaseline()
    baseline.update(torch.full((8,), 0.4, dtype=torch.float64))
    logprobs = token_logprobs(model, rollout, TEMPERATURE)
    with torch.no_grad():
        anchor_logprobs = token_logprobs(model, rollout, TEMPERATURE, reference)
    shaped = shaped_reward(REWARD[index], kl_estimate(logprobs.detach(), anchor_logprobs, rollout.mask), BETA)
    advantage = shaped - baseline.value
    step = -gradient(policy_gradient_loss(logprobs, advantage, rollout.mask), model)
    assert torch.cosine_similarity(step, exact, dim=0) > 0.99

    # along ∇J / ‖∇J‖ the step is a mean of A ∇ log π, one number per answer, whose spread is known
    direction = exact / exact.norm()
    slopes = torch.stack([gradient(logp, model) @ direction for logp in exact_logprob.sum(-1)])[index]  # (4000,)
    error = (advantage * slopes).std() / math.sqrt(4000)
    assert ((step @ direction) - exact.norm()).abs() < 4 * error


TOKENIZER = SimpleNamespace(eos_token_id=EOS, pad_token_id=EOS, decode=lambda ids, **_: str(ids))
OPTIONS = SimpleNamespace(seed=0, batch_size=1000, precision="fp32", max_length=2 + LENGTH, temperature=TEMPERATURE)


def test_evaluation_estimates_the_exact_kl(model, reference):
    """Evaluation's KL per answer is the enumerated KL within 3 standard errors, which are below 2 % of it."""
    n = len(ANSWERS)
    logp, ref_logp = (exact_logprobs(model, weights)[:n].sum(-1) for weights in (None, reference))
    kl = (logp.exp() * (logp - ref_logp)).sum().item()
    prompts = [Prompt(PROMPTS[0], "")] * 4000
    columns = judge_policy(model, TOKENIZER, prompts, {}, OPTIONS, model, reference)
    mean, error = mean_se(columns["kl"])
    assert abs(mean - kl) < 3 * error
    assert error < 0.02 * kl
    length = (logp.exp() * MASK[:n].sum(-1)).sum().item()
    mean, error = mean_se(columns["length"])
    assert abs(mean - length) < 3 * error
