"""The oracle, on losses whose expected gradient we can derive: right ones, the places of the KL, and mistakes."""

import functools
import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from benchmarks import kl
from rlhf_min.oracle import World, all_answers, all_batches, examine, known_quantities, main, run
from rlhf_min.reinforce import kl_estimate, leave_one_out, policy_gradient_loss, shaped_reward
from rlhf_min.support.errors import UserError

BETA = 0.1
GOAL = "− 0.1 KL(π‖ref)"
CONSTANT = "a constant added to all rewards changes the step, so a baseline does, too"
NONLINEAR = "the step is not linear in the rewards, which are scaled or clipped"
BATCH = "the batch size changes the step"
WORDS, EOS, PADDING = "some words are never trained", "EOS is not always trained", "wider padding changes the step"


def reward_climbs(what):
    return f"the reward term climbs {what}, not E[r]"


def kl_climbs(what):
    return f"the KL term climbs {what}, not {GOAL}"


UNNAMED = [reward_climbs("something without a name"), kl_climbs("something without a name")]


def gradient(scalar, world):
    """∂ scalar / ∂ logits, (D,)."""
    return torch.autograd.grad(scalar, world.logits, retain_graph=True)[0].flatten()


def total(logprobs, mask):
    """(B, T) → (B,), without pads."""
    return logprobs.masked_fill(~mask, 0.0).sum(-1)


def shaped(logprobs, ref, reward, mask, kind="k1", beta=BETA):
    """(B,) the reward with the KL in it, detached."""
    return shaped_reward(reward, kl_estimate(logprobs, ref, mask, kind), beta)


def with_advantage(advantage):
    """A loss −mean [A log π] whose A (B,) is a function of R (B,)."""
    return lambda *batch: policy_gradient_loss(batch[0], advantage(shaped(*batch)), batch[3])


def with_sum(token_sum):
    """A loss −mean [R · f] in which f, a function of the log-probs and the mask, takes the place of Σ_t log π_t."""
    return lambda *batch: -(shaped(*batch) * token_sum(batch[0], batch[3])).mean()


def with_kl_loss(penalty):
    """A loss −mean [r log π] + β mean [k], k a function of logprobs, ref_logprobs and mask."""

    def loss(logprobs, ref, reward, mask):
        return policy_gradient_loss(logprobs, reward, mask) + BETA * penalty(logprobs, ref, mask).mean()

    return loss


right = with_advantage(lambda shaped: shaped)


def per_token(logprobs, ref, reward, mask):
    """(B, T); each token is charged for the KL from itself on only: what came before is a baseline to it."""
    d = (logprobs - ref).detach().masked_fill(~mask, 0.0)  # (B, T)
    to_go = d.flip(-1).cumsum(-1).flip(-1)  # (B, T)
    return -(reward[:, None] - BETA * to_go) * logprobs.masked_fill(~mask, 0.0)


RIGHT = {
    "ours": right,
    "leave-one-out": with_advantage(lambda shaped: leave_one_out(shaped[None])[0]),
    "another answer's reward as the baseline": with_advantage(lambda shaped: shaped - shaped.roll(1)),
    "PPO's ratio, at 1": with_sum(lambda logp, mask: (total(logp, mask) - total(logp, mask).detach()).exp()),
    "a number per answer": lambda *batch: -shaped(*batch) * total(batch[0], batch[3]),
    "a number per token": per_token,
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_losses(name):
    """Six ways to write REINFORCE with the KL in the reward: all climb J, and none has a fault."""
    report = examine(RIGHT[name], BETA)
    assert report.faults == []
    assert (report.reward_term, report.kl_term) == ({"E[r]": 1.0}, {"KL(π‖ref)": -BETA})
    assert report.cosine == pytest.approx(1) == report.length
    assert str(report).endswith("RIGHT: the step climbs J")


def test_another_beta():
    """A β of many digits is no fault."""
    loss = lambda *batch: policy_gradient_loss(batch[0], shaped(*batch, beta=1 / 3), batch[3])
    assert examine(loss, beta=1 / 3).faults == []


FORMS = {  # of benchmarks/kl.py: what the KL term climbs
    "k1 in the reward, detached": {"KL(π‖ref)": -BETA},
    "k2 as a loss": {"KL(π‖ref)": -BETA},
    "k3 as a loss": {"KL(ref‖π)": -BETA},
    "k1 as a loss": {},
    "no KL": {},
    "k3 in the reward, detached": {"KL(π‖ref)": -BETA, "KL(ref‖π)": BETA},
    "k1 in the reward, sign swapped": {"KL(π‖ref)": BETA},
}


@pytest.mark.parametrize("name", FORMS)
def test_places_of_the_kl(name):
    """One line of the loss changed, and the KL term is another gradient; the reward term is not touched."""
    (loss, temperature), climbs = kl.FORMS[name], FORMS[name]
    report = examine(functools.partial(loss, beta=BETA), BETA)
    assert temperature is None
    assert (report.reward_term, report.kl_term) == ({"E[r]": 1.0}, climbs)
    assert report.sees_reference == (name != "no KL")
    assert (report.faults == []) == (climbs == {"KL(π‖ref)": -BETA})


def test_k1_as_a_loss_at_another_temperature():
    """Sampled at T = .7 and scored at 1, k1 as a loss drives the policy away from its sampler s, which is sharper.

    E_s[∇ log π] = −∇KL(s‖π), which is 0 only for s = π. To move away from a sharper policy is to flatten: uphill in
    entropy.
    """
    loss, temperature = kl.FORMS["k1 as a loss, scored at temperature 1"]
    assert temperature == 1.0
    report = examine(functools.partial(loss, beta=BETA), BETA, temperature=0.7)
    assert (report.reward_term, report.kl_term) == ({"E_s[r log π]": 1.0}, {"KL(s‖π)": BETA})
    world = World(temperature=0.7)
    known = known_quantities(world, 0.7)
    away, entropy = (gradient(known[name], world) for name in ("KL(s‖π)", "H(π)"))
    assert torch.cosine_similarity(away, entropy, dim=0) > 0.5


def last_token(mask):
    """(B, T) True on the last token of each answer."""
    return torch.nn.functional.one_hot(mask.sum(-1) - 1, mask.shape[1]).bool()


def log_of_mean(logprobs, mask):
    """(B,) log of the mean probability of the tokens, in place of the mean of the logs."""
    return (logprobs.exp().masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)).log()


def without_eos(logp, mask):
    """(B,) the sum without the last tokens of answers that pads follow, as if EOS, which pads with, were a pad."""
    padded = mask.sum(-1, keepdim=True) < mask.shape[1]  # (B, 1)
    return total(logp, mask & ~(last_token(mask) & padded))


def kl_over_pads(logprobs, ref, reward, mask):
    kl = (logprobs - ref).sum(-1)  # (B,) pads included
    return policy_gradient_loss(logprobs, shaped_reward(reward, kl, BETA), mask)


def mean_over_all_tokens(logprobs, ref, reward, mask):
    advantage = shaped(logprobs, ref, reward, mask)
    return -(advantage * total(logprobs, mask)).sum() / mask.sum()


def divided_by_spread(logprobs, ref, reward, mask):
    advantage = (reward - reward.mean()) / (reward.std() + 1e-4)
    return policy_gradient_loss(logprobs, advantage, mask) + BETA * kl_estimate(logprobs, ref, mask, "k2").mean()


def not_detached(logprobs, ref, reward, mask):
    return -((reward - BETA * kl_estimate(logprobs, ref, mask)) * total(logprobs, mask)).mean()


def without_reference(logprobs, ref, reward, mask):
    return policy_gradient_loss(logprobs, reward - BETA * total(logprobs, mask), mask)


def beta_twice(*batch):
    return right(*batch) + BETA * kl_estimate(batch[0], batch[1], batch[3], "k2").mean()


def squashed_reward(logprobs, ref, reward, mask):
    return right(logprobs, ref, reward.tanh(), mask)


WRONG = {
    "wrong sign": (lambda *batch: -right(*batch),
                   [reward_climbs("− E[r]"), kl_climbs("0.1 KL(π‖ref)"), "the step goes downhill"]),
    "pads trained": (with_sum(lambda logp, mask: logp.sum(-1)), ["pads are trained"]),
    "KL summed over pads": (kl_over_pads,  # log π − log π_ref of a pad is −1.3, and an answer has 5 − length pads
                            [kl_climbs("− 0.1 KL(π‖ref) − 0.13 E[length]")]),
    "last token masked out": (with_sum(lambda logp, mask: total(logp, mask & ~last_token(mask))),
                              [*UNNAMED, WORDS, EOS, CONSTANT]),
    "EOS masked out as a pad": (with_sum(without_eos), [*UNNAMED, EOS, PADDING, CONSTANT]),
    "first token only": (with_sum(lambda logp, mask: logp[:, 0]), [*UNNAMED, WORDS, EOS]),
    "last token only": (with_sum(lambda logp, mask: total(logp, last_token(mask))), [*UNNAMED, WORDS, CONSTANT]),
    "mean over the tokens of an answer": (with_sum(lambda logp, mask: total(logp, mask) / mask.sum(-1)),
                                          [reward_climbs("E[r / length]"), kl_climbs("− 0.1 E[d / length]"), CONSTANT]),
    "mean over the width": (with_sum(lambda logp, mask: total(logp, mask) / mask.shape[1]),
                            [reward_climbs("0.2 E[r]"), kl_climbs("− 0.02 KL(π‖ref)"), PADDING]),
    "mean over the tokens of the batch": (mean_over_all_tokens, [*UNNAMED, CONSTANT, BATCH]),
    "the batch's mean as the baseline": (with_advantage(lambda shaped: shaped - shaped.mean()),
                                         [reward_climbs("0.5 E[r]"),  # over all pairs, 1 − 1/B = ½
                                          kl_climbs("− 0.05 KL(π‖ref)"),
                                          f"{BATCH}: the baseline includes the answer's own reward"]),
    "divided by the spread": (divided_by_spread, [UNNAMED[0], NONLINEAR, BATCH]),
    "k1 as a loss": (with_kl_loss(kl_estimate), [kl_climbs("nothing")]),
    "k2 per token": (with_kl_loss(lambda logp, ref, mask: total((logp - ref) ** 2 / 2, mask)),
                     [kl_climbs("− 0.1 token KL(π‖ref)")]),
    "k3 per token": (with_kl_loss(lambda logp, ref, mask: total((ref - logp).exp() - 1 + logp - ref, mask)),
                     [kl_climbs("− 0.1 token KL(ref‖π)")]),
    "k3 with its sign swapped": (with_kl_loss(lambda logp, ref, mask: kl_estimate(ref, logp, mask, "k3")),
                                 [UNNAMED[1]]),  # E[(e^d − 1) ∇ log π]
    "k2 in the reward": (lambda *batch: policy_gradient_loss(batch[0], shaped(*batch, "k2"), batch[3]),
                         [UNNAMED[1]]),  # E[d² ∇ log π] / 2
    "reward not detached": (not_detached,  # −β log π ∇d is one more term, and E[log π ∇ log π] = −∇H
                            [kl_climbs("− 0.1 KL(π‖ref) + 0.1 H(π)")]),
    "log π in the place of d": (without_reference, [kl_climbs("0.1 H(π)"), "the reference is never seen"]),
    "β twice": (beta_twice, [kl_climbs("− 0.2 KL(π‖ref)")]),
    "sum over the batch": (lambda *batch: right(*batch) * len(batch[2]),
                           [reward_climbs("2 E[r]"), kl_climbs("− 0.2 KL(π‖ref)"), f"{BATCH}: it is a sum"]),
    "π in the place of log π": (with_sum(lambda logp, mask: total(logp, mask).exp()), [*UNNAMED, CONSTANT]),
    "log of the mean probability": (with_sum(log_of_mean), [*UNNAMED, CONSTANT]),
    "ratio to the reference": (lambda *batch: -(shaped(*batch) * total(batch[0] - batch[1], batch[3]).exp()).mean(),
                               [*UNNAMED, CONSTANT]),  # answers are weighed by e^d
    "squashed reward": (squashed_reward, [UNNAMED[0], CONSTANT, NONLINEAR]),
    "log-probs detached": (lambda *batch: right(batch[0].detach(), *batch[1:]),
                           [reward_climbs("nothing"), kl_climbs("nothing"), WORDS, EOS]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_losses(name):
    """Each mistake gets its own sentences, and no other."""
    loss, faults = WRONG[name]
    report = examine(loss, BETA)
    assert report.faults == faults
    assert str(report).endswith("\n    ".join(["\nWRONG:", *faults]))


def test_screen():
    """Each finding stands on its own line, here with numbers that are easy to tell apart."""
    report = examine(with_kl_loss(kl_estimate), BETA)
    report.cosine, report.length, report.variance, report.value, report.value_variance = 0.1, 0.2, 0.3, 0.4, 0.5
    report.trained_words, report.trained_eos, report.trained_pads = 0.25, 0.5, 0.75
    report.batch_size_matters, report.batch_growth = True, 1.5
    lines = [line.split("  ") for line in str(report).splitlines()]
    assert {words[2]: words[-1].strip() for words in lines if len(words) > 3} == {
        "its reward term climbs": "E[r]",
        "its KL term climbs": "nothing",
        "cosine with the gradient": "0.1000",
        "length / that of gradient": "0.2000",
        "variance of a step": "0.3000 per answer, where the gradient has length 1",
        "expectation": "0.4000",
        "variance": "0.5000 per answer",
        "depends on the reference": "yes",
        "words, EOS, pads": "25%, 50%, 75%",
        "wider padding": "no",
        "a constant in all rewards": "no",
        "rewards times 2": "doubles their part",
        "3 answers a batch, not 2": "yes, 1.5000 times as long",
    }


def test_estimators():
    """As estimates of the KL, k1 and k3 have its expectation; `value_variance` is that of a single answer."""
    world = World()
    d = total(world.logprobs - world.ref_logprobs, world.mask).detach()  # (N,)
    for kind in ("k1", "k3"):
        report = examine(lambda logprobs, ref, reward, mask: kl_estimate(logprobs, ref, mask, kind), BETA)  # noqa: B023
        k = d if kind == "k1" else (-d).exp() - 1 + d
        mean = sum(p * x for p, x in zip(world.probability.tolist(), k.tolist()))
        variance = sum(p * (x - mean) ** 2 for p, x in zip(world.probability.tolist(), k.tolist()))
        assert report.value_is == "KL(π‖ref)"
        assert report.value == pytest.approx(mean)
        assert report.value_variance == pytest.approx(variance)
    assert examine(lambda logprobs, ref, reward, mask: kl_estimate(logprobs, ref, mask, "k2")).value_is == ""
    # its gradient is that of the token KLs, its value nothing that has a name
    token_k2 = examine(lambda logprobs, ref, reward, mask: ((logprobs - ref) ** 2 / 2).masked_fill(~mask, 0.0))
    assert token_k2.kl_term == {"token KL(π‖ref)": -1.0} and token_k2.value_is == ""


def test_variance_of_the_step():
    """Without a coupling of answers, B times the variance of a step is the variance of one answer's step."""
    world = World()
    advantage = shaped(world.logprobs, world.ref_logprobs, world.reward, world.mask)
    steps = advantage[:, None] * world.slopes.sum(1)  # (N, D)
    exact = world.probability @ steps  # (D,)
    variance = world.probability @ (steps - exact).square().sum(-1) / exact.square().sum()
    assert examine(right, BETA).variance == pytest.approx(variance.item())


def next_tokens(world):
    """{prefix: {token: (π, π_ref)}} from the world's log-probs, and {answer: (π, r)}."""
    table, answers = defaultdict(dict), {}
    for i, y in enumerate(all_answers(words=1, length=5)):
        answers[(*y,)] = world.logprobs[i, : len(y)].sum().exp().item(), world.reward[i].item()
        for t in range(len(y)):
            pair = world.logprobs[i, t].exp().item(), world.ref_logprobs[i, t].exp().item()
            table[(*y[:t],)][y[t]] = pair
    return table, answers


def test_gradients_by_hand():
    """The gradients of E[r] and of both token KLs are the textbook's, one logit at a time.

    With P(s) the probability of reaching prefix s, V(s) the mean reward behind it and Q(s, v) behind token v:

        ∂E[r]/∂z = P π (Q − V),    ∂KL(π‖ref)/∂z = P π (log π/ref − KL),    ∂KL(ref‖π)/∂z = P (π − ref)
    """
    world = World()
    table, answers = next_tokens(world)
    assert sum(p for p, _ in answers.values()) == pytest.approx(1)
    assert all(sum(p for p, _ in row.values()) == pytest.approx(1) for row in table.values())
    expected = {name: torch.zeros_like(world.logits) for name in ("E[r]", "token KL(π‖ref)", "token KL(ref‖π)")}
    for s, row in table.items():
        reach = sum(p for y, (p, _) in answers.items() if y[: len(s)] == s)
        value = sum(p * r for y, (p, r) in answers.items() if y[: len(s)] == s) / reach
        kl = sum(p * math.log(p / q) for p, q in row.values())
        for v, (p, q) in row.items():
            place = len(s), v
            behind = sum(a * r for y, (a, r) in answers.items() if y[: len(s) + 1] == (*s, v)) / (reach * p)
            expected["E[r]"][place] = reach * p * (behind - value)
            expected["token KL(π‖ref)"][place] = reach * p * (math.log(p / q) - kl)
            expected["token KL(ref‖π)"][place] = reach * (p - q)
    known = known_quantities(world, 1.0)
    for name, by_hand in expected.items():
        torch.testing.assert_close(gradient(known[name], world), by_hand.flatten(), atol=1e-12, rtol=0)
    probability, steps, *_ = run(lambda logprobs, ref, reward, mask: -reward * total(logprobs, mask), world)
    torch.testing.assert_close(probability @ steps, expected["E[r]"].flatten(), atol=1e-12, rtol=0)


def test_no_two_quantities_make_a_third():
    """Any three gradients are linearly independent, so a name of at most two terms is the only one."""
    world = World()
    gradients = {name: gradient(scalar, world) for name, scalar in known_quantities(world, 1.0).items()}
    for names in itertools.combinations(gradients, 3):
        columns = torch.stack([gradients[name] / gradients[name].norm() for name in names], dim=1)  # (D, 3)
        assert torch.linalg.svdvals(columns)[-1] > 1e-3, names


def test_all_batches():
    """With probabilities ¼ and ¾ the four batches of two have 1/16, 3/16, 3/16 and 9/16."""
    batches, probability = all_batches(torch.tensor([0.25, 0.75]), 2)
    assert batches.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert probability.tolist() == [1 / 16, 3 / 16, 3 / 16, 9 / 16]


def test_all_answers():
    """With words 0 and 1, and EOS 2, the seven answers of at most two tokens."""
    assert all_answers(2, 2) == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [2]]


@pytest.mark.parametrize("loss, message", [
    (lambda logprobs, ref, reward, mask: reward / (reward - reward.mean()), "not finite"),
    (lambda logprobs, ref, reward, mask: reward[:, None], "a scalar"),
    (lambda logprobs, ref, reward, mask: 1.0, "a scalar"),
])  # fmt: skip
def test_what_is_no_loss(loss, message):
    """A batch of two equal answers has no spread to divide by; and a loss has one of three shapes."""
    with pytest.raises(UserError, match=message):
        examine(loss)


def test_command(tmp_path, monkeypatch, capsys):
    """The command finds a function in the working directory, and says which function there is not."""
    source = (
        "def loss(logprobs, ref_logprobs, reward, mask):\n    return -(reward * (logprobs * mask).sum(-1)).mean()\n"
    )
    (tmp_path / "their_loss.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    main(["their_loss:loss", "--beta", "0"])
    assert capsys.readouterr().out.endswith("RIGHT: the step climbs J\n")
    main(["their_loss:loss"])
    assert "the reference is never seen" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        main(["their_loss:lost"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: their_loss.lost: no such function; write package.module:function\n"


# TRL's own lines


def fake_trainer(logprobs, **settings):
    """What _compute_loss reads of a trainer of TRL, with the log-probs in the place of a model."""
    scored = logprobs, torch.zeros_like(logprobs), None  # log-probs, entropies, auxiliary loss
    accelerator = SimpleNamespace(reduce=lambda x, **_: x, gather=lambda x: x, num_processes=1)
    defaults = {
        "_get_per_token_logps_and_entropies": lambda *args, **kwargs: scored,
        "accelerator": accelerator,
        "model": SimpleNamespace(training=False),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
    }
    return SimpleNamespace(**defaults | settings)


def trl_inputs(mask, advantages, **more):
    """A batch as _compute_loss reads it; the ids do not matter, as nothing is scored."""
    ids, ones = torch.zeros_like(mask, dtype=torch.long), mask.long()
    prompt = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1]}
    return prompt | {"completion_ids": ids, "completion_mask": ones, "advantages": advantages} | more


def test_trl_rloo():
    """TRL's RLOO loss on its advantages, the leave-one-out of r − β k1, climbs J exactly."""
    trainer = pytest.importorskip("trl.trainer.rloo_trainer").RLOOTrainer

    def loss(logprobs, ref, reward, mask):
        advantages = leave_one_out(shaped(logprobs, ref, reward, mask)[None])[0]
        inputs = trl_inputs(mask, advantages, old_logps=total(logprobs, mask).detach())
        return trainer._compute_loss(fake_trainer(logprobs), None, inputs)

    assert examine(loss, BETA).faults == []


def examine_grpo(loss_type, scale):
    """The Report on TRL's GRPO loss of one prompt, with or without dividing the rewards by their spread."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    settings = {"loss_type": loss_type, "beta": BETA, "importance_sampling_level": "token", "use_vllm": False}
    settings |= {"off_policy_mask_threshold": None, "top_entropy_quantile": 1.0, "max_completion_length": 5}
    settings["args"] = SimpleNamespace(delta=None, use_bias_correction_kl=False)

    def loss(logprobs, ref, reward, mask):
        advantages = (reward - reward.mean()) / (reward.std() + 1e-4 if scale else 1.0)
        inputs = trl_inputs(mask, advantages, ref_per_token_logps=ref, old_per_token_logps=logprobs.detach())
        return trainer._compute_loss(fake_trainer(logprobs, **settings), None, inputs)

    return examine(loss, BETA)


def test_trl_dr_grpo():
    """Dr. GRPO climbs ⅕ (1 − ½) E[r]: it divides by the longest answer's 5 tokens, and its baseline is the mean.

    Its KL is k3 as a loss, per token: it descends KL(π_ref ‖ π) at prefixes that it holds constant.
    """
    faults = [reward_climbs("0.1 E[r]"), kl_climbs("− 0.02 token KL(ref‖π)"), BATCH]
    assert examine_grpo("dr_grpo", scale=False).faults == faults


def test_trl_grpo():
    """GRPO divides by each answer's length, and its baseline does not cancel then: it changes the expected step.

    Over pairs, E[(r_i − r_j) ∇ log π_i / length_i] / 2 = (∇E[r / length] − E[r] ∇E[1 / length]) / 2, E[r] constant.
    """
    world, report = World(), examine_grpo("grpo", scale=False)
    mean = (world.probability @ world.reward).item()
    assert report.reward_term == pytest.approx({"E[1 / length]": -0.5 * mean, "E[r / length]": 0.5})
    assert report.kl_term is None
    assert NONLINEAR not in report.faults
    assert NONLINEAR in examine_grpo("grpo", scale=True).faults
