"""Check your solution of an exercise:  python exercises/check.py N

It says whether your function is right. If not, it says what is wrong and what to think about, never the answer. The
right numbers come from loops, sums over all answers and plain trigonometry, so this file shows no solution either.

Exit codes: 0 right, 1 not yet, 2 the command itself cannot work. Without N, all exercises but the last are checked.
"""

import base64
import importlib
import math
import sys
import traceback
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]  # the exercises; rlhf_min and the scripts

import torch

from rlhf_min.support.errors import UserError, one_line_errors

EXERCISES = {  # N: (file, where the package does the same)
    1: ("ex01_pairwise_loss", "rlhf_min/losses.py, pairwise_loss"),
    2: ("ex02_completion_mask", "rlhf_min/rollout.py, completion_mask"),
    3: ("ex03_answer_logprob", "rlhf_min/rollout.py, token_logprobs"),
    4: ("ex04_reinforce_loss", "rlhf_min/reinforce.py, policy_gradient_loss"),
    5: ("ex05_past_only_baseline", "rlhf_min/reinforce.py, MovingAverageBaseline"),
    6: ("ex06_leave_one_out", "rlhf_min/reinforce.py, leave_one_out"),
    7: ("ex07_kl_estimates", "rlhf_min/reinforce.py, kl_estimate"),
    8: ("ex08_kl_in_the_reward", "rlhf_min/reinforce.py, shaped_reward"),
    9: ("ex09_ordinal_loss", "rlhf_min/losses.py, preference_logprob"),
    10: ("ex10_sigma", "rlhf_min/losses.py, rating_mean_std, and rlhf_min/reinforce.py, sigma_weight"),
    11: ("ex11_ema", "rlhf_min/warp.py, ema_update"),
    12: ("ex12_slerp", "rlhf_min/warp.py, slerp"),
    13: ("ex13_merge_three", "rlhf_min/warp.py, merge"),
    14: ("ex14_lora_merge", "rlhf_min/lora.py, LoRALayer and merge_lora"),
    15: ("ex15_find_the_bug", "rlhf_min/ as a whole: it has these ten functions without the bugs"),
    16: ("ex16_stop_the_hack", "README.md, What to try next: other ways to get more gold"),
}
TOLERANCE = 1e-6  # of 1 + |right value|; float32 rounds at 1e-7


class NotYet(Exception):
    """What the learner reads: what is wrong, and what to think about."""


# Tools of the checks


def same(got, expected, mistakes=(), what="your result"):
    """NotYet unless `got` is `expected` up to rounding. mistakes: [(a usual wrong value, what to think about)]."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    if not isinstance(got, torch.Tensor):
        raise NotYet(f"{what} is a {type(got).__name__}; a tensor is due")
    if got.shape != expected.shape:
        raise NotYet(f"{what} has the shape {tuple(got.shape)}; {tuple(expected.shape)} is due")
    got = got.detach().double()
    if close(got, expected):
        return
    for value, hint in mistakes:
        if close(got, torch.as_tensor(value, dtype=torch.float64)):
            raise NotYet(hint)
    if not got.isfinite().all():
        raise NotYet(f"{what} is {show(got)}, and {show(expected)} is due. Look for log 0, 0/0, 0 · ∞ or ∞ − ∞")
    error = (got - expected).abs().max().item()
    small = "Rounding is 1e-7 in float32, so this is no rounding: 1e-3 where 1e-6 is due is a bug. Look for an ε that "
    small = f" They differ by {error:.0e}. {small}is added, or a limit taken too early." if error < 0.02 else ""
    raise NotYet(f"{what} is {show(got)}, and {show(expected)} is due.{small}")


def close(got, expected):
    return got.shape == expected.shape and bool(((got - expected).abs() <= TOLERANCE * (1 + expected.abs())).all())


def show(tensor):
    """A tensor as a short text."""
    return " ".join(str((tensor.double() * 1e4).round() / 1e4).removeprefix("tensor(").split(", dtype")[0].split())


def grad(scalar, inputs, what="your loss"):
    """∂ scalar / ∂ inputs; 0 where there is no path. NotYet where the graph is cut."""
    if not isinstance(scalar, torch.Tensor) or scalar.shape != ():
        raise NotYet(f"{what} must be a scalar tensor, of shape ()")
    if not scalar.requires_grad:
        raise NotYet(f"{what} has no gradient. Something cuts the graph: detach, item, no_grad, or a new tensor")
    return torch.autograd.grad(scalar, inputs, retain_graph=True, materialize_grads=True)


def refuses(call, hint):
    """NotYet unless the call raises a ValueError."""
    try:
        call()
    except ValueError:
        return
    raise NotYet(hint)


def numbers(*shape):
    """Random numbers, the same ones in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


# The checks


def check_1(x):
    def loss(differences):  # in plain Python: −log σ(d) = log(1 + e^(−d))
        return sum(math.log1p(math.exp(-d)) for d in differences.tolist()) / len(differences)

    w, l, m = torch.tensor([[2.0, 0.5, -1.0], [1.0, 1.5, 0.0], [0.5, 1.0, 0.25]], dtype=torch.float64)
    sigmoid = 1 / (1 + (l + m - w).exp())
    same(x.pairwise_loss(w, l, m), loss(w - l - m), [
        (loss(w - l + m), "the margin makes your loss smaller. With a margin, being better is not enough: the winner "
                          "must be better by that much, so the loss must grow"),
        (loss(w - l), "your loss does not depend on the margin"),
        (loss(l - w - m), "your loss falls when the *worse* answer gets more. Which of the two should have more?"),
        (loss(w - l - m) * 3, "you add up the batch. L is its mean: a batch twice as large must not learn twice as fast"),
        ((1 - sigmoid).mean(), "this is the mean of 1 − σ, without the log. Its gradient vanishes on the worst pairs"),
        (-sigmoid.mean().log(), "this is −log of the mean. The mean over the batch comes last"),
    ])  # fmt: skip
    w = torch.tensor([-1000.0, 1000.0], requires_grad=True)  # σ(−2000) is 0 in every floating-point format
    got = x.pairwise_loss(w, -w.detach(), torch.zeros(2))
    same(got, 1000.0, [(math.inf, "right for small rewards, ∞ for large ones: σ(−2000) rounds to 0 before you take the "
                                  "log. torch has a function that does both in one piece")])  # fmt: skip
    same(grad(got, [w])[0], [-0.5, 0.0], what="for a pair that is wrong by 2000, the gradient ∂L/∂r_w")
    refuses(lambda: x.pairwise_loss(numbers(3, 1), l, m), "right, but a chosen of shape (3, 1) passes without a "
            "ValueError. Its difference to a (3,) has the shape (3, 3)")  # fmt: skip


def check_2(x):
    tokens = [[5, 6, 9, 9, 9], [5, 6, 7, 8, 8], [9, 9, 9, 9, 9], [5, 9, 6, 9, 7]]  # the last: anything may follow EOS

    def mask(counts):  # counts(row, t): is token t of the row part of the answer?
        return torch.tensor([[counts(row, t) for t in range(5)] for row in tokens])

    got = x.completion_mask(torch.tensor(tokens), 9)
    if isinstance(got, torch.Tensor) and got.dtype != torch.bool:
        raise NotYet(f"your mask is of type {got.dtype}; bool is due, so that ~mask and tensor[mask] do what they say")
    id_hint = (
        "you ask each token whether it is EOS. Padding is EOS, too, so what counts is its *place*: which EOS is it?"
    )
    same(got, mask(lambda row, t: 9 not in row[:t]), [
        (mask(lambda row, t: 9 not in row[: t + 1]), "the first EOS is missing. To stop is an action of the policy: "
                                                     "without it, nothing teaches the policy when to stop"),
        (mask(lambda row, t: row[t] != 9), id_hint),
        (mask(lambda row, t: row[t] != 9 or 9 not in row[:t]), id_hint),
        (mask(lambda row, t: 9 in row[t:] or 9 not in row), "your answers end with the *last* EOS. They end with the first"),
        (mask(lambda row, t: 9 in row and 9 not in row[:t]), "an answer without an EOS has no tokens in your mask. It "
                                                             "was cut off, and all of its tokens count"),
        (mask(lambda row, t: t <= (row.index(9) if 9 in row else 0)), "an answer without an EOS has one token in your "
         "mask. The place of a maximum is 0 where there is none: such a row needs a case of its own"),
    ], "your mask")  # fmt: skip


def check_3(x):
    chain = numbers(4, 4).softmax(-1)  # a language in which a token depends on the one before: chain[before][next]
    tokens, width = torch.tensor([[0, 3, 1, 2, 2], [1, 0, 0, 3, 1]]), 3
    mask = torch.tensor([[True, True, True], [True, True, False]])
    logits = chain.log()[tokens] + numbers(2, 5, 1)  # softmax takes the constants away again

    def total(term, counts=lambda i, t: mask[i, t]):  # Σ over the answer of term(row, place of the token in the row)
        return torch.stack([sum(term(i, 2 + t) for t in range(-1, width) if t >= 0 and counts(i, t)) for i in range(2)])

    def logp(row, before, next):
        return chain[tokens[row, before], tokens[row, next]].log()

    right = total(lambda i, p: logp(i, p - 1, p))
    same(x.answer_logprob(logits, tokens, mask), right, [
        (total(lambda i, p: logp(i, p, p)), "you read the probability of a token from the logits *at* that token. These "
                                            "have seen it already: they are about the next one"),
        (total(lambda i, p: logp(i, p - 1, p), lambda i, t: t > 0 and mask[i, t]),
         "the first token of the answer is missing. Which token's logits predict it? It is in the prompt"),
        (total(lambda i, p: logits[i, p - 1, tokens[i, p]]), "your logits are not normalised: their softmax is π"),
        (total(lambda i, p: logp(i, p - 1, p), lambda i, t: True), "the mask has no effect: tokens behind EOS count"),
        (right / mask.sum(-1), "this is a mean over tokens. The log of a product is a *sum* of logs"),
        (right.exp(), "these are probabilities. Their log is due"),
        (-right, "the sign is wrong: log-probabilities are never positive. A cross-entropy is −log π"),
        (right + torch.stack([logp(i, 0, 1) for i in range(2)]), "the prompt counts in your sum. Only the answer should"),
    ])  # fmt: skip


def check_4(x):
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    logprobs, A = -numbers(3, 3).abs(), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def step(weight):  # weight(row, token) → the gradient, an entry for every log-prob
        return torch.tensor([[float(mask[i, t] * weight(i, t)) for t in range(3)] for i in range(3)])

    for filler in (0.5, -math.inf):  # what stands behind the mask
        filled = torch.where(mask, logprobs, filler).requires_grad_()
        advantage = A.clone().requires_grad_()
        got, to_advantage = grad(x.reinforce_loss(filled, advantage, mask), [filled, advantage])
        same(got, step(lambda i, t: -A[i] / 3), [
            (step(lambda i, t: A[i] / 3), "the sign is wrong. The optimizer goes downhill on L, so your good answers "
                                          "become *less* likely"),
            (step(lambda i, t: -A[i]), "you add up the batch. L is a mean over answers: see what a batch twice as "
                                       "large would do to the step"),
            (step(lambda i, t: -A[i] / 3 / mask[i].sum()), "you divide by the length of each answer. Then a bad answer "
             "costs less per token if it is longer, and the policy learns to be long where it is bad"),
            (step(lambda i, t: -A[i] / mask.sum()), "this is a mean over tokens. The answer is one action: take the "
                                                    "sum over its tokens, then the mean over answers"),
            (step(lambda i, t: -A[i] / 9), "this is a mean over B · T. Take the sum over an answer's tokens, then the "
                                           "mean over answers"),
            (step(lambda i, t: -A[t] / 3), "A meets the wrong axis: token t of each answer gets the advantage of "
                                           "*answer* t. B = T here, so torch says nothing"),
            ((-A / 3)[:, None].expand(3, 3), "the mask has no effect: tokens behind the answer's end learn, too"),
            (step(lambda i, t: -1 / 3), "your gradient does not depend on the advantage: all answers become more likely"),
            (torch.where(mask, step(lambda i, t: -A[i] / 3), math.nan), "behind the mask logprobs may be −∞, and "
             "0 · (−∞) is NaN. Replace these values instead of multiplying them"),
        ], "∂L/∂logprobs")  # fmt: skip
    same(x.reinforce_loss(filled, advantage, mask), -(A * torch.where(mask, logprobs, 0).sum(-1)).sum() / 3,
         [(math.nan, "the gradient is right, but L is NaN: 0 · (−∞). Replace what stands behind the mask")], "L")  # fmt: skip
    same(to_advantage, torch.zeros(3), what="A is a constant. ∂L/∂A")


def check_5(x):
    scripted = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    for R in (scripted, numbers(4, 2) + 3):
        past = [R[:step].mean() if step else 0.0 for step in range(len(R))]

        def minus(baselines, R=R):
            return torch.stack([row - b for row, b in zip(R, baselines)])

        same(x.past_only_advantages(R), minus(past), [
            (minus([R[: step + 1].mean() for step in range(len(R))]),
             "your b of a step has seen the rewards of that very step. Then a part of each reward is taken away from "
             "itself, and the gradient shrinks. First use b, then update it"),
            (minus([R[step - 1].mean() if step else 0.0 for step in range(len(R))]),
             "your b is the mean of the last step only. All steps of the past count"),
            (minus([row.mean() for row in R]), "your b is the mean of the step's own batch: it depends on the answers that "
                                               "it is subtracted from"),
            (minus([R.mean()] * len(R)), "your b is the mean of all steps, the future, too. A training does not know that"),
            (R, "there is no baseline in your result: A = R"),
            (minus([b if step else R[0].mean() for step, b in enumerate(past)]),
             "before the first step there is no past, and b is 0. Yours is the mean of the first batch"),
            (torch.as_tensor(past)[:, None].expand(R.shape), "this is b. R − b is due"),
            (-minus(past), "the sign is wrong: a reward above b is an advantage"),
        ])  # fmt: skip


def check_6(x):
    R = numbers(3, 3)  # P = k, so that a wrong axis raises no error

    def table(advantage):
        return torch.tensor([[advantage(i, j) for j in range(3)] for i in range(3)])

    def others(i, j):
        return sum(R[i, n] for n in range(3) if n != j) / 2

    same(x.leave_one_out(R), table(lambda i, j: R[i, j] - others(i, j)), [
        (table(lambda i, j: R[i, j] - R[i].mean()), "your baseline has the answer's own reward in it. That scales the "
         "gradient by 1 − 1/k. Leave one out"),
        (table(lambda i, j: R[i, j] - sum(R[n, j] for n in range(3) if n != i) / 2),
         "you compare answers to *different* prompts. A row is a prompt"),
        (table(lambda i, j: R[i, j] - (R.sum() - R[i, j]) / 8), "you leave one out of the whole batch. The others are "
         "the answers to the *same* prompt: only these know what the prompt is worth"),
        (table(lambda i, j: R[i, j] - sum(R[i, n] for n in range(3) if n != j) / 3), "you add up k − 1 rewards. By how "
         "many do you divide?"),
        (table(lambda i, j: (R[i, j] - R[i].mean()) / R[i].std()), "you divide by the standard deviation. That is GRPO: "
         "it gives prompts on which all answers are nearly the same the same weight as the others"),
        (table(others), "this is the baseline. R − b is due"),
    ])  # fmt: skip
    refuses(lambda: x.leave_one_out(R[:, :1]), "right for k = 3. For k = 1 there are no others: raise a ValueError")


def check_7(x):
    z = numbers(5).requires_grad_()  # the policy: a softmax over five answers, so that expectations are sums
    logp, ref_logp = z.log_softmax(-1), numbers(1, 5)[0].log_softmax(-1)
    p, d = logp.exp().detach(), (logp - ref_logp).detach()
    estimates = x.kl_estimates(logp, ref_logp)
    if not isinstance(estimates, tuple) or len(estimates) != 3:
        raise NotYet("return three tensors: k1, k2, k3")
    same(estimates[0], d, [
        (-d, "your k1 estimates −KL: E_π[log π_ref − log π] is never positive"),
        (d.abs(), "k1 may be negative for an answer. Only its mean over all answers may not be"),
    ], "your k1")  # fmt: skip
    same(estimates[1], d * d / 2, [(d * d, "your k2 is twice what it should be: see d² / 2")], "your k2")
    same(estimates[2], (-d).exp() - 1 + d, [
        (d.exp() - 1 - d, "your k3 has E_π[k3] ≠ KL(π ‖ π_ref): your sampler is the other distribution. The formula with this "
         f"s is for answers that were drawn from π_ref. For your s, Σ_y π(y) e^s is {p @ d.exp():.2f}, and 1 is due"),
        ((-d).exp() - 1 - d, "your k3 has two different s in it. It is the same s in e^s and in − s: k3 is never negative"),
        (d.exp() - 1 + d, "your k3 has two different s in it. It is the same s in e^s and in − s: k3 is never negative"),
    ], "your k3")  # fmt: skip

    forward = (ref_logp.exp() * (ref_logp - logp)).sum()
    names = {"KL(π ‖ π_ref)": (logp.exp() * (logp - ref_logp)).sum(), "KL(π_ref ‖ π)": forward, "nothing": 0 * z.sum()}
    gradients = {name: grad(value, [z])[0] for name, value in names.items()}
    for kind, estimate in zip(x.GRADIENT_OF, estimates):
        mean = grad((p * estimate).sum(), [z], f"your {kind}")[0]  # Σ_y π(y) ∇k(y)
        answer = x.GRADIENT_OF[kind]
        if answer not in gradients:
            raise NotYet(
                f"your three estimates are right. Now GRADIENT_OF: {kind!r} needs one of {', '.join(gradients)}"
            )
        if kind == "k1" and answer != "nothing":
            raise NotYet("k1 = log π − log π_ref. The term with π_ref is a constant, so your gradient does not depend on the "
                         "reference. Can it be the gradient of a KL to it?")  # fmt: skip
        if not close(mean, gradients[answer]):
            raise NotYet(f"the expected gradient of {kind} is {show(mean)} for five answers. The gradient of {answer} is "
                         f"{show(gradients[answer])}. Work out ∂{kind}/∂d first")  # fmt: skip


def check_8(x):
    r, ref_logp, B = numbers(4), -numbers(1, 4)[0].abs(), 4
    logp = (-3 * numbers(2, 4)[0].abs()).requires_grad_()
    d = (logp - ref_logp).detach()
    got = x.shaped_reward(r, logp, ref_logp, 0.3)
    same(got, r - 0.3 * d, [
        (r + 0.3 * d, "the sign of the KL is wrong: you pay the policy for leaving the reference"),
        (r - d, "your R does not depend on β"),
        (r, "there is no KL in your R"),
        (r - 0.3 * logp.detach(), "your R does not depend on the reference. What is left rewards unlikely answers of any kind"),
        (r - 0.3 * d.abs(), "you made the KL of each answer positive. Only its *mean* is never negative: a single "
                            "log-ratio may be, and changing that changes the objective"),
        (r - 0.3 * d.clamp(min=0), "you cut the KL of an answer off at 0. Only its *mean* is never negative"),
        (r - 0.3 * d.mean(), "you subtract the mean KL from every answer. Each answer must pay for itself: a constant "
                             "teaches nothing"),
        (r - 0.3 * d / B, "you divide the KL by the size of the batch. β would mean something else for each batch size"),
        (r - 0.3 * ((-d).exp() - 1 + d), "k3 in the reward: right in value on average, but its gradient is not. REINFORCE "
         "then climbs away from β KL(π ‖ π_ref), nearly nowhere close to the reference"),
        (r - 0.3 * (d * d / 2), "k2 in the reward: its gradient is not that of the KL. The log-ratio itself is due"),
    ])  # fmt: skip
    if got.requires_grad:
        raise NotYet("the numbers are right, but a gradient flows through R. R must be a constant: what would flow has "
                     "the expectation 0, so it is only noise")  # fmt: skip


def check_9(x):
    def chance(w, l, wins=lambda i, j: i > j):  # Σ p_w(i) p_l(j) over the pairs that count, one by one
        p, q = w.double().softmax(-1), l.double().softmax(-1)
        return sum(p[:, i] * q[:, j] for i in range(p.shape[1]) for j in range(p.shape[1]) if wins(i, j))

    w, l = numbers(3, 4), numbers(1, 3, 4)[0]
    P = chance(w, l)
    same(x.ordinal_loss(w, l), -P.log().mean(), [
        (-chance(w, l, lambda i, j: i >= j).log().mean(), "ties i = j count as wins in your sum. They are errors here"),
        (-((P + chance(w, l, lambda i, j: i >= j)) / 2).log().mean(), "half of the ties count in your sum. That is a good "
         "loss, too (the package has it as ties='half'), but the strict one is due"),
        (-chance(w, l, lambda i, j: i < j).log().mean(), "your loss is small where the *worse* answer has the higher rating"),
        (-P.log().sum(), "you add up the batch. L is its mean"),
        (-P.mean().log(), "this is −log of the mean. The mean over the batch comes last"),
        ((1 - P).mean(), "this is the mean of 1 − P, without the log"),
    ])  # fmt: skip
    w = torch.linspace(60, -60, 6)[None].requires_grad_()  # sure to be the worst, and l sure to be the best
    l = torch.linspace(-60, 60, 6)[None]
    exact = -chance(w, l).log().mean()
    got = x.ordinal_loss(w, l)
    stay = "e^(−120) is 0 in float32. Stay in log space: a product becomes a sum, and a sum becomes a logsumexp"
    epsilons = [(-math.log(10.0**-n), f"you add an ε: L cannot grow beyond −log ε, and the gradient dies on the worst "
                 f"pairs. {stay}") for n in range(5, 21)]  # fmt: skip
    same(
        got, exact, [(math.inf, f"right for usual logits, ∞ for extreme ones. {stay}"), *epsilons], "for ±60, your loss"
    )
    right, yours = grad(exact, [w])[0], grad(got, [w])[0]
    if not yours.isfinite().all():
        raise NotYet("the loss is right for logits of ±60, but its gradient is NaN. Is there a log 0 = −∞ in a logsumexp? "
                     "The term for which P is 0 must be left out, not filled in")  # fmt: skip
    same(yours, right, what="for logits of ±60, the gradient")


def check_10(x):
    z = numbers(3, 5)
    p = z.softmax(-1).tolist()

    def moments(first=1):
        means = [sum((k + first) * row[k] for k in range(5)) for row in p]
        squares = [sum((k + first - mean) ** 2 * row[k] for k in range(5)) for row, mean in zip(p, means)]
        return torch.tensor(means, dtype=torch.float64), torch.tensor(squares, dtype=torch.float64)

    E, variance = moments()
    got_E, got_sigma = x.rating_mean_std(z)
    same(got_E, E, [(moments(0)[0], "your ratings begin at 0. They are 1, ..., K"),
                    (E / 5, "this is a mean over K entries. The p(k) are the weights already")], "your E")  # fmt: skip
    even = torch.tensor([math.sqrt(sum((k + 1 - m) ** 2 for k in range(5)) / 5) for m in E.tolist()])
    same(got_sigma, variance.sqrt(), [(variance, "this is the variance. σ is its square root"),
                                      (even, "p(k) is missing in your σ: the ratings do not all weigh the same"),
                                      ((variance * 5 / 4).sqrt(), "you divide by K − 1. That is for samples; here the "
                                       "whole distribution is known")], "your σ")  # fmt: skip
    sharp = torch.zeros(1, 10)
    sharp[0, 7] = 18.0  # nearly all of p is on one rating
    right = math.sqrt(sum((k - 7) ** 2 for k in range(10)) * math.exp(-18))
    same(x.rating_mean_std(sharp)[1], [right], [([math.nan], "σ is NaN for a distribution that is nearly sure: E[k²] − E² "
         "rounds to below 0. A sum of squares cannot")], "for a nearly sure distribution, your σ")  # fmt: skip

    logp, sigma, b = numbers(4).log_softmax(-1), torch.tensor([0.0, 1.0, 2.5, 0.5], dtype=torch.float64), 2.0
    pi = logp.exp()

    def bias(weight, b=b, prob=pi, center=pi):
        return sum(-b * prob[y] * weight[y] * (torch.eye(4)[y] - center) for y in range(4))

    f = 1 / (1 + sigma)
    same(x.bias_of_sigma_weight(logp, sigma, b), bias(f), [
        (-bias(f), "the sign is wrong: b is subtracted from R"),
        (bias(f, b=1.0), "your bias does not depend on b"),
        (bias(f, b=-1.0), "your bias does not depend on b, and its sign is wrong"),
        (bias(sigma), "your weight is σ. It should be f(σ) = 1 / (1 + σ)"),
        (bias(f, prob=torch.full((4,), 0.25)), "all answers weigh the same in your sum. An expectation over y ~ π weighs "
                                               "each answer with π(y)"),
        (bias(f, center=torch.zeros(4)), "∂ log π(y) / ∂z_i is 1[y = i] − π(i). The second part is missing: all answers share "
                                         "the softmax"),
        (torch.zeros(4), "your bias is 0. It would be without f: Σ_y π(y) ∇ log π(y) = 0. With f(σ(y)), which depends on y, "
                         "it is not"),
    ], "your bias")  # fmt: skip


def check_11(x):
    ema, policy = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 2.0], requires_grad=True)}
    new = x.ema_update(ema, policy, 0.1)
    if not isinstance(new, dict) or set(new) != {"w"}:
        raise NotYet("return a dictionary with the names of the arguments")
    if new is ema or new["w"] is ema["w"] or ema["w"].any():
        raise NotYet("you changed θ_ema in place. Whoever holds the old average, such as θ_init, now holds the new one")
    same(new["w"], [0.1, 0.2], [
        ([0.9, 1.8], "μ and 1 − μ are the wrong way round: your average forgets nearly all of its past in one step"),
        ([1.0, 2.0], "this is the policy itself, without an average"),
    ])  # fmt: skip
    if new["w"].requires_grad:
        raise NotYet("a gradient flows from the average into the policy, and every step's graph is kept in memory")
    for _ in range(99):
        new = x.ema_update(new, policy, 0.1)
    same(new["w"], [1 - 0.9**100, 2 * (1 - 0.9**100)], what="after 100 updates, the average")
    low = {"w": torch.tensor([0.02], dtype=torch.bfloat16)}, {"w": torch.tensor([0.024], dtype=torch.bfloat16)}
    new = x.ema_update(*low, 0.01)["w"]
    if new.dtype == torch.bfloat16 or new.item() == low[0]["w"].item():
        raise NotYet("bfloat16 weights: the step is smaller than their rounding, and the average stands still. Compute and "
                     "keep it in float32")  # fmt: skip
    same(new, [0.99 * low[0]["w"].item() + 0.01 * low[1]["w"].item()], what="for bfloat16 weights, the average")
    if new.item() == new.bfloat16().item():
        raise NotYet("you compute in bfloat16 and convert afterwards. Convert first")


def check_12(x):
    def at(angle, length=1.0):  # a point of the plane
        return length * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)

    for omega in (math.pi / 2, 2.0, 0.3):
        for lam in (0.0, 0.25, 1.0):
            a, b = at(0.0, 2.0), at(omega, 2.0)
            same(x.slerp(a, b, lam), at(lam * omega, 2.0), [
                ((1 - lam) * a + lam * b, "this is the straight line from a to b. It is shorter in the middle: the arc keeps "
                                          "the length"),
                (at((1 - lam) * omega, 2.0), "λ is the wrong way round: λ = 0 should give a"),
                (at(lam * omega), "the direction is right, the length is lost. The formula takes a and b as they are, "
                                  "not divided by their norms"),
            ], f"for an angle of {math.degrees(omega):.0f}° and λ = {lam}, your point")  # fmt: skip
    a, b = at(0.0, 1.0), at(math.pi / 2, 3.0)  # a and b are the axes, so the result shows their weights
    same(x.slerp(a, b, 0.5), [0.5**0.5, 3 * 0.5**0.5], [
        ([2**0.5, 2**0.5], "you give the result a length of its own. For a and b of different lengths the formula is enough"),
    ], "for a = (1, 0), b = (0, 3), λ = ½, your point")  # fmt: skip
    u = numbers(50).float()
    nan = "for two vectors of one direction, sin Ω is 0: you divide 0 by 0. Or a cosine that rounds to more than 1 has no arccos"
    for v, w in ((u, u.clone()), (u, 3 * u), (u, torch.zeros(50)), (torch.zeros(50), u)):
        what = "where a and b have one direction, or one is 0, your point"
        same(x.slerp(v, w, 0.25), 0.75 * v + 0.25 * w, [(torch.full((50,), math.nan), nan)], what)
    refuses(lambda: x.slerp(u, -u, 0.5), "right, but opposite vectors pass without a ValueError. The formula divides by sin π, "
            "which rounding makes 1e-16 or so: the result is noise")  # fmt: skip


def check_13(x):
    from rlhf_min.warp import slerp  # given to the learner, not compared with

    init, axes = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    thirty = math.radians(30)
    due = {  # weights of orthonormal task vectors; the angle is 90° at every fold, so λ = 1/m is an angle of 90°/m
        1: [1.0, 0.0, 0.0, 0.0],
        2: [0.5**0.5, 0.5**0.5, 0.0, 0.0],
        3: [0.5**0.5 * math.cos(thirty), 0.5**0.5 * math.cos(thirty), math.sin(thirty), 0.0],
    }
    half = [0.5, 0.5, 0.5**0.5, 0.0]
    for count, weights in due.items():
        policies = [init + axis for axis in axes[:count]]
        before = [init.clone(), *(policy.clone() for policy in policies)]
        got = x.merge(init, policies, slerp)
        if not all(map(torch.equal, before, [init, *policies])):
            raise NotYet("you changed init or a policy in place. The next iteration still needs them")
        raw = policies[0]  # what slerp of the weights themselves gives
        for m, policy in enumerate(policies[1:], 2):
            raw = slerp(raw, policy, 1 / m)
        mistakes = [
            (raw, "you merge the weights. Merge the task vectors: the arc is around θ_init, not around 0"),
            (weights, "θ_init is missing: this is δ alone"),
            (init + axes[:count].mean(0), "this is the mean of the task vectors. It is shorter than each of them"),
        ]
        if count == 3:
            thirds = init + axes[:3].sum(0) / 3**0.5
            mistakes += [
                (init + torch.tensor(half), "λ is ½ at every fold. Then the last policy has half of the angle for itself: "
                                            "the third is one of three, so λ = 1/3"),
                (init + torch.tensor(due[2]), "the third policy has no part in your result"),
                (thirds, "all three weigh the same, 1/√3. That would be nice, but a fold does not do that"),
                (init + torch.tensor([weights[2], weights[0], weights[0], 0.0]), "you begin with the last policy. The order "
                 "matters: fold from the first to the last"),
                (init + torch.tensor([0.5 * 0.75**0.5, 0.5 * 0.5, 0.75**0.5, 0.0]) * 2**0.5, "λ and 1 − λ are the wrong "
                 "way round: the third policy should go a third of the way, not the accumulated two"),
            ]  # fmt: skip
        same(got, init + torch.tensor(weights), mistakes, f"for M = {count} orthonormal task vectors, your θ")


def check_14(x):
    W, A, B = numbers(3, 3), numbers(2, 3), numbers(3, 2)  # in = out, so that a wrong layout raises no error

    def change(A, B, scale=2.5):  # α/r = 5/2; an entry of B A is a sum over the rank
        return torch.stack(
            [torch.stack([scale * sum(B[o, n] * A[n, i] for n in range(2)) for i in range(3)]) for o in range(3)]
        )

    C = change(A, B)
    for transposed, due, other in ((False, W + C, W + C.T), (True, W + C.T, W + C)):
        before = W.clone()
        got = x.merged_weight(W, A, B, 5.0, transposed)
        if not W.equal(before):
            raise NotYet("you changed W in place. It is the reference, too: W without the adapter is the old policy")
        same(got, due, [
            (other, f"transposed = {transposed}, and your change has the other layout. in = out here, so torch says nothing"),
            (due - C.T * 0.6 if transposed else due - C * 0.6, "there is no scale in your change. It is α/r"),
            (W + (due - W) * 2, "your scale is α. It is α/r: without that, a higher rank makes a larger change"),
            (W + (due - W) / 2.5 * 5 / 2**0.5, "your scale is α/√r. That is rsLoRA, a variant; here it is α/r"),
            (due - W, "this is the change alone. W is missing"),
        ], "the merged weight")  # fmt: skip
    pairs = [(A, B), (numbers(1, 2, 3)[0], numbers(1, 3, 2)[0])]
    mean_A, mean_B = (sum(pair[n] for pair in pairs) / 2 for n in (0, 1))
    right = sum(change(*pair) for pair in pairs) / 2
    same(x.mean_change(pairs, 5.0), right, [
        (change(mean_A, mean_B), "you multiply the mean of B with the mean of A. That mixes B of one adapter with A of "
                                 "another, which no run has trained together"),
        (right * 2, "you add up the changes. Their mean is due"),
        (right / 2.5, "there is no scale α/r in your mean"),
    ], "the mean change")  # fmt: skip


def check_15(x):
    lines = (FOLDER / "ex15_answers.txt").read_text().splitlines()[1:]
    secrets = dict(line.split() for line in lines)
    if set(x.ANSWERS) != set(secrets):
        raise NotYet("ANSWERS should have the names of the ten functions")
    if not any(x.ANSWERS.values()):
        raise NotImplementedError
    report = []
    for name, secret in secrets.items():
        line, reason = base64.b64decode(secret).decode().split(" ", 1)
        answer = x.ANSWERS[name]
        right = str(answer) == line
        report.append(f"{name}, line {answer}: " + (f"yes. {reason}" if right else "no answer yet" if not answer else
                      "no, this line does what its name and the docstring say"))  # fmt: skip
    missing = len(report) - sum(": yes." in line for line in report)
    report = "\n  ".join(report)
    if missing:
        raise NotYet(f"{missing} of ten are missing:\n  {report}")
    return f"All ten:\n  {report}"


def check_16(x):
    if x.BETA is None or x.ETA is None:
        raise NotImplementedError
    if not (isinstance(x.BETA, int | float) and x.BETA >= 0 and isinstance(x.ETA, int | float) and 0 <= x.ETA <= 1):
        raise NotYet(f"BETA must be a number ≥ 0 and ETA one in [0, 1], not {x.BETA!r} and {x.ETA!r}")
    return judge_try(train_and_judge(x.BETA, x.ETA), x.BETA, x.ETA)


def train_and_judge(beta, eta, steps=150, held_out=256):
    """{"reward", "gold", "kl": a value per held-out prompt} of (1−η) θ_sft + η θ, where θ is trained with β."""
    from hack import answers_of_mixture  # not at the top: transformers takes seconds to import

    return answers_of_mixture(beta, eta, steps, held_out)


def judge_try(columns, beta, eta):
    """The verdict on a try of exercise 16: a line if its gold score is at least .65 by two standard errors."""
    mean, error = {}, {}
    for name in ("reward", "gold", "kl"):
        values = torch.tensor(columns[name], dtype=torch.float64)  # (N,)
        mean[name], error[name] = values.mean().item(), (values.std() / math.sqrt(len(values))).item()
    table = ", ".join(f"{name} {mean[name]:.2f} ± {error[name]:.2f}" for name in mean)
    line = f"β = {beta:g}, η = {eta:g}: {table}."
    if mean["gold"] - 2 * error["gold"] >= 0.65:
        return f"{line} The gold score is above .65 by two standard errors."
    if mean["kl"] > 4:
        hint = "The KL is high: the policy has gone where the reward model is wrong. What holds it back, and what brings it back?"
    elif mean["gold"] >= 0.65:
        hint = "The mean is above .65, but not by two standard errors: it may be luck. Find a better place, not a luckier one."
    else:
        hint = "The KL is low: this is no hack. The policy could still learn a lot from the reward model. What keeps it at home?"
    raise NotYet(f"{line} {hint}")


CHECKS = dict(enumerate([check_1, check_2, check_3, check_4, check_5, check_6, check_7, check_8, check_9, check_10, check_11,
                         check_12, check_13, check_14, check_15, check_16], 1))  # fmt: skip


def verdict(number, module):
    """(right?, what the learner reads). module: the exercise's file, or anything with the same names."""
    file, solution = EXERCISES[number]
    try:
        said = CHECKS[number](module)
    except NotImplementedError:
        return False, f"exercise {number} is still empty. Open exercises/{file}.py: the task stands there."
    except NotYet as wrong:
        return False, f"exercise {number}, not yet: {wrong}"
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).stem == file]
        if not frames:  # not the learner's code: a defect of ours
            raise
        where = f"line {frames[-1].lineno} of {file}.py: {frames[-1].line}"
        return False, f"exercise {number}, not yet: your code raised {type(error).__name__}, {error}; {where}"
    return True, f"exercise {number} is right. {said or ''}\nAnother solution: {solution}."


def load(number):
    """The exercise's file as a module. UserError where Python cannot read it."""
    file = EXERCISES[number][0]
    try:
        return importlib.import_module(file)
    except (SyntaxError, NameError, ImportError) as error:
        raise UserError(f"exercises/{file}.py: {type(error).__name__}: {error}") from None


@one_line_errors
def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    known = [str(number) for number in EXERCISES]
    if len(words) > 1 or not {*words} <= {*known}:
        raise UserError(f"python exercises/check.py N, with N from 1 to {len(known)}, not {' '.join(words)!r}")
    results = [verdict(number, load(number)) for number in ([int(words[0])] if words else range(1, len(known)))]
    for _, text in results:
        print(text)
    if not all(right for right, _ in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
