"""The exercises: an empty stub fails, a right solution passes, and the usual wrong ones get the feedback they need.

The right solutions are written in another style than the package's. Each wrong one is a right one with one mistake.
"""

import inspect
import math
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "exercises"))

import check
import checks
import compare
import ex10_sigma
import ex15_find_the_bug as bugs
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from rlhf_min import warp

FOLDER = Path(check.__file__).parent

# Right solutions; what a wrong one does otherwise is an argument with a default


def pairwise_loss(w, v, m, sign=1, order=1, reduce=torch.mean, log_sigma=None, shapes=True):
    if shapes and not (w.ndim == v.ndim == m.ndim == 1):
        raise ValueError("shapes")
    log_sigma = log_sigma or (lambda x: -torch.nn.functional.softplus(-x))
    return -reduce(log_sigma(order * (w - v) - sign * m))


def completion_mask(tokens, eos_id, extra=1, missing=None):
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, out in zip(tokens.tolist(), mask):
        end = row.index(eos_id) + extra if eos_id in row else (len(row) if missing is None else missing)
        out[:end] = True
    return mask


def answer_logprob(logits, tokens, mask, shift=1, first=0, normalise=True, reduce=lambda x, m: (x * m).sum(1)):
    width = mask.shape[1]
    start = tokens.shape[1] - width
    scores = logits - logits.logsumexp(2, keepdim=True) if normalise else logits
    columns = []
    for t in range(first, width):
        columns.append(scores[:, start + t - shift].gather(1, tokens[:, start + t : start + t + 1])[:, 0])
    return reduce(torch.stack(columns, 1), mask[:, first:].double())


def reinforce_loss(logprobs, advantage, mask, sign=-1, length=lambda mask: 1, batch=len, axis=1, replace=True):
    kept = torch.where(mask, logprobs, torch.zeros_like(logprobs)) if replace else logprobs * mask
    weights = advantage.detach()[:, None] if axis == 1 else advantage.detach()[None]
    return sign * (weights * kept / length(mask)).sum() / batch(mask)


def past_only_advantages(R, seen=0, window=None, start=None):
    out = []
    for step, row in enumerate(R):
        past = R[: step + seen] if window is None else R[max(step - window, 0) : step]
        out.append(row - (past.mean() if past.numel() else (R[0].mean() if start else 0.0)))
    return torch.stack(out)


def leave_one_out(R, count=lambda k: k - 1, axis=1):
    R = R if axis == 1 else R.T
    k = R.shape[1]
    if k == 1:
        raise ValueError("k")
    others = (R @ (1 - torch.eye(k, dtype=R.dtype))) / count(k)
    return R - others if axis == 1 else (R - others).T


RIGHT_NAMES = {"k1": "nothing", "k2": "KL(π ‖ π_ref)", "k3": "KL(π_ref ‖ π)"}


def kl_estimates(logp, ref_logp, order=1, half=2, s=-1, s2=None):
    d = order * (logp - ref_logp)
    return d, d.square() / half, torch.expm1(s * d) - (s if s2 is None else s2) * d


def shaped_reward(r, logp, ref_logp, beta, sign=-1, kl=lambda d: d, detach=True):
    kl = kl(logp - ref_logp)
    return r + sign * beta * (kl.detach() if detach else kl)


def ordinal_loss(w, v, allowed=lambda i, j: i > j, reduce=torch.mean):
    K = w.shape[1]
    joint = w.log_softmax(1)[:, :, None] + v.log_softmax(1)[:, None, :]  # (B, K, K) log p_w(i) p_l(j)
    terms = [joint[:, i, j] for i in range(K) for j in range(K) if allowed(i, j)]
    return -reduce(torch.logsumexp(torch.stack(terms), 0))


def naive_ordinal_loss(w, v, epsilon=0.0):
    above = torch.ones(w.shape[1], w.shape[1]).tril(-1).to(w.dtype)  # 1 where i > j
    P = torch.einsum("bi,ij,bj->b", w.softmax(1), above, v.softmax(1))
    return -(P + epsilon).log().mean()


def rating_mean_std(logits, first=1, power=0.5, naive=False):
    p = torch.softmax(logits, 1)
    k = torch.arange(logits.shape[1], dtype=logits.dtype).expand_as(p) + first
    E = (k * p).sum(1)
    square = (k * k * p).sum(1) - E * E if naive else ((k - E.view(-1, 1)).pow(2) * p).sum(1)
    return E, square**power


def bias_of_sigma_weight(logp, sigma, b, f=lambda s: 1 / (1 + s), sign=-1):
    """−b ∇E[f], by autograd."""
    z = logp.clone().requires_grad_()
    mean = (z.softmax(0) * f(sigma)).sum()
    return sign * b * torch.autograd.grad(mean, z)[0]


def ema_update(ema, policy, mu, dtype=torch.float32, detach=True):
    new = {}
    for name in ema:
        old, theta = ema[name].to(dtype), policy[name].to(dtype)
        new[name] = old + mu * ((theta.detach() if detach else theta) - old)
    return new


def ema_in_place(ema, policy, mu):
    for name in ema:
        ema[name].mul_(1 - mu).add_(policy[name].detach(), alpha=mu)
    return ema


def slerp(a, b, lam, robust=True, opposite=True, unit=True):
    lengths = a.norm() * b.norm()
    cosine = torch.dot(a, b) / lengths if unit else torch.dot(a, b).clamp(-1, 1)
    if robust and (lengths == 0 or cosine > 1 - 1e-6):
        return a + lam * (b - a)
    if opposite and cosine < -1 + 1e-6:
        raise ValueError("opposite")
    omega = cosine.acos()
    return (torch.sin(omega - lam * omega) * a + torch.sin(lam * omega) * b) / omega.sin()


def opposite_by_equality(a, b, lam):
    if torch.equal(a, -b):
        raise ValueError("opposite")
    return slerp(a, b, lam, opposite=False)


def merge(init, policies, slerp, lam=lambda m: 1 / m, task=1.0, back=1.0):
    steps = [policy - task * init for policy in policies]
    m, delta = 1, steps[0]
    while m < len(steps):
        delta, m = slerp(delta, steps[m], lam(m + 1)), m + 1
    return back * init + delta


def merged_weight(W, A, B, alpha, transposed, scale=lambda alpha, r: alpha / r, respect=True, base=1.0):
    change = torch.einsum("or,ri->oi", B, A) * scale(alpha, len(A))
    return base * W + (change.t() if transposed and respect else change)


def mean_change(adapters, alpha, count=len):
    total = 0
    for A, B in adapters:
        total = total + alpha / A.shape[0] * B.mm(A)
    return total / count(adapters)


def crossed_mean_change(adapters, alpha):
    A, B = (torch.stack(tensors).mean(0) for tensors in zip(*adapters))
    return alpha / len(A) * B @ A


LINES = {
    "positions": 1, "reward_of_answer": 2, "sample_and_score": 4, "kl_of_next_token": 3, "rewards_by_prompt": 1,
    "clip_gradients": 3, "new_adapter": 3, "front": 4, "split_pairs": 3, "mean_and_error": 4,
}  # fmt: skip

FUNCTIONS = [
    pairwise_loss, completion_mask, answer_logprob, reinforce_loss, past_only_advantages, leave_one_out, kl_estimates,
    shaped_reward, ordinal_loss, rating_mean_std, ema_update, slerp, merge, merged_weight,
]  # fmt: skip
RIGHT = {number: {function.__name__: function} for number, function in enumerate(FUNCTIONS, 1)}
RIGHT[15] = {"ANSWERS": LINES}
RIGHT[7]["GRADIENT_OF"] = RIGHT_NAMES
RIGHT[10]["bias_of_sigma_weight"] = bias_of_sigma_weight
RIGHT[14]["mean_change"] = mean_change


def answer(number, **changed):
    """check.verdict on the right solution with some names changed."""
    return check.verdict(number, SimpleNamespace(**(RIGHT[number] | changed)))


@pytest.mark.parametrize("number", check.EXERCISES)
def test_an_empty_stub_is_one_friendly_line(number, capsys):
    with pytest.raises(SystemExit) as stop:
        check.main([str(number)])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert f"Exercise {number} is still empty" in out and check.EXERCISES[number][0] in out


def test_the_half_that_is_empty_is_named():
    right, text = answer(10, bias_of_sigma_weight=ex10_sigma.bias_of_sigma_weight)
    assert not right and "ex10_sigma.py, bias_of_sigma_weight." in text


@pytest.mark.parametrize("number", RIGHT)
def test_a_right_solution_of_another_style_passes(number):
    right, text = answer(number)
    assert right, text
    assert check.EXERCISES[number][1] in text


def changed(function, **arguments):
    return lambda *args: function(*args, **arguments)


logsigmoid_by_parts = lambda x: (1 / (1 + (-x).exp())).log()
WRONG = [  # (exercise, function, wrong one, a word of the feedback)
    (1, changed(pairwise_loss, sign=-1), "margin makes the loss smaller"),
    (1, changed(pairwise_loss, sign=0), "does not depend on the margin"),
    (1, changed(pairwise_loss, order=-1), "*worse* answer"),
    (1, changed(pairwise_loss, reduce=torch.sum), "add up the batch"),
    (1, changed(pairwise_loss, log_sigma=logsigmoid_by_parts), "∞ for large ones"),
    (1, changed(pairwise_loss, log_sigma=lambda x: (x.sigmoid() + 1e-4).log()), "1e-3 where 1e-6 is due"),
    (1, changed(pairwise_loss, log_sigma=lambda x: (x.sigmoid() + 1e-8).log()), "an ε is added"),
    (1, changed(pairwise_loss, shapes=False), "without a ValueError"),
    (1, lambda w, v, m: pairwise_loss(w, v, m).item(), "a tensor is due"),
    (1, lambda w, v, m: pairwise_loss(w.detach(), v, m), "cuts the graph"),
    (2, changed(completion_mask, extra=0), "first EOS is missing"),
    (2, lambda tokens, eos: tokens != eos, "its *place*"),
    (2, lambda tokens, eos: (tokens != eos) | ((tokens == eos).cumsum(1) == 1), "behind its end"),
    (2, lambda tokens, eos: (tokens == eos).cumsum(1) < 2, "*second* EOS"),
    (2, lambda tokens, eos: torch.nn.functional.pad(tokens[:, :-1] != eos, (1, 0), value=True), "one token back"),
    (2, changed(completion_mask, missing=0), "no token in your mask"),
    (2, changed(completion_mask, missing=1), "place of a maximum"),
    (2, lambda tokens, eos: torch.ones_like(tokens) > 0, "mask is"),
    (2, lambda tokens, eos: completion_mask(tokens, eos).long(), "type is not"),
    (3, changed(answer_logprob, shift=0), "*at* that token"),
    (3, changed(answer_logprob, first=1), "first token of the answer"),
    (3, changed(answer_logprob, normalise=False), "not normalised"),
    (3, changed(answer_logprob, reduce=lambda x, m: x.sum(1)), "mask has no effect"),
    (3, changed(answer_logprob, reduce=lambda x, m: (x * m).sum(1) / m.sum(1)), "mean over tokens"),
    (3, lambda *args: -answer_logprob(*args), "sign is wrong"),
    (3, lambda logits, *args: answer_logprob(logits.softmax(2).log(), *args, normalise=False), "−∞ for an unlikely"),
    (3, lambda logits, *args: answer_logprob(logits.detach(), *args), "has no gradient"),
    (3, lambda *args: answer_logprob(*args)[:, None], "shape (2, 1)"),
    (4, changed(reinforce_loss, sign=1), "sign is wrong"),
    (4, changed(reinforce_loss, batch=lambda mask: 1), "add up the batch"),
    (4, changed(reinforce_loss, length=lambda mask: mask.sum(1, keepdim=True)), "answer's length"),
    (4, changed(reinforce_loss, batch=torch.sum), "mean over tokens"),
    (4, changed(reinforce_loss, axis=0), "wrong axis"),
    (4, lambda logprobs, A, mask: reinforce_loss(logprobs, A, mask | True), "mask has no effect"),
    (4, changed(reinforce_loss, replace=False), "0 · (−∞)"),
    (4, lambda logprobs, A, mask: reinforce_loss(logprobs, A, mask) + 0.1 * A.sum(), "should be a constant"),
    (5, changed(past_only_advantages, seen=1), "rewards of its own step"),
    (5, changed(past_only_advantages, window=1), "mean of the last step"),
    (5, changed(past_only_advantages, start=True), "there is no past"),
    (5, lambda R: R - R.mean(1, keepdim=True), "own batch"),
    (5, lambda R: R - R.mean(), "future"),
    (5, lambda R: R - past_only_advantages(R), "this is b"),
    (6, changed(leave_one_out, axis=0), "*different* prompts"),
    (6, changed(leave_one_out, count=lambda k: k), "how many do you divide"),
    (6, lambda R: R - R.mean(1, keepdim=True), "own reward"),
    (6, lambda R: (R - R.mean(1, keepdim=True)) / R.std(1, keepdim=True), "standard deviation"),
    (6, lambda R: R - (R.sum() - R) / (R.numel() - 1), "whole batch"),
    (6, lambda R: R - leave_one_out(R), "this is the baseline"),
    (6, lambda R: R - (R.sum(1, keepdim=True) - R) / max(R.shape[1] - 1, 1), "k = 1 passes"),
    (6, lambda R: leave_one_out(R) if R.shape[1] > 1 else 1 // 0, "raise ZeroDivisionError where"),
    (7, changed(kl_estimates, order=-1), "estimates −KL"),
    (7, changed(kl_estimates, half=1), "twice too large"),
    (7, changed(kl_estimates, s=1), "your sampler is the other distribution"),
    (7, changed(kl_estimates, s2=1), "two different s"),
    (7, lambda logp, ref: kl_estimates(logp.detach(), ref), "has no gradient"),
    (8, changed(shaped_reward, sign=1), "pay the policy for leaving"),
    (8, lambda r, logp, ref, beta: (r - (logp - ref)).detach(), "does not depend on β"),
    (8, lambda r, logp, ref, beta: (r - beta * logp).detach(), "does not depend on the reference"),
    (8, changed(shaped_reward, kl=torch.abs), "another objective"),
    (8, changed(shaped_reward, kl=torch.mean), "mean KL"),
    (8, changed(shaped_reward, kl=lambda d: torch.expm1(-d) + d), "k3 in the reward"),
    (8, changed(shaped_reward, detach=False), "gradient flows through R"),
    (9, changed(ordinal_loss, allowed=lambda i, j: i >= j), "ties i = j count"),
    (9, changed(ordinal_loss, allowed=lambda i, j: i < j), "*worse* answer"),
    (9, changed(ordinal_loss, reduce=torch.sum), "add up the batch"),
    (9, naive_ordinal_loss, "∞ for ±400"),
    (9, lambda w, v: naive_ordinal_loss(w.double(), v.double()), "∞ for ±400"),
    (9, changed(naive_ordinal_loss, epsilon=1e-8), "ε is added"),
    (10, changed(rating_mean_std, first=0), "begin at 0"),
    (10, changed(rating_mean_std, power=1), "this is the variance"),
    (10, changed(rating_mean_std, naive=True), "E[k²] − E²"),
    (10, lambda logits: rating_mean_std(logits)[0], "could not use your code"),
    (11, lambda ema, policy, mu: ema_update(ema, policy, 1 - mu), "wrong way round"),
    (11, ema_in_place, "in place"),
    (11, changed(ema_update, detach=False), "gradient flows"),
    (11, lambda ema, policy, mu: {"w": torch.lerp(ema["w"], policy["w"].detach(), mu)}, "stands still"),
    (11, lambda ema, policy, mu: policy, "the policy itself"),
    (12, lambda a, b, lam: (1 - lam) * a + lam * b, "straight line"),
    (12, lambda a, b, lam: slerp(a, b, 1 - lam), "wrong way round"),
    (12, lambda a, b, lam: slerp(a / a.norm(), b / b.norm(), lam), "length is lost"),
    (12, changed(slerp, robust=False), "NaN where"),
    (12, changed(slerp, opposite=False), "opposite vectors pass"),
    (12, opposite_by_equality, "opposite vectors pass"),
    (12, changed(slerp, unit=False), "Is your Ω that of a/|a|"),
    (13, changed(merge, task=0.0, back=0.0), "weights themselves"),
    (13, changed(merge, back=0.0), "θ_init is missing"),
    (13, changed(merge, lam=lambda m: 0.5), "½ at every fold"),
    (13, changed(merge, lam=lambda m: 1 - 1 / m), "two thirds"),
    (13, changed(merge, lam=lambda m: 1 / (m + 1)), "off by one"),
    (13, lambda init, policies, slerp: merge(init, policies, slerp) if policies[1:] else policies[0], "a new tensor"),
    (13, lambda init, policies, slerp: merge(init, policies[::-1], slerp), "last policy"),
    (13, lambda init, policies, slerp: merge(init, policies[:2], slerp), "no part"),
    (13, lambda init, policies, slerp: torch.stack(policies).mean(0), "mean of the task vectors"),
    (14, changed(merged_weight, scale=lambda alpha, r: 1), "no scale"),
    (14, changed(merged_weight, scale=lambda alpha, r: alpha), "your scale is α."),
    (14, changed(merged_weight, respect=False), "wrong layout"),
    (14, changed(merged_weight, base=0.0), "W is missing"),
    (14, lambda W, *args: W.add_(merged_weight(W, *args) - W), "in place"),
]  # fmt: skip


WRONG = [(number, FUNCTIONS[number - 1].__name__, wrong, words) for number, wrong, words in WRONG]
WRONG += [  # of exercises with two parts, the second one
    (7, "GRADIENT_OF", {"k1": "Nothing", "k2": "KL(pi || ref)", "k3": ""}, "Now choose GRADIENT_OF['k2']"),
    (7, "GRADIENT_OF", RIGHT_NAMES | {"k1": "KL(π ‖ π_ref)"}, "your gradient does not depend on the reference"),
    (7, "GRADIENT_OF", RIGHT_NAMES | {"k3": "KL(π ‖ π_ref)"}, "the expected gradient of k3"),
    (10, "bias_of_sigma_weight", changed(bias_of_sigma_weight, sign=1), "sign is wrong"),
    (10, "bias_of_sigma_weight", lambda logp, sigma, b: bias_of_sigma_weight(logp, sigma, 1.0), "depend on b"),
    (10, "bias_of_sigma_weight", changed(bias_of_sigma_weight, f=lambda s: s), "weight is σ"),
    (10, "bias_of_sigma_weight", changed(bias_of_sigma_weight, f=torch.ones_like), "your bias is 0"),
    (14, "mean_change", crossed_mean_change, "pairs the B of one"),
    (14, "mean_change", changed(mean_change, count=lambda adapters: 1), "add up the changes"),
]


@pytest.mark.parametrize("number, name, wrong, words", WRONG, ids=[f"{n}-{words}" for n, _, _, words in WRONG])
def test_a_wrong_solution_is_told_what_is_wrong(number, name, wrong, words):
    """A solution with one mistake does not pass, and the feedback has the words that its author needs."""
    right, text = answer(number, **{name: wrong})
    assert not right
    assert words in text


# 15: find the bug


REPAIRED = {  # the wrong line of each function, as it should be
    "positions": "counted = attention_mask.long()",
    "reward_of_answer": "last = attention_mask.sum(-1) - 1",
    "sample_and_score": "logprob = (logits / temperature).log_softmax(-1)[token]",
    "kl_of_next_token": "weights = logp.exp()",
    "rewards_by_prompt": "batch = [prompt for prompt in prompts for _ in range(k)]",
    "clip_gradients": "factor = min(1.0, max_norm / norm)",
    "new_adapter": "B = torch.zeros(n_out, r)",
    "front": "theta = (1 - eta) * sft + eta * merged",
    "split_pairs": "training = [pair for pair in pairs if pair['prompt'] not in held_out_prompts]",
    "mean_and_error": "error = math.sqrt(variance / n)",
}


def repaired(name):
    """The function with its wrong line replaced, the others as they are."""
    lines = inspect.getsource(getattr(bugs, name)).splitlines()
    (place,) = [i for i, line in enumerate(lines) if re.search(rf"  # {LINES[name]}(:|$)", line)]
    indent = re.match(" *", lines[place])[0]
    lines[place] = indent + REPAIRED[name]
    scope = {"torch": torch, "math": math}
    exec("\n".join(lines), scope)
    return scope[name]


X, Y = compare.numbers(2, 4), compare.numbers(2, 4, seed=1)
REAL = torch.tensor([[False, True, True, True], [True, True, True, True]])
P = (2 * X[0]).softmax(0).tolist()
TOKEN = next(i for i in range(4) if sum(P[: i + 1]) > 0.3)
KLS = [kl_divergence(Categorical(logits=x), Categorical(logits=y)).item() for x, y in zip(X, Y)]
ETAS, NUMBERS = (0.25, 0.5, 1.0), [1.0, 2.0, 6.0, 3.0]
FRONT = [pytest.approx(warp.interpolate({"w": X[0]}, {"w": X[1]}, eta)["w"].tolist()) for eta in ETAS]


def new_adapter(A, B):
    """What there is to see of the factors of an adapter."""
    return [A.shape, B.shape, bool((A != 0).all()), bool(A.abs().max() <= 6**-0.5), (B @ A).abs().max().item()]


# Numbers that show what a function does, on an input that tells the bug from the repair; and the same numbers from a
# source that is not the function: by hand, from torch, or from the package.
BEHAVIOUR = {
    "positions": (lambda f: f(REAL)[REAL].tolist(), [0, 1, 2, 0, 1, 2, 3]),
    "reward_of_answer": (lambda f: f(X, REAL.flip(1)).tolist(), [X[0, 2].item(), X[1, 3].item()]),
    "sample_and_score": (lambda f: [float(value) for value in f(X[0], 0.5, torch.tensor([0.3], dtype=torch.float64))],
                         [TOKEN, pytest.approx(math.log(P[TOKEN]))]),
    "kl_of_next_token": (lambda f: f(X, Y).tolist(), pytest.approx(KLS)),
    "rewards_by_prompt": (lambda f: f([1.0, 2.0], 3, lambda x: x, lambda x, y: x * y).tolist(),
                          [[1.0] * 3, [4.0] * 3]),
    "clip_gradients": (lambda f: [f([X, X], 1000.0)[0].tolist(), f([X, X], 1000.0)[1].tolist(), f([X], 0.1)[0].norm()],
                       [X.tolist(), X.tolist(), pytest.approx(0.1)]),
    "new_adapter": (lambda f: new_adapter(*f(6, 5, 2)), [(2, 6), (5, 2), True, True, 0.0]),
    "front": (lambda f: [theta.tolist() for theta in f(X[0], X[1], ETAS)], FRONT),
    "split_pairs": (lambda f: [[pair["prompt"] for pair in part] for part in f([{"prompt": p} for p in "abacab"], 1)],
                    [["b", "c", "b"], ["a", "a", "a"]]),
    "mean_and_error": (lambda f: [*f(NUMBERS)], [3.0, pytest.approx(statistics.stdev(NUMBERS) / 2)]),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_each_of_the_ten_functions_has_exactly_that_bug(name):
    """As it stands a function is wrong; with the one line replaced it is right."""
    shown, expected = BEHAVIOUR[name]
    assert shown(repaired(name)) == expected
    assert shown(getattr(bugs, name)) != expected


def test_find_the_bug_says_which_lines_are_right():
    right, text = answer(15)
    assert right
    assert text.count("\n  ") == 10 and text.count(", right. ") == 10
    right, text = answer(15, ANSWERS=LINES | {"front": 5, "positions": 0})
    assert not right
    for words in ("8 of 10 are found", "front: line 5, that line does", "positions: no answer yet"):
        assert words in text
    assert "⅝" not in text  # the sentence about front is not given away


# 16: stop the hack


def columns(gold, spread, kl, n=256):
    """Judged answers whose gold has that mean and a standard error of spread / 16, but for 1/n."""
    half = [gold - spread, gold + spread] * (n // 2)
    return {"reward": [1.0] * n, "gold": half, "kl": [kl] * n}


@pytest.mark.parametrize("gold, spread, kl, words", [
    (0.70, 0.32, 2.0, "above .65 by two standard errors"),  # .70 − 2 · .32/16 = .66
    (0.68, 0.32, 2.0, "may be luck"),  # .68 − .04 = .64
    (0.10, 0.32, 45.0, "KL is high"),
    (0.40, 0.32, 0.5, "KL is low"),
])  # fmt: skip
def test_stop_the_hack_wants_two_standard_errors(monkeypatch, gold, spread, kl, words):
    import hack

    tries = []
    train = lambda beta, eta: tries.append((beta, eta)) or columns(gold, spread, kl)
    monkeypatch.setattr(hack, "train_and_judge", train)
    right, text = check.verdict(16, SimpleNamespace(BETA=0.25, ETA=0.5))
    assert right == (words == "above .65 by two standard errors")
    assert words in text and f"gold {gold:.2f} ± 0.02" in text
    assert tries == [(0.25, 0.5)]


@pytest.mark.parametrize(("beta", "eta"), [(-0.1, 0.5), (0.1, 1.5)])
def test_stop_the_hack_refuses_numbers_out_of_range(beta, eta):
    right, text = check.verdict(16, SimpleNamespace(BETA=beta, ETA=eta))
    assert not right and "at least 0" in text


def test_stop_the_hack_trains_and_judges_on_prompts_of_its_own(in_world):
    """Two steps in a small world. η = 0 is θ_sft, at a KL of 0, and its prompts are nobody else's."""
    import hack

    from rlhf_min.evaluation import load_task
    from rlhf_min.support.precision import resolve_device
    from train_reinforce import ReinforceOptions

    after = hack.train_and_judge(beta=0.1, eta=1.0, steps=2, held_out=20)
    before = hack.train_and_judge(beta=0.1, eta=0.0, steps=2, held_out=20)
    assert max(map(abs, before["kl"])) == 0 and max(after["kl"]) > 0
    assert before["prompt"] == after["prompt"] and len(set(after["prompt"])) == len(after["gold"]) == 20
    options = ReinforceOptions(num_eval_prompts=40)
    task = load_task(options, resolve_device(options))
    assert not {prompt.text for prompt in task.prompts} & {*after["prompt"]}
    options.num_eval_prompts = 20  # what the scripts hold out
    assert not {prompt.text for prompt in load_task(options, resolve_device(options)).eval_prompts} & {*after["prompt"]}


# The command


@pytest.mark.parametrize("code, status, said", [
    ("def leave_one_out(rewards):\n    return rewards - reward.mean(1)\n", 1,
     "NameError in line 2 of ex06_leave_one_out.py, `return rewards - reward.mean(1)`"),
    ("def leave_one_out(rewards:\n    return rewards\n", 2,
     "exercises/ex06_leave_one_out.py cannot be read: SyntaxError"),
])  # fmt: skip
def test_errors_in_a_solution_are_one_line_with_their_place(tmp_path, monkeypatch, capsys, code, status, said):
    """What a solution raises, and what Python cannot read, is named with its file, and stands on one line."""
    (tmp_path / "ex06_leave_one_out.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ex06_leave_one_out", raising=False)
    with pytest.raises(SystemExit) as stop:
        check.main(["6"])
    assert stop.value.code == status
    out, err = capsys.readouterr()
    (line,) = (out + err).splitlines()
    assert said in line
    sys.modules.pop("ex06_leave_one_out", None)


def test_a_defect_of_a_check_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(checks, "check_6", lambda module: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer(6)


@pytest.mark.parametrize("words", [["0"], ["17"], ["one"], ["1", "2"]])
def test_a_wrong_number_is_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        check.main(words)
    assert stop.value.code == 2
    assert "N from 1 to 16" in capsys.readouterr().err


def test_without_a_number_all_but_the_last_are_checked(monkeypatch, capsys):
    monkeypatch.setattr(check, "load", lambda number: SimpleNamespace(**RIGHT[number]))
    with pytest.raises(SystemExit) as stop:
        check.main([])
    assert stop.value.code == 0
    assert capsys.readouterr().out.count(" is right.") == 15


def test_rounding_is_told_from_a_bug():
    """1e-7 passes, 1e-3 is named, and so are NaN and another shape."""
    right = torch.tensor([1.0, -2.0])
    compare.same(right + 1e-7, right)
    for got, words in ((right + 1e-3, "rounding is 1e-7"), (right / 0, "Look for log 0"), (right[:1], "has the shape")):
        with pytest.raises(compare.NotYet, match=words):
            compare.same(got, right)


def test_the_table_of_the_exercises_names_all_of_them():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    for number, (file, _) in check.EXERCISES.items():
        assert f"| {number} | [`{file}.py`]({file}.py) |" in table
        assert (FOLDER / f"{file}.py").exists()
