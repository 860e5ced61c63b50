"""REINFORCE on whole answers (Back to Basics, 2402.14740): one answer is one action.

    objective   J(θ) = E_x E_{y~π}[ r(x, y) ] − β KL(π ‖ π_ref)
    shaped      R(x, y) = r(x, y) − β [log π(y|x) − log π_ref(y|x)]        a constant for autograd
    gradient    ∇J = E[ (R − b) ∇ log π(y|x) ],      log π(y|x) = Σ_t log π(y_t | x, y_<t)

with any baseline b that does not depend on y. π_ref is the policy we want to stay close to: π_sft in
train_reinforce.py, the EMA anchor in train_warp.py. B answers of at most T tokens; `mask` is True up to and including
the first EOS.
"""

import torch


def shaped_reward(reward, kl, beta):
    """R = r − β · kl, (B,) × 2 → (B,), detached (eq. 3).

    With d = log π − log π_ref, KL = E[d] and ∇ KL = E[d ∇ log π] + E[∇ log π]. The second expectation is 0. So the
    whole gradient comes through E[R ∇ log π]. If R were not detached, a step down −R log π would also follow
    log π ∇R = −β log π ∇ log π, on average β ∇(entropy of π): a bonus that nobody asked for.
    """
    return (reward - beta * kl).detach()


class MovingAverageBaseline:
    """b = the mean of the shaped rewards of all past steps, 0 before the first (Back to Basics, eq. 6).

    Use `value`, then `update`: a baseline that has seen the reward it is subtracted from scales the gradient down.
    """

    def __init__(self):
        self.total, self.count = 0.0, 0

    @property
    def value(self):
        """b, a float, in units of the reward."""
        return self.total / self.count if self.count else 0.0

    def update(self, rewards):
        """Take in the shaped rewards (B,) of a step."""
        self.total += rewards.double().sum().item()
        self.count += rewards.numel()


def leave_one_out(rewards):
    """RLOO: each answer's baseline is the mean of the other k − 1 answers to its prompt (Back to Basics, eqs. 7, 8).

        A_i = R_i − 1/(k−1) Σ_{j≠i} R_j  =  k/(k−1) · (R_i − mean R)

    It takes away what the prompt is worth, too, which a moving average does not. rewards: (P, k), a row of k answers
    for each of P prompts. Returns (P, k). Raises ValueError for k < 2.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (P, k) with k ≥ 2 answers to each prompt, not {tuple(rewards.shape)}")
    k = rewards.shape[1]
    return k / (k - 1) * (rewards - rewards.mean(-1, keepdim=True))  # (P, k)


def sigma_weight(sigma):
    """f(σ) = 1 / (1 + σ), the REINFORCE report's weight of the advantage: less of it where the judge is unsure.

    The step (R − b) f(σ) ∇ log π has the expectation ∇E[f R] − b ∇E[f], where R is a constant for ∇: it is biased, and
    by how much depends on b. Folded into the reward before KL and baseline, as r − λσ or r f(σ), σ makes another
    objective, without bias; r f(σ) depends on where r has its zero: with ratings 1..10 it pays for certainty, even of
    a bad answer. A factor that is the same for all answers does nothing to Adam, which divides by the gradient's size.
    sigma: (B,) → (B,), in (0, 1].
    """
    return 1 / (1 + sigma)


def kl_estimate(logprobs, ref_logprobs, mask, kind="k1"):
    """An estimate of KL(π ‖ π_ref) per answer, in nats, from answers *sampled from π*.

        d = Σ_t mask_t (log π_t − log π_ref,t)
        k1 = d                  unbiased, may be negative
        k2 = d² / 2             biased, ≥ 0
        k3 = e^(−d) − 1 + d     unbiased, ≥ 0

    Source: Schulman, "Approximating KL divergence" (2020), on whole answers. The sampler is the *first* argument, hence
    the sign in k3. Differentiated as a loss, k1 has the expected gradient E[∇ log π] = 0; k2 has E[d ∇ log π], that of
    KL(π ‖ π_ref); k3 has E[(1 − e^(−d)) ∇ log π], that of KL(π_ref ‖ π). Inside the detached reward, k1 gives the exact
    gradient. tests/test_enumeration.py sums all of them over all answers. (GRPO takes the k3 of each token.)

    logprobs, ref_logprobs, mask: (B, T). Returns (B,). Raises ValueError for another kind.
    """
    d = (logprobs - ref_logprobs).masked_fill(~mask, 0.0).sum(-1)  # (B,)
    if kind == "k1":
        return d
    if kind == "k2":
        return d**2 / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"kind must be k1, k2 or k3, not {kind!r}")


def prefix_kl(logits, ref_logits, mask):
    """An estimate of KL(π ‖ π_ref) per answer, exact in each token and sampled only in the prefixes (Rao–Blackwell).

        Σ_t mask_t Σ_v π(v | x, y_<t) [log π(v | x, y_<t) − log π_ref(v | x, y_<t)],   y ~ π

    As a rule it is far less noisy than k1. logits, ref_logits: (B, T, V); mask: (B, T). Returns (B,), in nats, ≥ 0,
    unbiased.
    """
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)  # (B, T, V)
    return (logp.exp() * (logp - ref_logp)).sum(-1).masked_fill(~mask, 0.0).sum(-1)


def policy_gradient_loss(logprobs, advantage, mask):
    """L = −mean_B [ A Σ_t mask_t log π(y_t | x, y_<t) ], whose *gradient* is the estimate of −∇J.

    The value of this loss means nothing: watch reward and KL instead. logprobs, mask: (B, T); advantage: (B,), a
    constant. Returns a scalar. Raises ValueError for an advantage of another shape.
    """
    if advantage.shape != logprobs.shape[:1]:
        raise ValueError(f"advantage must be (B,) = {tuple(logprobs.shape[:1])}, not {tuple(advantage.shape)}")
    answer_logprob = logprobs.masked_fill(~mask, 0.0).sum(-1)  # (B,)
    return -(advantage.detach() * answer_logprob).mean()


def step_metrics(team, rollout, logprobs, columns):
    """What a metrics line says of a step: the means over all B answers of a team.

    columns: {name: (B / size,)}, with `reward`; logprobs: (B / size, T), where `size` is the number of processes in
    the team. Added are how long the answers are, how many have no end, the entropy per token (all else is per answer),
    and the reward's standard deviation.
    """
    surprise = -logprobs.detach().masked_fill(~rollout.mask, 0.0).sum(-1)  # (B / size,)
    lengths = {"completions/mean_length": rollout.mask.sum(-1), "completions/clipped_ratio": ~rollout.ended}
    columns = columns | lengths | {"entropy": surprise}
    table = team.gather(torch.stack([column.double() for column in columns.values()], dim=1))  # (B, columns)
    means = dict(zip(columns, table.mean(0).tolist()))
    means["entropy"] /= means["completions/mean_length"]
    return means | {"reward_std": table[:, list(columns).index("reward")].std(correction=0).item()}
