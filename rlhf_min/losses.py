"""Losses of the reward models, and what a distribution over ratings says: tensors in, tensors out."""

import math

import torch
import torch.nn.functional as F


def pairwise_loss(chosen, rejected, margin=None, center_coefficient=0.0):
    """Bradley–Terry: the better answer w should have the higher reward.

        L = mean_B [ −log σ(r_w − r_l − margin) + c · (r_w + r_l)² ]

    Only the difference of two rewards enters the first term, which leaves a constant free. The second term (c =
    `center_coefficient`) fixes it. Sources: Back to Basics (2402.14740) eq. 1; margin: Llama 2 (2307.09288); centering:
    Helping or Herding (2312.09244) eq. 2.

    chosen, rejected: r_w and r_l, (B,), in nats; margin: (B,). Returns a scalar. Raises ValueError for other shapes:
    a (B, 1) reward against a (B,) margin would broadcast to (B, B) without a word.
    """
    for tensor in (chosen, rejected, margin):
        if tensor is not None and (tensor.dim() != 1 or tensor.shape != chosen.shape):
            raise ValueError(f"rewards and margin must be (B,), not {tuple(chosen.shape)} and {tuple(tensor.shape)}")
    difference = chosen - rejected if margin is None else chosen - rejected - margin  # (B,)
    loss = -F.logsigmoid(difference)  # (B,)
    if center_coefficient:  # else a huge reward would give 0 · ∞
        loss = loss + center_coefficient * (chosen + rejected) ** 2  # (B,)
    return loss.mean()


def preference_logprob(chosen_logits, rejected_logits, ties="strict"):
    """log P(w ≻ l) when ratings i of w and j of l in 1..K are drawn from two independent distributions.

        strict   P = P(i > j) = Σ_{i=2..K} p_w(i) F_l(i−1),     F_l(i) = Σ_{j≤i} p_l(j)
        half     P = P(i > j) + ½ P(i = j),     P(i = j) = Σ_i p_w(i) p_l(i)

    Strict is the REINFORCE report's. It counts a tie as an error, so two answers that cannot be told apart are pushed
    to the *uniform* distribution: there P = .45 for K = 10, and L = .7985 > ln 2. With half the tie mass P(w ≻ l) +
    P(l ≻ w) = 1, as for Bradley–Terry. All in log space: log(P + ε) would have no gradient on the worst pairs.

    chosen_logits, rejected_logits: (B, K). Returns (B,), in nats, ≤ 0. Raises ValueError for other shapes or `ties`.
    """
    if chosen_logits.dim() != 2 or chosen_logits.shape != rejected_logits.shape or chosen_logits.shape[1] < 2:
        raise ValueError(f"logits must be (B, K), not {tuple(chosen_logits.shape)}, {tuple(rejected_logits.shape)}")
    logp_w, logp_l = chosen_logits.log_softmax(-1), rejected_logits.log_softmax(-1)  # (B, K) × 2
    log_cdf = logp_l.logcumsumexp(-1)  # (B, K) log F_l
    log_win = (logp_w[:, 1:] + log_cdf[:, :-1]).logsumexp(-1)  # (B,) log P(i > j)
    if ties == "strict":
        return log_win
    if ties == "half":
        log_tie = (logp_w + logp_l).logsumexp(-1)  # (B,) log P(i = j)
        return torch.logaddexp(log_win, log_tie - math.log(2))
    raise ValueError(f"ties must be strict or half, not {ties!r}")


def ordinal_loss(chosen_logits, rejected_logits, ties="strict", center_coefficient=0.0):
    """The ordinal-distribution loss: the better answer w should get the higher of two ratings, drawn one for each.

        L = mean_B [ −log P(w ≻ l) + c · (E_w + E_l − (K+1))² ]

    The second term is the analogue of centering: the middle of the scale is where an average pair should lie. Sources:
    the REINFORCE report, level 2; OPRM (2602.12660).

    chosen_logits, rejected_logits: (B, K). Returns a scalar; raises ValueError as preference_logprob does.
    """
    loss = -preference_logprob(chosen_logits, rejected_logits, ties)  # (B,)
    count = chosen_logits.shape[-1]  # K
    expected = rating_mean_std(chosen_logits)[0] + rating_mean_std(rejected_logits)[0]  # (B,) E_w + E_l
    return (loss + center_coefficient * (expected - (count + 1)) ** 2).mean()


def rating_mean_std(logits):
    """Mean and standard deviation of the rating k = 1..K:  E = Σ_k k p(k),  σ² = Σ_k (k − E)² p(k).

    σ² as E[k²] − E² could round to below 0. logits: (B, K). Returns (B,), (B,), in rating points.
    """
    p = logits.softmax(-1)  # (B, K)
    ratings = torch.arange(1, logits.shape[-1] + 1, device=logits.device, dtype=logits.dtype)  # (K,)
    mean = p @ ratings  # (B,)
    return mean, (p * (ratings - mean[:, None]) ** 2).sum(-1).sqrt()
