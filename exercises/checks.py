"""The checks of the exercises. check_N gets the module of exercise N, or anything with the same names.

The right numbers come from loops over single answers, tokens and ratings, from sums over all answers, and from plain
trigonometry. So they are computed in another way than you should, and this file shows no solution. But it names the
usual mistakes: read it when you are done.
"""

import base64
import math
from pathlib import Path

import torch
from compare import NotYet, close, gradient, must_refuse, numbers, same, show

from rlhf_min.warp import slerp  # given to the learner in exercise 13, and compared with nowhere


def check_1(x):
    def loss(differences):  # −log σ(d) = log(1 + e^(−d)), number by number
        return sum(math.log1p(math.exp(-d)) for d in differences.tolist()) / len(differences)

    better, worse = torch.tensor([[2.0, 0.5, -1.0], [1.0, 1.5, 0.0]], dtype=torch.float64)
    margin = torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64)
    right = loss(better - worse - margin)
    sigma = 1 / (1 + (worse + margin - better).exp())
    mistakes = [
        (
            loss(better - worse + margin),
            "your margin makes the loss smaller. To win by less than the margin should cost",
        ),
        (loss(better - worse), "your loss does not depend on the margin"),
        (loss(worse - better - margin), "your loss falls when the *worse* answer gets more"),
        (3 * right, "you add up the batch. L is its mean: a batch twice as large must not learn twice as fast"),
        ((1 - sigma).mean(), "this is the mean of 1 − σ, without the log. Its gradient vanishes on the worst pairs"),
        (-sigma.mean().log(), "this is −log of a mean. The mean over the batch comes last"),
    ]
    same(x.pairwise_loss(better, worse, margin), right, mistakes)

    reward = torch.tensor([-1000.0, 1000.0], requires_grad=True)
    got = x.pairwise_loss(reward, -reward.detach(), torch.zeros(2))
    hint = (
        "right for small rewards, ∞ for large ones: σ(−2000) is 0 before you take its log. Can log σ be one function?"
    )
    epsilon = "an ε is added inside your log, or something is clamped, so the worst pairs have no gradient"
    mistakes = [(math.inf, hint)] + [(n * math.log(10) / 2, epsilon) for n in range(5, 31)]  # −½ log 1e-5, ...
    same(got, 1000.0, mistakes, "for rewards of ±1000, your loss")
    same(gradient(got, [reward])[0], [-0.5, 0.0], what="for rewards of ±1000, the gradient ∂L/∂r_w")
    hint = "right, but a chosen of shape (3, 1) passes without a ValueError. Minus a (3,), it has the shape (3, 3)"
    must_refuse(x.pairwise_loss, (better[:, None], worse, margin), hint)


def check_2(x):
    tokens = [[5, 6, 9, 9, 9], [5, 6, 7, 8, 8], [9, 9, 9, 9, 9], [5, 9, 6, 9, 7]]  # anything may follow the first EOS

    def mask(counts):  # counts(row, t): is token t of the row a part of the answer?
        return torch.tensor([[counts(row, t) for t in range(5)] for row in tokens])

    place = "you ask of a token whether it is EOS. Padding is EOS, too, so what counts is its *place*"
    mistakes = [
        (
            mask(lambda row, t: 9 not in row[: t + 1]),
            "the first EOS is missing. To stop is an action of the policy, too",
        ),
        (mask(lambda row, t: row[t] != 9), place),
        (
            mask(lambda row, t: row[t] != 9 or 9 not in row[:t]),
            "your answer goes on behind its end. Whatever stands behind the first EOS is False, EOS or not",
        ),
        (mask(lambda row, t: row[: t + 1].count(9) < 2), "your answer goes on until the *second* EOS"),
        (
            mask(lambda row, t: t == 0 or row[t - 1] != 9),
            "you look one token back. Any EOS before a token ends the answer",
        ),
        (mask(lambda row, t: 9 in row[t:] or 9 not in row), "your answers end with the *last* EOS"),
        (
            mask(lambda row, t: 9 in row and 9 not in row[:t]),
            "an answer without EOS has no token in your mask. All count",
        ),
        (
            mask(lambda row, t: t <= (row.index(9) if 9 in row else 0)),
            "an answer without EOS has one token in your mask. The place of a maximum is 0 where there is no EOS",
        ),
    ]
    got = x.completion_mask(torch.tensor(tokens), 9)
    same(got, mask(lambda row, t: 9 not in row[:t]), mistakes, "your mask")
    if got.dtype != torch.bool:
        raise NotYet(
            f"the values are right, the type is not: {got.dtype}. With bool, ~mask and tensor[mask] mean what they say"
        )


def check_3(x):
    chain = numbers(4, 4).softmax(-1).log()  # a language in which a token depends on the one before: [before][next]
    tokens = torch.tensor([[0, 3, 1, 2, 2], [1, 0, 0, 3, 1]])  # two tokens of prompt, three of answer
    mask = torch.tensor([[True, True, True], [True, True, False]])
    logits = chain[tokens] + numbers(2, 5, 1)  # π is the softmax of it, which takes the constants away

    def total(term, counts=lambda row, t: mask[row, t]):  # Σ_t over each answer; term(row, the token's place in it)
        return torch.stack([sum(term(row, 2 + t) for t in range(3) if counts(row, t)) for row in range(2)])

    def logp(row, before, next):
        return chain[tokens[row, before], tokens[row, next]]

    right = total(lambda row, i: logp(row, i - 1, i))
    first_lost = total(lambda row, i: logp(row, i - 1, i), lambda row, t: t > 0 and mask[row, t])
    unmasked = total(lambda row, i: logp(row, i - 1, i), lambda row, t: True)
    with_prompt = right + torch.stack([logp(row, 0, 1) for row in range(2)])
    raw = total(lambda row, i: chain[tokens[row, i - 1], tokens[row, i]] + numbers(2, 5, 1)[row, i - 1, 0])
    mistakes = [
        (
            total(lambda row, i: logp(row, i, i)),
            "you read a token's logits *at* that token. Those predict the next one",
        ),
        (first_lost, "the first token of the answer is missing. Which position predicts it? It is in the prompt"),
        (raw, "your logits are not normalised: π is their softmax"),
        (unmasked, "the mask has no effect: tokens behind the end count in your sum"),
        (with_prompt, "the prompt counts in your sum. Only the answer should"),
        (right / mask.sum(-1), "this is a mean over tokens. The log of a product is a *sum* of logs"),
        (right.exp(), "these are probabilities. Their log is due"),
        (-right, "the sign is wrong: a log-probability is never positive. A cross-entropy is −log π"),
    ]
    same(x.answer_logprob(logits, tokens, mask), right, mistakes)
    long = torch.zeros(1, 201, 4, dtype=torch.float64)
    long[..., 0] = 800.0  # 200 tokens of log π = −800 each
    got = x.answer_logprob(long.requires_grad_(), torch.ones(1, 201, dtype=torch.long), torch.ones(1, 200).bool())
    hint = "right for a short answer, −∞ for an unlikely one: its probability is 0 before you take the log"
    same(got, [-160000.0], [([-math.inf], hint)], "for an answer of 200 unlikely tokens, your log π")
    gradient(got.sum(), [long], "your log π")


def check_4(x):
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    A = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    advantage = A.clone().requires_grad_()
    logprobs = (-numbers(3, 3).abs()).requires_grad_()

    def slopes(weight):  # weight(row, t) is ∂L/∂logprobs of a token that counts
        return torch.tensor([[float(mask[i, t] * weight(i, t)) for t in range(3)] for i in range(3)])

    crossed = "every answer has the mean of all advantages: (B, 1) times (B,) is (B, B), each answer times each A"
    mistakes = [
        (slopes(lambda i, t: -A.mean() / 3), crossed),
        (
            slopes(lambda i, t: A[i] / 3),
            "the sign is wrong. An optimizer goes downhill: good answers become *less* likely",
        ),
        (slopes(lambda i, t: -A[i]), "you add up the batch. L is a mean over answers"),
        (
            slopes(lambda i, t: -A[i] / 3 / mask[i].sum()),
            "you divide by an answer's length. Then a bad answer costs less per token if it is long: bad answers grow",
        ),
        (
            slopes(lambda i, t: -A[i] / mask.sum()),
            "this is a mean over tokens: long answers weigh more. Sum over an answer's tokens, mean over answers",
        ),
        (
            slopes(lambda i, t: -A[i] / 9),
            "you divide by B · T. Sum over an answer's tokens, mean over answers",
        ),
        (
            slopes(lambda i, t: -A[t] / 3),
            "A meets the wrong axis: token t gets the advantage of *answer* t. Here B = T",
        ),
        ((-A / 3)[:, None].expand(3, 3), "the mask has no effect: tokens behind the end learn, too"),
        (
            slopes(lambda i, t: -1 / 3),
            "your gradient does not depend on the advantage: every answer becomes more likely",
        ),
    ]
    loss = x.reinforce_loss(logprobs, advantage, mask)
    to_logprobs, to_advantage = gradient(loss, [logprobs, advantage])
    same(to_logprobs, slopes(lambda i, t: -A[i] / 3), mistakes, "∂L/∂logprobs")
    same(to_advantage, torch.zeros(3), what="A should be a constant, but ∂L/∂A")
    infinite = logprobs.detach().masked_fill(~mask, -math.inf)
    hint = (
        "the gradient is right, but behind the mask logprobs may be −∞, and 0 · (−∞) is NaN. Replace, do not multiply"
    )
    same(x.reinforce_loss(infinite, A, mask), loss, [(math.nan, hint)], "with −∞ behind the mask, L")


def check_5(x):
    R = numbers(4, 2) + 3

    def minus(baseline):  # baseline(s) is b of step s
        return torch.stack([R[s] - baseline(s) for s in range(len(R))])

    right = minus(lambda s: R[:s].mean() if s else 0.0)
    own = "your b has seen the rewards of its own step, so they are subtracted from themselves. Use b, then update"
    mistakes = [
        (minus(lambda s: R[: s + 1].mean()), own),
        (minus(lambda s: R[s - 1].mean() if s else 0.0), "your b is the mean of the last step. All past steps count"),
        (minus(lambda s: R[s].mean()), "your b is the mean of the step's own batch. It should know only the past"),
        (minus(lambda s: R.mean()), "your b is the mean of all steps. A training does not know its future"),
        (minus(lambda s: R[: max(s, 1)].mean()), "before the first step there is no past. There, b is 0"),
        (R, "there is no baseline in your result: A = R"),
        (R - right, "this is b. R − b is due"),
        (-right, "the sign is wrong: a reward above b is an advantage"),
    ]
    same(x.past_only_advantages(R), right, mistakes)


def check_6(x):
    R = numbers(3, 3)  # P = k, so that a wrong axis raises no error

    def others(i, j):  # the rewards of the other answers to prompt i
        return [R[i, n] for n in range(3) if n != j]

    def table(entry):
        return torch.tensor([[entry(i, j) for j in range(3)] for i in range(3)])

    mistakes = [
        (
            table(lambda i, j: R[i, j] - R[i].mean()),
            "an answer's own reward is in its baseline: that shrinks the gradient",
        ),
        (
            table(lambda i, j: R[i, j] - sum(R[n, j] for n in range(3) if n != i) / 2),
            "you compare answers to *different* prompts. A row is a prompt",
        ),
        (
            table(lambda i, j: R[i, j] - (R.sum() - R[i, j]) / 8),
            "you leave one out of the whole batch. A row is a prompt",
        ),
        (table(lambda i, j: R[i, j] - sum(others(i, j)) / 3), "you add up k − 1 rewards. By how many do you divide?"),
        (
            table(lambda i, j: (R[i, j] - R[i].mean()) / R[i].std()),
            "you divide by the standard deviation. Then prompts whose answers hardly differ count as much as others",
        ),
        (table(lambda i, j: sum(others(i, j)) / 2), "this is the baseline. R − b is due"),
    ]
    same(x.leave_one_out(R), table(lambda i, j: R[i, j] - sum(others(i, j)) / 2), mistakes)
    must_refuse(
        x.leave_one_out, (R[:, :1],), "right for k = 3, but k = 1 passes without a ValueError. There are no others"
    )


def check_7(x):
    z = numbers(5).requires_grad_()  # π is a softmax over five answers, so that expectations are sums
    logp, ref_logp = z.log_softmax(-1), numbers(5, seed=1).log_softmax(-1)
    p, d = logp.exp().detach(), (logp - ref_logp).detach()
    estimates = x.kl_estimates(logp, ref_logp)
    if not isinstance(estimates, tuple) or len(estimates) != 3:
        raise NotYet("return three tensors: k1, k2, k3")
    k1, k2, k3 = estimates
    mistakes = [
        (-d, "your k1 estimates −KL: the mean of log π_ref − log π over y ~ π is never positive"),
        (d.abs(), "k1 may be negative for an answer. Only its mean over y ~ π may not"),
    ]
    same(k1, d, mistakes, "your k1")
    same(k2, d**2 / 2, [(d**2, "your k2 is twice too large")], "your k2")
    sampler = (
        "your k3 has the other sign of s: your sampler is the other distribution. E[k3] is the KL for y ~ π_ref, not "
    )
    sampler += f"for y ~ π. With your s, Σ_y π(y) e^s is {p @ d.exp():.2f}, and 1 is due"
    two = "there are two different s in your k3. With the same s in both places, e^s − 1 − s is never negative"
    mistakes = [(d.exp() - 1 - d, sampler), ((-d).exp() - 1 - d, two), (d.exp() - 1 + d, two)]
    same(k3, (-d).exp() - 1 + d, mistakes, "your k3")

    reverse = (logp.exp() * (logp - ref_logp)).sum()
    forward = (ref_logp.exp() * (ref_logp - logp)).sum()
    names = {"nothing": 0 * z.sum(), "KL(π ‖ π_ref)": reverse, "KL(π_ref ‖ π)": forward}
    exact = {name: gradient(value, [z])[0] for name, value in names.items()}
    plain = lambda name: name.lower().replace(" ", "").replace("||", "‖")
    spelled = {plain(name): name for name in exact}  # however a learner writes it
    for kind, estimate in zip(("k1", "k2", "k3"), estimates):
        expected = gradient((p * estimate).sum(), [z], f"your {kind}")[0]  # Σ_y π(y) ∇k(y)
        answer = spelled.get(plain(x.GRADIENT_OF[kind]))
        if answer is None:
            raise NotYet(f"your three estimates are right. Now choose GRADIENT_OF[{kind!r}] among {', '.join(exact)}")
        if kind == "k1" and answer != "nothing":
            text = "in k1 the reference is a constant, so your gradient does not depend on the reference"
            raise NotYet(f"{text}. Can it be that of a KL to the reference?")
        if not close(expected, exact[answer]):
            text = (
                f"for these five answers, the expected gradient of {kind} is {show(expected)}, and that of {answer} is"
            )
            raise NotYet(f"{text} {show(exact[answer])}. Work out ∂{kind}/∂d first")


def check_8(x):
    reward, logp = numbers(4), (-3 * numbers(4, seed=1).abs()).requires_grad_()
    d = torch.tensor([1.0, -2.0, 0.5, -0.25], dtype=torch.float64)  # of either sign, as for single answers
    ref_logp = logp.detach() - d
    right = reward - 0.3 * d
    positive = "you made the KL of every answer positive. Only its *mean* is never negative: this is another objective"
    mistakes = [
        (reward + 0.3 * d, "the sign of the KL is wrong: you pay the policy for leaving the reference"),
        (reward - d, "your R does not depend on β"),
        (reward, "your R has no KL in it"),
        (reward - 0.3 * logp, "your R does not depend on the reference. It rewards unlikely answers of any kind"),
        (reward - 0.3 * d.abs(), positive),
        (reward - 0.3 * d.clamp(min=0), positive),
        (reward - 0.3 * d.mean(), "every answer pays the mean KL. Each must pay its own: a constant teaches nothing"),
        (reward - 0.3 * d / 4, "you divide the KL by the batch size. β would mean something else for every batch size"),
        (
            reward - 0.3 * ((-d).exp() - 1 + d),
            "this is k3 in the reward. The step then has another gradient than the KL's",
        ),
        (reward - 0.3 * d**2 / 2, "this is k2 in the reward. The step then has another gradient than the KL's"),
    ]
    got = x.shaped_reward(reward, logp, ref_logp, 0.3)
    same(got, right, mistakes)
    if got.requires_grad:
        raise NotYet("the numbers are right, but a gradient flows through R. In −R log π it adds a bonus for entropy")


def check_9(x):
    def chance(chosen, rejected, wins):  # Σ p_w(i) p_l(j) over the pairs of ratings that count, one by one
        p, q = chosen.double().softmax(-1), rejected.double().softmax(-1)
        return sum(p[:, i] * q[:, j] for i in range(p.shape[1]) for j in range(p.shape[1]) if wins(i, j))

    better, worse = numbers(3, 4), numbers(3, 4, seed=1)
    P = chance(better, worse, lambda i, j: i > j)
    with_ties, lower = (chance(better, worse, wins) for wins in (lambda i, j: i >= j, lambda i, j: i < j))
    mistakes = [
        (-with_ties.log().mean(), "ties i = j count as wins in your sum. Here they are errors"),
        (
            -((P + with_ties) / 2).log().mean(),
            "half of the ties count in your sum. That is a good loss, but here they are errors",
        ),
        (-lower.log().mean(), "your loss is small where the *worse* answer has the higher rating"),
        (-P.log().sum(), "you add up the batch. L is its mean"),
        (-P.mean().log(), "this is −log of a mean. The mean over the batch comes last"),
        ((1 - P).mean(), "this is the mean of 1 − P, without the log"),
    ]
    same(x.ordinal_loss(better, worse), -P.log().mean(), mistakes)

    wrong = torch.linspace(400, -400, 6)[None].requires_grad_()  # the better answer, surely rated 1; the worse one, 6
    got = x.ordinal_loss(wrong, -wrong.detach())  # log p falls by 160 a rating: five pairs i = j + 1 have e^(−960) each
    stay = "e^(−960) is 0, in float64, too. In log space a product is a sum, and a sum is a logsumexp"
    epsilon = f"right for usual logits, but an ε is added to P, so the worst pairs have no gradient. {stay}"
    mistakes = [(math.inf, f"right for usual logits, ∞ for ±400. {stay}")]
    mistakes += [(n * math.log(10), epsilon) for n in range(5, 21)]  # −log 1e-5, ..., −log 1e-20
    same(got, 960 - math.log(5), mistakes, "for logits of ±400, your loss")
    same(gradient(got, [wrong])[0], [[1.0] + 5 * [-0.2]], what="for ±400, the gradient")


def check_10(x):
    def moments(logits):  # E and σ² of each row, rating by rating
        E, variance = [], []
        for p in logits.double().softmax(-1).tolist():
            E.append(sum(k * q for k, q in enumerate(p, 1)))
            variance.append(sum((k - E[-1]) ** 2 * q for k, q in enumerate(p, 1)))
        return torch.tensor(E), torch.tensor(variance)

    E, variance = moments(numbers(3, 5))
    got_E, got_sigma = x.rating_mean_std(numbers(3, 5))
    mistakes = [(E - 1, "your ratings begin at 0. They are 1, ..., K"), (E / 5, "the p(k) add up to 1: why divide?")]
    same(got_E, E, mistakes, "your E")
    mistakes = [
        (variance, "this is the variance. σ is its root"),
        ((variance * 5 / 4).sqrt(), "you divide by K − 1. That is for samples; here the whole distribution is known"),
    ]
    same(got_sigma, variance.sqrt(), mistakes, "your σ")
    sharp = torch.cat([size * torch.eye(10) for size in range(10, 21)])  # nearly all of p is on one rating
    if not close(x.rating_mean_std(sharp)[1], moments(sharp)[1].sqrt()):
        text = "where p is nearly sure, your σ is off, or NaN: E[k²] − E² is a small difference of large numbers"
        raise NotYet(f"{text}. A sum of squares is not")

    logp, b = numbers(4).log_softmax(-1), 2.0
    sigma = torch.tensor([0.0, 1.0, 2.5, 0.5], dtype=torch.float64)

    pi = logp.exp()

    def bias(f, b=b, prob=pi, mean=pi):  # Σ_y π(y) (−b) f(y) (1[y = i] − π(i))
        return sum(-b * prob[y] * f[y] * (torch.eye(4)[y] - mean) for y in range(4))

    f, quarter = 1 / (1 + sigma), torch.full((4,), 0.25)
    mistakes = [
        (bias(f, b=-b), "the sign is wrong: b is subtracted from R"),
        (bias(f, b=1.0), "your bias does not depend on b"),
        (bias(sigma), "your weight is σ. It should be f(σ) = 1 / (1 + σ)"),
        (bias(f, prob=quarter), "all answers weigh the same in your sum. For y ~ π, each weighs π(y)"),
        (bias(f, mean=0 * pi), "∂ log π(y) / ∂z_i is 1[y = i] − π(i). You have only the first part"),
        (
            torch.zeros(4),
            "your bias is 0. Either f does not depend on y in your sum, or you add up over i instead of y",
        ),
    ]
    same(x.bias_of_sigma_weight(logp, sigma, b), bias(f), mistakes, "your bias")


def check_11(x):
    ema, policy = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 2.0], requires_grad=True)}
    new = x.ema_update(ema, policy, 0.1)
    if not isinstance(new, dict) or new.keys() != {"w"}:
        raise NotYet("return a dictionary with the names of the arguments")
    if new["w"] is ema["w"] or ema["w"].any():
        raise NotYet(
            "you changed θ_ema in place (.float() of a float32 tensor is the same tensor). Whoever else holds the old "
            "average, e.g. as θ_init, now has the new one"
        )
    mistakes = [
        ([0.9, 1.8], "μ and 1 − μ are the wrong way round: your average forgets its past at once"),
        ([1.0, 2.0], "this is the policy itself, not an average"),
        ([0.0, 0.0], "your average does not move"),
    ]
    same(new["w"], [0.1, 0.2], mistakes)
    if new["w"].requires_grad:
        raise NotYet("a gradient flows from the average into the policy, and the graphs of all steps stay in memory")
    for _ in range(99):
        new = x.ema_update(new, policy, 0.1)
    same(new["w"], [1 - 0.9**100, 2 * (1 - 0.9**100)], what="after 100 updates, the average")

    old, theta = (torch.tensor([value], dtype=torch.bfloat16) for value in (0.02, 0.024))
    new = x.ema_update({"w": old}, {"w": theta}, 0.01)["w"]
    hint = "right in float32, but an average of bfloat16 weights stands still: the step is smaller than the rounding"
    same(new, [0.99 * old.item() + 0.01 * theta.item()], [(old, hint)], "for bfloat16 weights, the average")


def check_12(x):
    def point(angle, length):
        return length * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)

    def walk(a, b, lam, degrees):
        try:
            return x.slerp(a, b, lam)
        except ValueError:
            raise NotYet(
                f"you raise a ValueError for an angle of {degrees}°. Is your Ω that of a/|a| and b/|b|?"
            ) from None

    for omega in (math.pi / 2, 2.0, 0.3):
        for lam in (0.0, 0.25, 1.0):
            a, b = point(0.0, 2.0), point(omega, 2.0)
            mistakes = [
                (
                    (1 - lam) * a + lam * b,
                    "this is the straight line from a to b. In the middle it is shorter than the arc",
                ),
                (point((1 - lam) * omega, 2.0), "λ is the wrong way round: λ = 0 should give a"),
                (
                    torch.full((2,), math.nan),
                    "NaN. a·b is |a| |b| cos Ω: divide by both lengths before the arccos",
                ),
                (point(lam * omega, 1.0), "the direction is right, the length is lost. Only Ω needs unit vectors"),
            ]
            what = f"for an angle of {math.degrees(omega):.0f}° and λ = {lam}, your point"
            same(walk(a, b, lam, round(math.degrees(omega))), point(lam * omega, 2.0), mistakes, what)
    a, b = point(0.0, 1.0), torch.tensor([0.0, 3.0], dtype=torch.float64)
    mistakes = [([2**0.5, 2**0.5], "you gave the result a length of its own. The formula alone is due")]
    same(walk(a, b, 0.5, 90), [0.5**0.5, 3 * 0.5**0.5], mistakes, "for a = (1, 0), b = (0, 3) and λ = ½, your point")

    zero, lost = torch.zeros(50), torch.full((50,), math.nan)
    for seed in range(20):  # the cosine of float32 vectors rounds to below, to or to above 1
        u = numbers(50, seed=seed).float()
        for place, v, w in (("a and b have one direction", u, 3 * u), ("b is 0", u, zero), ("a is 0", zero, u)):
            hint = f"NaN where {place}: 0/0, or the arccos of a cosine that rounds to above 1"
            same(x.slerp(v, w, 0.25), 0.75 * v + 0.25 * w, [(lost, hint)], f"where {place}, your point")
        hint = "right, but opposite vectors pass without a ValueError. The angle of −u and 3u rounds to about π"
        must_refuse(x.slerp, (-u, 3 * u, 0.5), hint)


def check_13(x):
    init, axes = numbers(4), torch.eye(4, dtype=torch.float64)
    root = 0.5**0.5  # sin 45° and cos 45°. At 90°, slerp has the weights cos(λ 90°) and sin(λ 90°)
    due = {1: [1, 0, 0, 0], 2: [root, root, 0, 0], 3: [root * 0.75**0.5, root * 0.75**0.5, 0.5, 0]}
    three = [
        ([0.5, 0.5, root, 0], "λ is ½ at every fold. The third policy is one of three"),
        ([root, root, 0, 0], "the third policy has no part in your result"),
        (
            [3**-0.5, 3**-0.5, 3**-0.5, 0],
            "all three weigh 1/√3 in your result. That would be fair, but a fold is not fair",
        ),
        (
            [0.5, root * 0.75**0.5, root * 0.75**0.5, 0],
            "you begin with the last policy. Fold from the first to the last",
        ),
        ([root / 2, root / 2, 0.75**0.5, 0], "1 − λ is in the place of λ: the third policy gets two thirds of the way"),
        ([0, 1, 0, 0], "your m is off by one: at the second policy λ is ½"),
        ([0.75**0.5, 0.5, 0, 0], "your m is off by one: at the second policy λ is ½"),
    ]
    for count, weights in due.items():
        policies = [init + axis for axis in axes[:count]]
        raw = policies[0]
        for m, policy in enumerate(policies[1:], 2):
            raw = slerp(raw, policy, 1 / m)
        mistakes = [
            (raw, "you merge the weights themselves. Merge the task vectors: the arc is around θ_init, not around 0"),
            (weights, "this is δ alone. θ_init is missing"),
            (init + axes[:count].mean(0), "this is the mean of the task vectors. It is shorter than each of them"),
            *((init + torch.tensor(wrong), hint) for wrong, hint in three),
        ]
        before = [tensor.clone() for tensor in (init, *policies)]
        got = x.merge(init, policies, slerp)
        if not all(map(torch.equal, before, (init, *policies))):
            raise NotYet("you changed θ_init or a policy in place. The next iteration needs them as they were")
        same(got, init + torch.tensor(weights), mistakes, f"for M = {count}, orthonormal task vectors, your θ_slerp")
        if any(got is tensor for tensor in (init, *policies)):
            raise NotYet("your result is one of the arguments itself. Return a new tensor")
    return "The mixture is .612, .612, .5: the last run counts less than the others, and the length is 1."


def check_14(x):
    W, A, B = numbers(3, 3), numbers(2, 3, seed=1), numbers(3, 2, seed=2)  # in = out: a wrong layout raises no error

    def change(A, B):  # 5/2 B A, entry by entry
        entries = [[2.5 * sum(B[o, n] * A[n, i] for n in range(2)) for i in range(3)] for o in range(3)]
        return torch.tensor(entries, dtype=torch.float64)

    for transposed, C in ((False, change(A, B)), (True, change(A, B).T)):
        before = W.clone()
        got = x.merged_weight(W, A, B, 5.0, transposed)
        if not W.equal(before):
            raise NotYet("you changed W in place. W without the adapter is the reference, too")
        mistakes = [
            (
                W + C.T,
                f"your change has the wrong layout for transposed = {transposed}. Here in = out, so torch says nothing",
            ),
            (W + C / 2.5, "there is no scale in your change. It is α/r"),
            (W + 2 * C, "your scale is α. It is α/r, or a higher rank would make a larger change"),
            (W + 2**0.5 * C, "your scale is α/√r. That is a variant, rsLoRA. Here it is α/r"),
            (C, "this is the change alone. W is missing"),
        ]
        same(got, W + C, mistakes, "the merged weight")
    A2, B2 = numbers(2, 3, seed=3), numbers(3, 2, seed=4)
    right = (change(A, B) + change(A2, B2)) / 2
    crossed = "you multiply the mean B with the mean A. That pairs the B of one adapter with the A of another"
    mistakes = [
        (change((A + A2) / 2, (B + B2) / 2), crossed),
        (2 * right, "you add up the changes. Their mean is due"),
        (right / 2.5, "there is no scale α/r in your mean"),
    ]
    same(x.mean_change([(A, B), (A2, B2)], 5.0), right, mistakes, "the mean change")
    return "The mean of products is not the product of the means, so adapters are merged as dense matrices."


QUESTIONS = {  # of exercise 15, for those who name a line that is right
    "positions": "What is counted where attention_mask is False?",
    "reward_of_answer": "Where does a short row end?",
    "sample_and_score": "Which distribution was the token drawn from?",
    "kl_of_next_token": "Who writes the tokens that KL(π ‖ π_ref) is a mean over?",
    "rewards_by_prompt": "In which order are the answers, and which rows does view make of them?",
    "clip_gradients": "What becomes of a gradient of norm 0.1 when max_norm is 1?",
    "new_adapter": "What is B A before the first step?",
    "front": "Where does the way to the second point begin?",
    "split_pairs": "Where do the other pairs of a held-out prompt go?",
    "mean_and_error": "How much smaller is the error of four times as many values?",
}


def check_15(x):
    text = Path(__file__).with_name("ex15_answers.txt").read_text(encoding="utf-8")
    secrets = dict(line.split() for line in text.splitlines()[1:])  # {function: base64 of "line sentence"}
    answers = {name: x.ANSWERS.get(name, 0) for name in secrets}
    if not any(answers.values()):
        raise NotImplementedError
    report, found = [], 0
    for name, secret in secrets.items():
        line, sentence = base64.b64decode(secret).decode().split(" ", 1)
        right = str(answers[name]) == line
        found += right
        said = f"right. {sentence}" if right else f"that line does what it should. {QUESTIONS[name]}"
        report.append(f"\n  {name}: " + (f"line {answers[name]}, {said}" if answers[name] else "no answer yet"))
    if found < len(secrets):
        raise NotYet(f"{found} of {len(secrets)} are found" + "".join(report))
    return "You found all of them." + "".join(report)


def check_16(x):
    if x.BETA is None or x.ETA is None:
        raise NotImplementedError
    if not (x.BETA >= 0 and 0 <= x.ETA <= 1):
        raise NotYet(f"β must be at least 0, and η between 0 and 1, not {x.BETA} and {x.ETA}")
    from hack import train_and_judge  # not at the top: transformers takes seconds to import

    return verdict_of_try(train_and_judge(x.BETA, x.ETA))


def verdict_of_try(columns):
    """The line that says how a try went. NotYet where the gold score is not above .65 by two standard errors.

    columns: {"reward", "gold", "kl", ...: a value for every prompt}.
    """
    mean, error = {}, {}
    for name in ("reward", "gold", "kl"):
        values = torch.tensor(columns[name], dtype=torch.float64)  # (N,)
        mean[name], error[name] = values.mean().item(), (values.std() / math.sqrt(len(values))).item()
    line = ", ".join(f"{name} {mean[name]:.2f} ± {error[name]:.2f}" for name in mean) + ". "
    if mean["gold"] - 2 * error["gold"] >= 0.65:
        return line + "The gold score is above .65 by two standard errors."
    if mean["gold"] >= 0.65:
        raise NotYet(line + "Gold is above .65, but not by two standard errors: that may be luck. Find a better place")
    if mean["kl"] > 4:
        raise NotYet(line + "The KL is high: the policy went where the reward model is wrong. What would hold it back?")
    raise NotYet(line + "The KL is low: the policy is still close to θ_sft and could learn more. What holds it back?")
