"""What is your loss the gradient of? An exact answer, without a model and without noise.

    python -m rlhf_min.oracle package.module:function [--beta 0.1]

The function is your loss. It is called as a training step would call it, on B answers of at most T tokens to one
prompt:

    function(logprobs, ref_logprobs, reward, mask)      (B, T), (B, T), (B,), bool (B, T)

`logprobs` are log π(y_t | y_<t) of the policy π and carry a graph; `ref_logprobs` are those of the fixed reference
π_ref; `mask` is True up to and including the first EOS, the token that ends an answer. Behind it stand pads, which
only fill the row. The function returns a scalar; or a number per answer (B,), of which we take the mean; or a number
per token (B, T), which we first sum over the tokens. A step of training goes along −∇L, against the gradient of the
loss. What it should climb is the objective of RLHF, the reward r minus β times the distance from the reference:

    J = E[r] − β KL(π ‖ π_ref),      KL(π ‖ π_ref) = E[d],      d = log π(y) − log π_ref(y),      y drawn from π

The idea is *enumeration*. Our policy has one word and EOS: token by token it goes on or ends, and after five tokens an
answer is over. So there are six answers, and we know the probability of each. In training, answers are drawn, and a
step is noise around a mean. Here we call the loss on *every* batch of two answers, 6² of them, and weigh each step with
the probability of its batch. The weighted sum is the expected step −E[∇L]. Nothing in it is sampled, so it is exact up
to the rounding of float64. We compare it with the gradient of J and with those of other known quantities. The policy is
a table of logits with a row for every position, so it can become any distribution over the six answers.

The answers come from the policy as it is. So a ratio of new to old policy, as in PPO, is 1 here, and clipping it does
nothing: write the old log-probs as logprobs.detach(). In your own tests:

    from rlhf_min.oracle import examine

    def test_my_loss():
        report = examine(my_loss, beta=0.1)
        assert not report.faults, report
"""

import argparse
import itertools
from types import SimpleNamespace

import torch

from .support.errors import UserError, import_function, one_line_errors


def all_answers(words, length):
    """Every answer of at most `length` tokens, sorted. Tokens 0..words−1 are words, and token `words` is EOS."""
    beginnings = [y for n in range(length + 1) for y in itertools.product(range(words), repeat=n)]
    return sorted([*y, words] if len(y) < length else [*y] for y in beginnings)


def all_batches(probability, size):
    """Every batch of `size` of N answers, as indices (N^size, size), and its probability (N^size,)."""
    batches = torch.cartesian_prod(*[torch.arange(len(probability))] * size)
    return batches, probability[batches].prod(-1)


class World:
    """All N answers of at most `length` tokens, T = length + pads, with their log-probs, rewards and probabilities.

    The policy is a table of logits with a row for each position, and columns for the word and EOS; D = length · 2.
    Answers are sampled at `temperature` and scored at temperature 1. r = scale · (random numbers) + shift.
    """

    def __init__(self, length=5, pads=0, temperature=1.0, scale=1.0, shift=0.0, ref_seed=1):
        answers, width = all_answers(1, length), length + pads
        self.mask = torch.tensor([[t < len(y) for t in range(width)] for y in answers])  # (N, T)
        tokens = torch.tensor([y + [1] * (width - len(y)) for y in answers])  # (N, T) padded with EOS
        self.ends = tokens.eq(1) & self.mask  # (N, T) True on EOS
        rows = torch.arange(width).clamp(max=length - 1)  # (T,) what a pad gets is overwritten

        def score(logits, pad=0.0):  # (length, 2) → (N, T); a pad's log-prob means nothing, so it can be any number
            return logits.log_softmax(-1)[rows, tokens].masked_fill(~self.mask, pad)

        policy, reference = torch.Generator().manual_seed(0), torch.Generator().manual_seed(ref_seed)
        self.logits = torch.randn(length, 2, generator=policy, dtype=torch.float64, requires_grad=True)
        self.logprobs = score(self.logits, pad=-1.7)  # (N, T)
        self.ref_logprobs = score(torch.randn(length, 2, generator=reference, dtype=torch.float64), pad=-0.4)  # (N, T)
        self.slopes = torch.func.jacrev(score)(self.logits.detach()).flatten(2)  # (N, T, D) ∂ logprobs / ∂ logits
        self.probability = score(self.logits.detach() / temperature).sum(-1).exp()  # (N,)
        self.reward = scale * torch.randn(len(answers), generator=policy, dtype=torch.float64) + shift  # (N,)


def call(loss, logprobs, ref_logprobs, reward, mask):
    """The loss of a batch as a scalar, and its gradient by the log-probs (B, T). UserError if it is no finite loss."""
    logprobs = logprobs.detach().requires_grad_()
    value = loss(logprobs, ref_logprobs, reward, mask)
    if not isinstance(value, torch.Tensor) or value.shape not in {(), mask.shape[:1], mask.shape}:
        raise UserError("the loss must return a tensor: a scalar, (B,) or (B, T)")
    value = (value.sum(-1) if value.dim() == 2 else value).mean()
    slope = torch.autograd.grad(value, logprobs)[0] if value.requires_grad else torch.zeros_like(logprobs)
    if not (value.isfinite() and slope.isfinite().all()):
        raise UserError("the loss is not finite; does it divide by the spread of the rewards, which may be 0?")
    return value.detach(), slope


def run(loss, world, size=2):
    """The loss on all N^B batches of B = `size` answers.

    Returns the probability of each batch (N^B,), its step −∇L (N^B, D), its loss (N^B,), and of each token of each
    answer whether its log-prob had a gradient in any batch (N, T).
    """
    batches, probability = all_batches(world.probability, size)
    data = world.logprobs, world.ref_logprobs, world.reward, world.mask
    values, slopes = zip(*[call(loss, *[column[batch] for column in data]) for batch in batches])
    slopes = torch.stack(slopes)  # (N^B, B, T) ∂L / ∂ logprobs
    steps = -torch.einsum("nbt,nbtd->nd", slopes, world.slopes[batches])
    total = torch.zeros(world.mask.shape).double().index_add(0, batches.flatten(), slopes.abs().flatten(0, 1))  # (N, T)
    return probability, steps, torch.stack(values), total > 1e-12


def known_quantities(world, temperature):
    """{name: scalar}: what a step may climb or descend. Each is a sum over all answers, for autograd to differentiate.

    H(π) is the entropy, −E[log π]. `length` is that of y in tokens, and d in E[d / length] is a constant, like a
    detached reward. The `token` KLs are expected sums of the KLs of next-token distributions, in which the beginnings
    of the answers are constants: no token is charged for the KL of what comes after it. Their gradients (not their
    values) are those of the estimates k2 and k3 (see reinforce.kl_estimate) of single tokens, and so we write them.
    """
    d_t = (world.logprobs - world.ref_logprobs).masked_fill(~world.mask, 0.0)  # (N, T)
    logp, d = world.logprobs.masked_fill(~world.mask, 0.0).sum(-1), d_t.sum(-1)  # (N,)
    p, r, length, constant = logp.exp(), world.reward, world.mask.double().sum(-1), d.detach()  # (N,)
    known = {
        "E[r]": p @ r,
        "KL(π‖ref)": p @ d,
        "KL(ref‖π)": (logp - d).detach().exp() @ -d,
        "H(π)": -p @ logp,
        "token KL(π‖ref)": p.detach() @ (d_t**2 / 2).sum(-1),
        "token KL(ref‖π)": p.detach() @ (torch.exp(-d_t) - 1 + d_t).sum(-1),
        "E[length]": p @ length,
        "E[1 / length]": p @ (1 / length),
        "E[r / length]": p @ (r / length),
        "E[d / length]": p @ (constant / length),
    }
    if temperature != 1:  # answers come from another policy s
        known["E_s[r log π]"] = world.probability @ (r * logp)
        known["KL(s‖π)"] = world.probability @ (world.probability.log() - logp)
    return known


def same(a, b):
    """Whether two tensors agree up to rounding."""
    return bool((a - b).norm() <= 1e-9 * (1 + b.norm()))


def name_step(step, gradients):
    """{name: factor} of at most two of {name: gradient} whose sum is the step, {} for a step of 0; None if none fit."""
    names, columns = list(gradients), torch.stack(list(gradients.values()), dim=1)  # (D, names)
    for count in range(3):
        for picks in itertools.combinations(range(len(names)), count):
            factors = torch.linalg.lstsq(columns[:, list(picks)], step[:, None]).solution  # (count, 1)
            if same((columns[:, list(picks)] @ factors)[:, 0], step):
                return {names[i]: round(factor, 8) for i, factor in zip(picks, factors[:, 0].tolist())}
    return None


def formula(terms):
    """What name_step found, as text, e.g. E[r] − 0.1 KL(π‖ref)."""
    if terms is None:
        return "something without a name"
    signed = [f"{'−+'[factor > 0]} {abs(factor):.4g} {name}".replace(" 1 ", " ") for name, factor in terms.items()]
    return " ".join(signed).removeprefix("+ ") or "nothing"


class Report(SimpleNamespace):
    """What `examine` found. str() gives one screen, which ends with a verdict."""

    def __str__(self):
        yes = {True: "yes", False: "no"}
        verdict = "\n    ".join(["WRONG:", *self.faults]) if self.faults else "RIGHT: the step climbs J"
        return f"""\
the expected step, compared with the exact gradient of J = E[r] − {self.beta:g} KL(π‖ref)
    its reward term climbs        {formula(self.reward_term)}
    its KL term climbs            {formula(self.kl_term)}
    cosine with the gradient      {self.cosine:.4f}
    length / that of gradient     {self.length:.4f}
    variance of a step            {self.variance:.4f} per answer, where the gradient has length 1
the loss itself, as an estimate of something
    expectation                   {self.value:.4f}{self.value_is and " = " + self.value_is}
    variance                      {self.value_variance:.4f} per answer
    depends on the reference      {yes[self.sees_reference]}
tokens that are trained
    words, EOS, pads              {self.trained_words:.0%}, {self.trained_eos:.0%}, {self.trained_pads:.0%}
what changes the expected step
    wider padding                 {yes[self.padding_matters]}
    a constant in all rewards     {yes[self.constant_matters]}
    rewards times 2               {"doubles their part" if self.reward_is_linear else "does not double their part"}
    3 answers a batch, not 2      {f"yes, {self.batch_growth:.4f} times as long" if self.batch_size_matters else "no"}
{verdict}"""


def examine(loss, beta=0.1, temperature=1.0):
    """The Report on a loss of (logprobs, ref_logprobs, reward, mask), which is meant to climb J = E[r] − β KL(π‖π_ref).

        reward_term, kl_term    {name: factor}, what the expected step climbs: because of the rewards, and with all
                                rewards at 0; {} is nothing, and None is something without a name
        cosine, length          of the expected step against ∇J; a negative cosine goes downhill
        variance                of a step, per answer: B E‖step − E[step]‖² / ‖∇J‖²
        value, value_variance   the loss itself, as an estimate: its expectation, and B times its variance
        value_is                the first known quantity with this expectation, or an empty text
        trained_words, _eos     the share of them whose log-prob has a gradient; it should be 1
        trained_pads            the same; it should be 0
        faults                  a sentence for each reason why this loss does not train J; [] if it does

    and those of `dependences`. `temperature` is the sampler's; the log-probs are those at temperature 1.
    """
    world = World(temperature=temperature)
    known = known_quantities(world, temperature)
    slopes = [torch.autograd.grad(scalar, world.logits, retain_graph=True)[0].flatten() for scalar in known.values()]
    gradients = dict(zip(known, slopes))
    exact = gradients["E[r]"] - beta * gradients["KL(π‖ref)"]  # (D,) ∇J
    probability, steps, values, trained = run(loss, world)
    step, value = probability @ steps, probability @ values
    kl_step = probability @ run(loss, World(temperature=temperature, scale=0.0))[1]  # (D,)
    share = lambda tokens: trained[tokens].double().mean().item()
    report = Report(
        beta=beta,
        reward_term=name_step(step - kl_step, gradients),
        kl_term=name_step(kl_step, gradients),
        cosine=torch.cosine_similarity(step, exact, dim=0).item(),
        length=(step.norm() / exact.norm()).item(),
        variance=2 * (probability @ (steps - step).square().sum(-1) / exact.norm() ** 2).item(),
        value=value.item(),
        value_variance=2 * (probability @ (values - value).square()).item(),
        value_is=next((name for name in known if "token" not in name and same(known[name], value)), ""),
        trained_words=share(world.mask & ~world.ends),
        trained_eos=share(world.ends),
        trained_pads=share(~world.mask),
        **dependences(loss, temperature),
    )
    report.faults = find_faults(report, beta)
    return report


def dependences(loss, temperature):
    """The rest of the Report: what changes the expected step, in a world of only three answers.

    sees_reference          whether π_ref changes the loss at all
    padding_matters         whether wider padding changes the expected step
    constant_matters        whether a constant added to all rewards does; if so, a baseline does, too
    reward_is_linear        whether the expected step is linear in the rewards
    batch_size_matters      whether it is another one with three answers a batch instead of two
    batch_growth            how many times as long it is with three
    """

    def outcome(size=2, **change):
        probability, steps, values, _ = run(loss, World(length=2, temperature=temperature, **change), size)
        return probability @ steps, steps, values

    step, *noise = outcome()
    double, triple, three = outcome(scale=2.0)[0], outcome(scale=3.0)[0], outcome(size=3)[0]
    return {
        "sees_reference": not all(map(same, outcome(ref_seed=2)[1:], noise)),
        "padding_matters": not same(outcome(pads=2)[0], step),
        "constant_matters": not same(outcome(shift=5.0)[0], step),
        "reward_is_linear": same(triple - double, double - step),
        "batch_size_matters": not same(three, step),
        "batch_growth": (three.norm() / step.norm()).item(),
    }


def find_faults(report, beta):
    """Why a loss does not train J, a sentence each; [] if it does."""
    target = {"KL(π‖ref)": round(-beta, 8)} if beta else {}
    cause = {1.5: ": it is a sum", 1.3333: ": the baseline includes the answer's own reward"}
    sentences = {
        f"the reward term climbs {formula(report.reward_term)}, not E[r]": report.reward_term != {"E[r]": 1.0},
        f"the KL term climbs {formula(report.kl_term)}, not {formula(target)}": report.kl_term != target,
        "the step goes downhill": report.cosine < 0,
        "the reference is never seen": beta and not report.sees_reference,
        "some words are never trained": report.trained_words < 1,
        "EOS is not always trained": report.trained_eos < 1,
        "pads are trained": report.trained_pads > 0,
        "wider padding changes the step": report.padding_matters,
        "a constant added to all rewards changes the step, so a baseline does, too": report.constant_matters,
        "the step is not linear in the rewards, which are scaled or clipped": not report.reward_is_linear,
        "the batch size changes the step" + cause.get(round(report.batch_growth, 4), ""): report.batch_size_matters,
    }
    return [sentence for sentence, applies in sentences.items() if applies]


@one_line_errors
def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m rlhf_min.oracle", description="What is your loss the gradient of?")
    parser.add_argument("loss", help="package.module:function of (logprobs, ref_logprobs, reward, mask)")
    parser.add_argument("--beta", type=float, default=0.1, help="the weight of the KL that the loss is meant to have")
    options = parser.parse_args(arguments)
    loss = import_function(options.loss.replace(":", "."), remedy="write package.module:function")
    print(examine(loss, options.beta))


if __name__ == "__main__":
    main()
