"""The scripts: their loops against a second implementation of the formulas, and what a run leaves in its folder.

The loops run in float64 on both sides. There rounding does not decide what Adam makes of a gradient that is almost 0.
"""

import importlib
import io
import json
import math
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
import train_reinforce
import train_rm
import train_warp
from rlhf_min import evaluation, pretrain, toy
from rlhf_min.data import encode_pairs, load_pairs
from rlhf_min.lora import read_adapter
from rlhf_min.reward_model import load_judge, load_judges
from rlhf_min.rollout import load_policy, sample
from rlhf_min.support import precision
from rlhf_min.support.errors import UserError, one_line_errors
from rlhf_min.support.models import get_weights, set_weights
from rlhf_min.support.options import parse_options
from rlhf_min.support.rows import read_rows, write_jsonl
from rlhf_min.support.runlog import RunLog

pytestmark = pytest.mark.usefixtures("in_world")
ROOT = Path(__file__).parent.parent
SMALL = "--steps 3 --batch-size 8 --num-eval-prompts 16 --max-length 20 --lr 1e-2".split()
EVALUATE = "--num-prompts 16 --batch-size 8 --max-length 20".split()


def read_metrics(folder):
    """The lines of metrics.jsonl, without what a clock measured."""
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "step_seconds"} for row in rows]


def read_summary(folder):
    return json.loads(Path(folder, "summary.json").read_text())


def load_weights(name):
    """All weights of a policy by name, {name: tensor}."""
    return get_weights(load_policy(str(name), "cpu", 32)[0])


def assert_equal(weights, expected, atol):
    """On average over a tensor: Adam may enlarge the rounding of the one gradient in ten thousand that is almost 0."""
    assert weights.keys() == expected.keys()
    off = {name: (weights[name] - expected[name]).abs().mean().item() for name in expected}
    assert not {name: error for name, error in off.items() if not error <= atol}


# The loops of train_reinforce.py and train_warp.py, once more


HAND = [*SMALL, *"--max-length 16 --lr 1e-3 --seed 7 --beta 0.5 --max-grad-norm 0".split()]


def begin(options_class, flags, out):
    """(options, task, log) as a script's main makes them, in float64, and with a reward model that has opinions."""
    judge = ["--reward-model", toy.ORDINAL_REWARD_MODEL]
    options = parse_options(options_class, [*HAND, *judge, *flags.split(), "--out", str(out)])
    task = evaluation.load_task(options, precision.resolve_device(options))
    task.policy.double()
    task.judges["reward"].model.score.weight.data *= 20
    assert not {prompt.text for prompt in task.prompts} & {prompt.text for prompt in task.eval_prompts}
    return options, task, RunLog(options)


def batches_by_hand(items, size, generator):
    """One random order after another, cut into batches."""
    order = []
    while True:
        if len(order) < size:
            order += torch.randperm(len(items), generator=generator).tolist()
        yield [items[i] for i in order[:size]]
        order = order[size:]


def adam_step(adam, gradients, limit):
    """Clip the gradients to the norm `limit`, step, and return the norm."""
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
    for parameter, gradient in zip(adam.param_groups[0]["params"], gradients):
        parameter.grad = gradient * min(1.0, limit / norm)
    adam.step()
    return norm


def dense(base, theta, options):
    """The weights that a model computes with: θ itself, or W + ΔW, where ΔW = (α/r) B A; GPT-2 has it transposed."""
    if not options.lora_r:
        return theta
    weights = dict(base)
    for module in {name.rpartition("lora_")[0] for name in theta}:
        update = options.lora_alpha / options.lora_r * theta[f"{module}lora_B"] @ theta[f"{module}lora_A"]
        weights[f"{module}weight"] = base[f"{module}weight"] + update.T
    return weights


def answer_logprobs(model, weights, rollout, temperature):
    """log π(y|x) of each answer, (B,). The prompts are equally long, so a causal model needs no mask."""
    count = rollout.mask.shape[1]
    assert rollout.attention_mask[:, :-count].all()
    logits = torch.func.functional_call(model, weights, (rollout.tokens,)).logits[:, -count - 1 : -1]
    logp = (logits / temperature).log_softmax(-1).gather(-1, rollout.tokens[:, -count:, None])[..., 0]
    return torch.where(rollout.mask, logp, 0.0).sum(-1)


def reinforce_by_hand(task, model, start, base, sft, options, generator):
    """(θ, metrics of every step) of T steps of REINFORCE. θ, base and sft are plain tensors, {name: tensor}."""
    o = {"num_generations": 1, "sigma": "off", "baseline": "moving-average", "anchor": "sft", "mu": 0.0}
    o = SimpleNamespace(**o | vars(options), answers=options.batch_size * options.gradient_accumulation_steps)
    theta = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    ema, past, rows, k, limit = dict(start), [], [], o.num_generations, o.max_grad_norm or math.inf
    adam = torch.optim.AdamW(theta.values(), lr=o.lr, weight_decay=0.0)
    for _, few in zip(range(o.steps), batches_by_hand(task.prompts, o.answers // k, generator)):
        batch = [prompt for prompt in few for _ in range(k)]
        uniform = torch.rand(o.answers, o.max_length, generator=generator, dtype=torch.float64)
        set_weights(model, dense(base, theta, o))
        rollout = sample(model, [prompt.tokens for prompt in batch], uniform, o.temperature)
        prompts, rows_of_tokens = [prompt.text for prompt in batch], zip(rollout.completions, rollout.mask)
        answers = [task.tokenizer.decode(row[mask], skip_special_tokens=True) for row, mask in rows_of_tokens]
        reward, sigma = task.judges["reward"](prompts, answers, rollout.ended)

        scored = answer_logprobs(model, dense(base, theta, o), rollout, o.temperature)
        with torch.no_grad():
            kl = scored - answer_logprobs(model, sft, rollout, o.temperature)
            ema_kl = scored - answer_logprobs(model, dense(base, ema, o), rollout, o.temperature)
        anchor_kl = ema_kl if o.anchor == "ema" else kl
        shaped = reward - (sigma if o.sigma == "penalty" else 0) - o.beta * anchor_kl
        b = torch.full_like(shaped, sum(past) / max(1, len(past)))
        if o.baseline == "leave-one-out":
            groups = shaped.view(-1, k).tolist()
            b = shaped.new_tensor([(sum(group) - own) / (k - 1) for group in groups for own in group])
        advantage = (shaped - b) / (1 + (sigma if o.sigma == "advantage" else 0))
        past += shaped.tolist()

        norm = adam_step(adam, torch.autograd.grad(-(advantage * scored).mean(), [*theta.values()]), limit)
        ema = {name: (1 - o.mu) * ema[name] + o.mu * theta[name].detach() for name in ema}

        texts = [prompt + answer for prompt, answer in zip(prompts, answers)]
        gold, fluency = (torch.tensor([judge(text) for text in texts]) for judge in (toy.gold_score, toy.fluency))
        columns = {"reward": reward, "sigma": sigma, "kl": kl, "baseline": b, "advantage": advantage, "gold": gold}
        columns |= {"fluency": fluency} | ({"anchor_kl": anchor_kl} if "mu" in vars(options) else {})
        means = {name: column.double().mean().item() for name, column in columns.items()}
        rows.append({**means, "grad_norm": norm, "clipped": float(norm > limit), "learning_rate": o.lr})
    return {name: tensor.detach() for name, tensor in theta.items()}, rows


def assert_metrics(metrics, expected):
    """Every name of `expected` has its value in every line, and the last step is not trivial."""
    assert len(metrics) == len(expected)
    for row, wanted in zip(metrics, expected):
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert abs(expected[-1]["kl"]) > 0.01 and expected[-1]["sigma"] > 0.1 and abs(expected[-1]["advantage"]) < 10


REINFORCE_ARMS = ["", "--max-grad-norm 0.5 --temperature 1.3", "--baseline leave-one-out --num-generations 4",
                  "--sigma advantage --gradient-accumulation-steps 2", "--sigma penalty --num-generations 2",
                  "--lora-r 2"]  # fmt: skip


@pytest.mark.parametrize("arm", REINFORCE_ARMS)
def test_the_loop_of_reinforce_is_the_formula(tmp_path, arm):
    """The weights and every metric of a run are those of a second implementation, for every option of the advantage."""
    options, task, log = begin(train_reinforce.ReinforceOptions, arm, tmp_path / "run")
    model = load_policy(toy.POLICY, "cpu", 16)[0].double()
    sft, start, generator = get_weights(model), get_weights(task.policy), torch.Generator().manual_seed(7)
    theta, rows = reinforce_by_hand(task, model, start, sft, sft, options, generator)
    with log.running():
        train_reinforce.train_policy(task, train_reinforce.dense_weights(task.policy), options, log)
    assert_metrics(read_metrics(log.folder), rows)
    assert_equal(get_weights(task.policy), theta, atol=1e-6)
    assert all(row["clipped"] == float("max-grad-norm" in arm) for row in rows) and rows[0]["kl"] == 0.0


def slerp_by_hand(init, policies, options):
    """θ_slerp: one angle by block, tensor or model; the m-th task vector enters with λ = 1/m."""
    groups, merged = {}, {}
    for name in init:
        block = ".".join(name.split(".")[:3]) if ".h." in name else name.rpartition(".")[0]
        groups.setdefault({"block": block, "tensor": name, "model": ""}[options.merge_by], []).append(name)
    for names in groups.values():
        deltas = [torch.cat([(theta[name] - init[name]).flatten() for name in names]).double() for theta in policies]
        delta = deltas[0]
        for m, other in enumerate(deltas[1:], 2):
            omega = torch.arccos((delta @ other) / delta.norm() / other.norm())
            first, second = torch.sin((1 - 1 / m) * omega), torch.sin(omega / m)
            slerp = (first * delta + second * other) / torch.sin(omega)
            delta = slerp if options.merge == "slerp" else (1 - 1 / m) * delta + other / m
        for name, part in zip(names, delta.split([init[name].numel() for name in names])):
            merged[name] = init[name] + part.view_as(init[name]).to(init[name].dtype)
    return merged


def warp_by_hand(task, options):
    """(θ_sft, θ_slerp, θ_init, {name: θ^m}, metrics) of Algorithm 1."""
    model = load_policy(toy.POLICY, "cpu", 16)[0].double()
    sft = base = get_weights(model)
    adapted = [name.removesuffix(".lora_A") for name in get_weights(task.policy) if name.endswith(".lora_A")]
    kept, rows = {}, []
    for i in range(1, options.iterations + 1):
        policies = []
        for m in range(1, options.runs + 1):
            generator = torch.Generator().manual_seed(options.seed * 1_000_003 + i * 1_009 + m)
            start = {}
            for name in adapted:  # A ~ U(−1/√in, 1/√in) and B = 0, anew for every run
                n_in, n_out = base[f"{name}.weight"].shape
                uniform = torch.rand(options.lora_r, n_in, generator=generator).double()
                start[f"{name}.lora_A"] = (2 * uniform - 1) / math.sqrt(n_in)
                start[f"{name}.lora_B"] = torch.zeros(n_out, options.lora_r, dtype=torch.float64)
            theta, more = reinforce_by_hand(task, model, start or base, base, sft, options, generator)
            policies.append(dense(base, theta, options))
            kept[f"iteration-{i}-run-{m}"] = policies[-1]
            rows += [{"iteration": i, "run": m, "step": t, **row} for t, row in enumerate(more, 1)]
        trained = [f"{name}.weight" for name in adapted] or list(base)
        merged = slerp_by_hand({name: base[name] for name in trained}, policies, options)
        base = base | {name: (1 - options.eta) * base[name] + options.eta * merged[name] for name in trained}
    only = lambda weights: {name: weights[name] for name in trained}
    return only(sft), merged, only(base), {name: only(theta) for name, theta in kept.items()}, rows


WARP_ARMS = ["", "--merge linear --anchor sft --gradient-accumulation-steps 2", "--lora-r 2 --merge-by model",
             "--runs 3 --iterations 1 --steps 3 --merge-by tensor --max-grad-norm 0.5"]  # fmt: skip


@pytest.mark.parametrize("arm", WARP_ARMS)
def test_the_loops_of_warp_are_algorithm_1(tmp_path, arm):
    """Every θ^m, θ_slerp, θ_init and metric is that of a second implementation, for every option."""
    flags = f"--steps 2 --mu 0.3 --eta 0.3 --keep-runs {arm}"
    options, task, log = begin(train_warp.WarpOptions, flags, tmp_path / "run")
    *expected, expected_kept, rows = warp_by_hand(task, options)
    with log.running():
        *found, kept, geometry = train_warp.train_warp(task, options, log)
    assert_metrics(read_metrics(log.folder), rows)
    assert kept.keys() == expected_kept.keys() and len(geometry) == options.iterations
    for weights, wanted in zip([*found, *kept.values()], [*expected, *expected_kept.values()]):
        assert_equal(weights, wanted, atol=1e-6)
    for row in rows:  # the anchor begins anew in every run, and the KL to θ_sft is never forgotten
        first, ema = row["step"] == 1, options.anchor == "ema"
        assert (row["anchor_kl"] == 0.0) == (first and (ema or row["iteration"] == 1))
        assert (row["kl"] == 0.0) == (first and row["iteration"] == 1)
        assert (row["baseline"] == 0.0) == first


# The loop of train_rm.py, once more


def pair_loss_by_hand(chosen, rejected, margins, options):
    """(loss, metrics) of logits (B, K) × 2."""
    if options.head == "scalar":
        reward_w, reward_l = chosen[:, 0], rejected[:, 0]
        loss, middle = torch.log1p(torch.exp(-(reward_w - reward_l - margins))), 0
    else:
        p_w, p_l, ratings = chosen.softmax(-1), rejected.softmax(-1), torch.arange(1.0, 11.0, dtype=torch.float64)
        reward_w, reward_l, middle = p_w @ ratings, p_l @ ratings, 11
        tie = 0.5 if options.ties == "half" else 0.0
        wins = (ratings[:, None] > ratings) + tie * torch.eye(10)
        loss = -torch.einsum("bi,bj,ij->b", p_w, p_l, wins.double()).log()
    loss = (loss + options.center_coefficient * (reward_w + reward_l - middle) ** 2).mean()
    accuracy, margin = (reward_w > reward_l).double().mean().item(), (reward_w - reward_l).mean().item()
    mean = (reward_w + reward_l).mean().item() / 2
    return loss, {"loss": loss.item(), "accuracy": accuracy, "margin": margin, "mean_reward": mean}


def train_rm_by_hand(model, train_rows, eval_rows, options):
    """(weights, validation, metrics) of train_rm.py. The model sees nothing behind a token."""

    def logits(rows, side):
        last = [len(row[side]) - 1 for row in rows]
        tokens = torch.tensor([row[side] + [0] * (max(last) + 1 - len(row[side])) for row in rows])
        return model.score(model.base_model(tokens).last_hidden_state[range(len(rows)), last])

    def loss_of(rows):
        margins = torch.tensor([row[2] or 0.0 for row in rows], dtype=torch.float64) if options.margin else 0.0
        return pair_loss_by_hand(logits(rows, 0), logits(rows, 1), margins, options)

    lines, validations, parts = [], [], options.gradient_accumulation_steps
    batches = batches_by_hand(train_rows, options.batch_size, torch.Generator().manual_seed(options.seed))
    adam = torch.optim.AdamW(model.parameters(), weight_decay=options.weight_decay)
    steps = options.epochs * len(train_rows) // (options.batch_size * parts)
    for step in range(1, steps + 1):
        losses = [loss_of(next(batches)) for _ in range(parts)]
        line = {name: sum(metrics[name] for _, metrics in losses) / parts for name in losses[0][1]}
        gradients = torch.autograd.grad(sum(loss for loss, _ in losses) / parts, [*model.parameters()])
        warm, rest = step / (options.warmup_steps + 1), (steps - step + 1) / (steps - options.warmup_steps)
        adam.param_groups[0]["lr"] = rate = options.lr * min(warm, rest)
        lines.append({**line, "grad_norm": adam_step(adam, gradients, 1.0), "learning_rate": rate})
        if step % options.eval_every == 0 or step == steps:
            with torch.no_grad():
                validation = {f"eval_{name}": value for name, value in loss_of(eval_rows)[1].items()}
            lines[-1] |= validation
            validations.append((validation, get_weights(model)))
    best = min(validations, key=lambda item: item[0]["eval_loss"])
    assert (best is validations[-1]) == options.margin  # so that `best`, `last` and the first can be told apart
    validation, weights = best if options.keep == "best" else validations[-1]
    return weights, validation, lines


RM_ARMS = ["--margin --gradient-accumulation-steps 2 --center-coefficient 0.1",
           "--head ordinal --ties half --weight-decay 0.1",
           "--head ordinal --keep last --center-coefficient 0"]  # fmt: skip


@pytest.mark.parametrize("arm", RM_ARMS)
def test_the_loop_of_train_rm_is_the_formula(tmp_path, arm):
    """Weights and metrics are those of a second implementation: accumulation, schedule, clipping, what --keep says."""
    rows = [json.loads(line) for line in Path(toy.TRAIN_PAIRS).read_text().splitlines()]
    rows = [row | {"margin": i % 3 / 2} for i, row in enumerate(rows[:34])]
    right = [row | {"chosen": row["chosen"] + " "} for row in rows]  # no copies, but almost
    wrong = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in right]
    write_jsonl("loop.jsonl", rows)
    write_jsonl("loop_eval.jsonl", right if "--margin" in arm else wrong)  # validation gets better, or worse
    flags = f"{arm} --batch-size 8 --epochs 2 --lr 5e-3 --warmup-steps 2 --eval-every 3 --out {tmp_path}/run"
    data = ["--data", "loop.jsonl", "--eval-data", "loop_eval.jsonl"]
    options = parse_options(train_rm.RewardModelOptions, [*data, *flags.split()])
    device, log = precision.resolve_device(options), RunLog(options)
    (model, tokenizer), (other, _) = train_rm.load_base(options, device), train_rm.load_base(options, device)
    for part in (model, other):
        part.score.weight.data *= 5  # so that the two answers of a pair do not cancel
    train_rows, eval_rows, _ = train_rm.load_rows(options, tokenizer, 64)
    weights, expected, lines = train_rm_by_hand(other.double(), train_rows, eval_rows, options)
    with log.running():
        validation = train_rm.train(model.double(), tokenizer, train_rows, eval_rows, options, log)
    assert validation == pytest.approx(expected, rel=1e-3, abs=1e-4)
    for row, line in zip(read_metrics(log.folder), lines, strict=True):
        assert row.keys() - {"step", "clipped"} == line.keys()
        assert {name: row[name] for name in line} == pytest.approx(line, rel=1e-3, abs=1e-4)
    assert_equal(get_weights(model), weights, atol=5e-5)
    assert model.training  # validation has turned dropout off, and on again
    tie = train_rm.pair_loss(torch.zeros(8, 10), torch.zeros(8, 10), train_rows[:8], train_rm.RewardModelOptions())
    assert tie[1]["accuracy"] == 0  # a tie is an error


def test_held_out_pairs_are_none_that_are_trained_on(tmp_path):
    """A tenth of the pairs, rounded up, is held out, and each of the rest is trained on; --eval-data loses copies."""
    pairs = [{"prompt": "", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(95)]
    write_jsonl(tmp_path / "pairs.jsonl", [*pairs, {"prompt": "", "chosen": "same", "rejected": "same"}])
    options = parse_options(train_rm.RewardModelOptions, ["--data", str(tmp_path / "pairs.jsonl")])
    _, tokenizer = train_rm.load_base(options, "cpu")
    rows, eval_rows, dropped = train_rm.load_rows(options, tokenizer, 64)
    texts = [tokenizer.decode(row[0], skip_special_tokens=True) for row in [*rows, *eval_rows]]
    assert (len(rows), len(eval_rows), dropped) == (85, 10, "1 identical")
    assert sorted(texts) == sorted(pair["chosen"] for pair in pairs) != texts
    opposite = {"prompt": "", "chosen": pairs[50]["rejected"], "rejected": pairs[50]["chosen"]}
    others = [pair | {"chosen": "new"} for pair in pairs[:50]]
    write_jsonl(tmp_path / "eval.jsonl", [*pairs[:39], opposite, *others])
    options.eval_data = str(tmp_path / "eval.jsonl")
    rows, eval_rows, dropped = train_rm.load_rows(options, tokenizer, 64)
    assert (len(rows), len(eval_rows)) == (95, 50) and "40 of --eval-data that are copies or in --data" in dropped
    for name in (options.data, options.eval_data):
        write_jsonl(name, [{"better_text": row.pop("chosen"), **row} for row in read_rows(name)])
    options.columns = ["chosen=better_text"]
    assert train_rm.load_rows(options, tokenizer, 64) == (rows, eval_rows, dropped)


# What a run leaves in its folder


def session_run(script, flags):
    """A fixture: the folder of one run in the world, for all tests of this file."""

    @pytest.fixture(scope="session")
    def folder(world):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(world)
            patch.setattr("rlhf_min.support.plots.draw", lambda *args: None)
            out = f"runs/{script.__name__}-{re.sub(r'[^a-z0-9]+', '-', flags)}"
            script.main([*(SMALL if script is not train_rm else []), *flags.split(), "--out", out])
        return world / out

    return folder


warp_run = session_run(train_warp, "--eta 0.3 --keep-runs")
lora_warp_run = session_run(train_warp, "--steps 2 --lora-r 2")
reinforce_run = session_run(train_reinforce, "")
lora_reinforce_run = session_run(train_reinforce, "--lora-r 2")
lora_reward_model = session_run(train_rm, "--head ordinal --lora-r 2 --lora-dropout 0.1 --lr 1e-2 --accept-weak")


def assert_evaluated(folder, *rows):
    """Each (row of the summary, policy's folder, answers or None) is what judging that folder anew gives."""
    options = evaluate.run_options(folder)
    judges = load_judges([f"reward={toy.REWARD_MODEL}", *toy.JUDGES], torch.device("cpu"))
    reference, tokenizer = load_policy(toy.POLICY, "cpu", 20)
    _, prompts = evaluation.prompts_of(options, tokenizer)
    for saved, name, answers in rows:
        policy = load_policy(str(name), "cpu", 20)[0]
        columns = evaluation.judge_policy(policy, tokenizer, prompts, judges, options, reference)
        row = evaluation.summarise(columns, judges)
        assert {column: saved[column] for column in row} == pytest.approx(row, abs=1e-4)
        assert answers in (columns["completion"][:3], None)


def test_warp_saves_and_evaluates_what_it_found(warp_run):
    """merged/ and model/ follow from the θ^m: slerp, (1−η) θ_init + η θ_slerp, and once more. The rows are theirs."""
    options, sft = evaluate.run_options(warp_run), load_weights(toy.POLICY)
    init = sft
    for i in (1, 2):
        merged = slerp_by_hand(init, [load_weights(warp_run / f"iteration-{i}-run-{m}") for m in (1, 2)], options)
        init = {name: 0.7 * init[name] + 0.3 * merged[name] for name in init}
    assert_equal(load_weights(warp_run / "merged"), merged, atol=1e-5)
    assert_equal(load_weights(warp_run / "model"), init, atol=1e-5)
    assert max((init[name] - sft[name]).abs().max() for name in sft) > 1e-2
    summary = read_summary(warp_run)
    before, after = ([sample[key] for sample in summary["samples"]] for key in ("before", "after"))
    front, model = summary["front"], summary["model"]
    assert [row["eta"] for row in front] == [0, 0.25, 0.5, 0.75, 1] and summary["mu_T"] == pytest.approx(0.03)
    assert front[0]["kl"] == front[0]["kl_se"] == 0.0 < model["kl"]
    rows = (front[0], toy.POLICY, before), (front[-1], warp_run / "merged", after), (model, warp_run, None)
    assert_evaluated(warp_run, *rows)
    position = [(row["iteration"], row["run"], row["step"]) for row in read_metrics(warp_run)]
    assert position == [(i, m, t) for i in (1, 2) for m in (1, 2) for t in (1, 2, 3)]


@pytest.mark.parametrize("name", ["reinforce_run", "lora_reinforce_run"])
def test_reinforce_saves_and_evaluates_what_it_found(request, name):
    """`before` is θ_sft, at a KL of exactly 0, and `after` is the policy in model/ and, with LoRA, in adapter/."""
    folder, lora = request.getfixturevalue(name), name.startswith("lora")
    base, model, summary = load_weights(toy.POLICY), load_weights(folder), read_summary(folder)
    before, after = ([sample[key] for sample in summary["samples"]] for key in ("before", "after"))
    assert (summary["before"]["kl"], summary["before"]["kl_se"]) == (0.0, 0.0) and summary["after"]["kl"] > 1e-2
    rows = (summary["before"], toy.POLICY, before), (summary["after"], folder, after)
    assert_evaluated(folder, *rows)
    for key in base:
        assert model[key].equal(base[key]) == (lora and not key.endswith("attn.c_attn.weight")), key
    assert (folder / "adapter").exists() == lora
    if lora:
        assert_equal(load_weights(folder / "adapter"), model, atol=1e-7)


def test_warp_saves_one_adapter_of_all_runs(lora_warp_run):
    """I·M adapters of rank r add up to one of rank I·M·r = 8, which gives the dense weights of the run."""
    base = load_weights(toy.POLICY)
    for name in ("model", "merged"):
        found, adapted = load_weights(lora_warp_run / name), load_weights(lora_warp_run / f"{name}_adapter")
        assert read_adapter(lora_warp_run / f"{name}_adapter")[0]["r"] == 8
        for key in base:
            torch.testing.assert_close(adapted[key], found[key], atol=1e-5, rtol=0)
            if key.endswith("c_attn.weight"):
                singular_values = torch.linalg.svdvals((found[key] - base[key]).double())
                assert singular_values[8:].max() < 1e-5 < 1e-3 < singular_values[4]  # more than one iteration's rank
            else:
                assert found[key].equal(base[key])  # neither trained nor merged


ONE_RUN = {train_reinforce: [], train_warp: ["--iterations", "1", "--runs", "1"]}


@pytest.mark.parametrize("script, name", [(train_reinforce, "reinforce_run"), (train_warp, "warp_run")])
def test_a_run_repeats_with_its_seed(request, capsys, script, name):
    """The same seed repeats every figure. Another one samples otherwise, but evaluates on the same prompts."""
    metrics, prompts = read_metrics(request.getfixturevalue(name)), []
    for seed in ("42", "1"):
        out = f"runs/{name}-{seed}"
        script.main([*SMALL, *ONE_RUN[script], "--seed", seed, "--out", out])
        assert (read_metrics(out) == metrics[:3]) == (seed == "42")
        prompts.append([sample["prompt"] for sample in read_summary(out)["samples"]])
    assert prompts[0] == prompts[1]
    assert len({row["reward"] for row in metrics}) == len(metrics)  # every run sees other prompts and numbers
    table, summary = capsys.readouterr().out, read_summary(out)
    row = summary.get("model") or summary["after"]
    assert any(f"| {row['reward']:.3f} ±" in line and "| model/ |" in line for line in table.splitlines())
    assert sorted(path.name for path in Path(out).iterdir() if path.is_dir()) in (["model"], ["merged", "model"])


@pytest.mark.parametrize("script", ONE_RUN)
def test_a_skipped_step_leaves_everything_alone(monkeypatch, tmp_path, script):
    """In float16 an overflow in step 2 moves neither the weights nor EMA and baseline of a loop."""

    class OverflowingOptimizer(precision.Optimizer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)  # the default overflows by itself at first
            self.taken = 0

        def step(self):
            self.taken += 1
            if self.taken == 2:
                self.parameters[0].grad.fill_(math.inf)
            return super().step()

    monkeypatch.setattr(script, "Optimizer", OverflowingOptimizer)
    monkeypatch.setattr(script, "uniform_numbers", lambda count, length, _: torch.full((count, length), 0.6).double())
    monkeypatch.setattr(script, "Batches", lambda prompts, count, generator: iter(lambda: prompts[:count], None))
    flags = [*SMALL, *ONE_RUN[script], "--precision", "fp16", "--save-every", "0", "--out", str(tmp_path / "run")]
    script.main(flags)
    first, second, third = read_metrics(tmp_path / "run")
    assert second["grad_norm"] is None and first["baseline"] == 0.0 != second["baseline"]  # JSON has no inf
    same = ["reward", "kl", "baseline", "advantage", *(["anchor_kl"] if script is train_warp else [])]
    assert [second[name] for name in same] == [third[name] for name in same]  # the same prompts, numbers and weights
    assert first["kl"] != second["kl"]


def test_evaluation_uses_no_prompt_of_any_training(reinforce_run):
    """What a named run, or the policy it began with, was trained on is left out, for every policy of the table."""
    options = parse_options(evaluate.EvaluateOptions, ["--num-prompts", "50", "--policies", toy.POLICY, "--seed", "9"])
    tokenizer = load_policy(toy.POLICY, "cpu", 20)[1]
    half = evaluate.draw_prompts([toy.POLICY], tokenizer, options)  # those that would be drawn first
    write_jsonl("half.jsonl", [{"prompt": prompt.text} for prompt in half])
    settings = {"prompts": "half.jsonl", "eval_prompts": toy.PROMPTS}, {"policy": "runs/half", "num_eval_prompts": 60}
    for name, changed in zip(("runs/half", "runs/on-half"), settings):
        shutil.copytree(reinforce_run, name)
        record = json.loads((reinforce_run / "run.json").read_text())
        record["options"] |= changed | {"seed": 5}
        del record["options"]["columns"]  # as in runs that are older than this option
        Path(name, "run.json").write_text(json.dumps(record))
    for names in (["runs/half"], [toy.POLICY, "runs/half/model"]):
        drawn = evaluate.draw_prompts(names, tokenizer, options)
        assert len(drawn) == 50 and not {prompt.text for prompt in drawn} & {prompt.text for prompt in half}
    with pytest.raises(UserError, match="only 10 distinct prompts that no policy was trained on"):
        evaluate.draw_prompts(["runs/on-half"], tokenizer, options)  # 40 of the 100 more
    with pytest.raises(UserError, match="runs/half was trained with --prompt-tokens 10; give the same"):
        evaluate.draw_prompts(["runs/half"], tokenizer, replace(options, prompt_tokens=9))
    with pytest.raises(UserError, match="not the embedded world's; name --judges"):
        parse_options(evaluate.EvaluateOptions, ["--policies", toy.POLICY, "--prompts", "half.jsonl"])
    evaluate.main(["--policies", toy.POLICY, "runs/half", *EVALUATE, "--out", "runs/by-half"])
    _, held_out = evaluation.prompts_of(evaluate.run_options(str(reinforce_run)), tokenizer)
    options.num_prompts = 16
    assert evaluate.draw_prompts([str(reinforce_run)], tokenizer, options) == held_out


def test_evaluate_compares_with_the_first(reinforce_run, lora_reinforce_run):
    """A policy against itself has difference 0, win rate ½ and KL 0. The other rows are those of their runs."""
    policies = [toy.POLICY, toy.POLICY, str(reinforce_run), str(lora_reinforce_run / "adapter")]
    evaluate.main(["--policies", *policies, *EVALUATE, "--out", "runs/compared"])
    first, again, *trained = read_summary("runs/compared")["rows"]
    samples, before_and_after = read_summary("runs/compared")["samples"], read_summary(reinforce_run)["samples"]
    assert len(samples) == 10 and [*samples[0]] == ["prompt", *dict.fromkeys(policies)]
    assert [[row["prompt"], row[toy.POLICY], row[str(reinforce_run)]] for row in samples[:3]] == [
        [row["prompt"], row["before"], row["after"]] for row in before_and_after
    ]
    assert again["reward_delta"] == 0 and again["reward_win_rate"] == 0.5 and again["kl"] == 0
    assert "reward_delta" not in first and first["gold_z"] == 0
    for row, folder in zip(trained, (reinforce_run, lora_reinforce_run)):
        after = read_summary(folder)["after"]
        assert all(row[name] == pytest.approx(after[name], abs=1e-4) for name in after.keys() - {"eta"})
        assert row["reward_delta_low"] <= row["reward_delta"] <= row["reward_delta_high"]
        assert row["reward_delta"] == pytest.approx(after["reward"] - first["reward"], abs=1e-4)
        assert row["reward_z"] == pytest.approx(row["reward_delta"] / (first["reward_se"] * math.sqrt(16)), rel=1e-2)
    assert f"| {reinforce_run} |" in Path("runs/compared/table.md").read_text()


def test_evaluate_compares_at_its_own_temperature_and_says_so(reinforce_run, capsys):
    """Another temperature makes another policy, and shorter answers another task; both are said, and nothing else."""
    for flags, said in {"": "", "--temperature 1": "trained with --temperature 0.7, and is judged with 1.0\n"}.items():
        out = f"runs/at{flags[-1:]}"
        evaluate.main(["--policies", toy.POLICY, str(reinforce_run), *EVALUATE, *flags.split(), "--out", out])
        error = capsys.readouterr().err
        assert error.endswith(said) and error.count("was trained with") == bool(said)


def test_evaluate_shows_the_fronts_of_runs(warp_run, lora_warp_run):
    """--front puts the fronts that the runs have written down into one table."""
    runs = [str(warp_run), str(lora_warp_run)]
    evaluate.main(["--front", *runs, "--out", "runs/fronts"])
    assert read_summary("runs/fronts")["rows"] == [{"run": r, **row} for r in runs for row in read_summary(r)["front"]]


def test_a_reward_model_with_adapters_is_saved_whole(lora_reward_model):
    """model/ and adapter/, head included, score as what was validated; all but adapters and head is the base's."""
    options = train_rm.RewardModelOptions(head="ordinal", precision="fp32")
    pairs, summary, logits = load_pairs(toy.EVAL_PAIRS)[0], read_summary(lora_reward_model), []
    for name in ("model", "adapter"):
        judge = load_judge(str(lora_reward_model / name), "cpu")
        rows, _ = encode_pairs(pairs, judge.tokenizer, 64)
        metrics = train_rm.evaluate_pairs(judge.model, rows, judge.tokenizer, options)
        assert metrics == pytest.approx({key: summary[key] for key in metrics}, abs=1e-5)
        logits.append(judge.logits([row[0] for row in rows]))
        assert judge.model.config.id2label == {i: str(i + 1) for i in range(10)}
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
    assert logits[0].std(0).min() > 1e-3
    base, model = load_weights(toy.POLICY), dict(judge.model.named_parameters())
    for name in set(model) - {"score.weight"}:
        assert model[name].equal(base[name]) != name.endswith("attn.c_attn.weight"), name


def test_a_reward_model_that_learnt_nothing_is_not_saved(tmp_path, capsys):
    """An accuracy not above chance by 3 standard errors ends in one line, without a model/, unless it is accepted."""
    sign = torch.randint(2, (120,), generator=torch.Generator().manual_seed(1)).tolist()
    answers = [(f"film {i}", f"film {i}!") for i in range(120)]
    write_jsonl("weak.jsonl", [{"chosen": pair[s], "rejected": pair[1 - s]} for pair, s in zip(answers, sign)])
    flags = ["--data", "weak.jsonl", "--epochs", "1", "--eval-fraction", "0.5", "--out"]
    with pytest.raises(SystemExit, match="2"):
        train_rm.main([*flags, str(tmp_path / "weak")])
    error = capsys.readouterr().err
    assert "is not above 0.694, chance + 3 standard errors" in error and "--accept-weak" in error
    assert not (tmp_path / "weak/model").exists() and train_rm.threshold([0] * 100) == 0.65
    train_rm.main([*flags, str(tmp_path / "accepted"), "--accept-weak"])
    assert (tmp_path / "accepted/model/model.safetensors").exists()


def test_policies_at_one_kl(reinforce_run):
    """--match-kl goes back from the policy to the first one until the KL is the wanted one; the first has KL 0."""
    policies = ["--policies", toy.POLICY, str(reinforce_run)]
    evaluate.main([*policies, *EVALUATE, "--out", "runs/ends"])
    end = read_summary("runs/ends")["rows"][1]
    evaluate.main([*policies, *EVALUATE, "--match-kl", str(end["kl"] / 4), "--out", "runs/matched"])
    first, matched = read_summary("runs/matched")["rows"]
    assert first["kl"] == 0 and matched["kl"] == pytest.approx(end["kl"] / 4, rel=0.1)
    assert first["eta"] == 1 > matched["eta"] > 0 and matched["reward"] != end["reward"]


def test_pretraining_learns_from_the_texts_of_the_world(monkeypatch, tmp_path):
    """On a fresh machine, too, the README's command finds them, and the loss falls."""
    monkeypatch.chdir(tmp_path)
    write = toy.write_world
    monkeypatch.setattr(toy, "write_world", lambda to: write(to, reviews=100, train_pairs=4, eval_pairs=4, prompts=4))
    pretrain.main("--epochs 4 --batch-size 8 --width 32 --layers 1 --out run".split())
    loss = [row["loss"] for row in read_metrics("run")]
    assert loss[-1] < 0.7 * loss[0] and Path("run/model").is_dir()


@pytest.mark.parametrize("script", [train_reinforce, train_warp])
def test_evaluation_while_it_trains_changes_nothing(in_world, tmp_path, script):
    """--eval-every writes the held-out scores and three answers into metrics.jsonl; the last ones are the table's, or
    those with the best r − β KL."""
    flags = "--steps 4 --batch-size 4 --num-eval-prompts 6 --max-length 16 --lr 1e-3 --lora-r 2".split()
    flags += [*ONE_RUN[script], "--out"]
    script.main([*flags, str(tmp_path / "plain")])
    script.main([*flags, str(tmp_path / "watched"), "--eval-every", "2", "--gradient-checkpointing"])
    name = "model/model.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "watched" / name).read_bytes()
    plain, rows = read_metrics(tmp_path / "plain"), read_metrics(tmp_path / "watched")
    for line, row in zip(plain, rows, strict=True):
        assert {**row, "step_seconds": 0}.items() >= {**line, "step_seconds": 0}.items()
        assert ("eval_kl" in row) == (row["step"] % 2 == 0)
    samples = rows[-1]["samples"]
    assert len(samples) == 3 and {*samples[0]} == {"prompt", "completion"}
    if script is train_reinforce:
        script.main([*flags, str(tmp_path / "best"), "--eval-every", "1", "--keep", "best", "--beta", "100"])
        best = max(read_metrics(tmp_path / "best"), key=lambda row: row["eval_reward"] - 100 * row["eval_kl"])
        assert best["step"] < 4  # so that `best` and the last can be told apart
        for name, row in {"watched": rows[-1], "best": best}.items():
            summary = read_summary(tmp_path / name)
            assert summary["step"] == row["step"]
            for key in ("reward", "gold", "kl"):
                assert row[f"eval_{key}"] == pytest.approx(summary["after"][key], abs=1e-5)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_numbers_go_to_a_reporter(in_world, tmp_path, monkeypatch, name):
    """Every number of a step, counted over the runs; a package that is missing is named before anything is written."""
    logged = []
    writer = SimpleNamespace(add_scalar=lambda key, value, step: logged.append((step, {key: value})))
    wandb = SimpleNamespace(init=lambda **_: None, log=lambda metrics, step: logged.append((step, metrics)))
    fakes = {"torch.utils.tensorboard": SimpleNamespace(SummaryWriter=lambda folder: writer), "wandb": wandb}
    for module, fake in fakes.items():
        monkeypatch.setitem(sys.modules, module, fake)
    flags = "--iterations 1 --steps 2 --batch-size 4 --num-eval-prompts 4 --max-length 14 --eval-every 2".split()
    flags += ["--out", str(tmp_path / "run"), "--report-to", name]
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(SystemExit, match="2"):
        train_warp.main(flags)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda module: module)
    train_warp.main(flags)
    rows = read_metrics(tmp_path / "run")
    for i, row in enumerate(rows, 1):
        found = {key: value for step, part in logged if step == i for key, value in part.items()}
        assert found.items() >= {"reward": row["reward"], "kl": row["kl"]}.items() and "samples" not in found
    assert len(rows) == 4


def test_every_model_of_the_world_that_is_named_is_made(monkeypatch, tmp_path):
    """A name makes what it needs, unless it is there: the texts, and the run of a model; another name makes nothing."""
    made, resumed = [], "reward_model --resume"
    monkeypatch.chdir(tmp_path)
    Path(toy.POLICY).mkdir(parents=True)
    monkeypatch.setattr(toy, "write_world", lambda folder: made.append("texts"))
    for module in (pretrain, train_rm):
        monkeypatch.setattr(module, "main", lambda flags: made.append(" ".join([Path(flags[1]).name, *flags[2:]])))
    for names, wanted in (
        (["owner/name", "pairs.jsonl"], []),
        ([toy.PROMPTS], ["texts"]),
        ([toy.REWARD_MODEL], ["texts", resumed]),  # whose main makes the policy
        ([toy.ORDINAL_REWARD_MODEL, toy.POLICY], ["texts", "policy --resume", f"ordinal_{resumed} --head ordinal"]),
        ([toy.POLICY], []),
    ):
        made.clear()
        train_rm.prepare_world(names)
        assert made == wanted
        "policy --resume" in made and Path(toy.POLICY, "summary.json").touch()
    Path(toy.REWARD_MODEL).mkdir()  # an interrupted run
    monkeypatch.setattr(train_rm.parallel, "world_size", lambda: 2)
    train_rm.prepare_world([toy.POLICY])
    with pytest.raises(UserError, match="start this command without torchrun first"):
        train_rm.prepare_world([toy.POLICY, toy.REWARD_MODEL])


def test_a_terminal_without_greek_does_not_end_a_run(monkeypatch):
    """What cannot be printed is replaced by a question mark."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr("sys.stdout", out)
    one_line_errors(lambda: print("(1−η) θ_sft", flush=True))()
    assert out.buffer.getvalue() == b"(1??) ?_sft\n"


# The documents


DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))]
PROGRAMS = sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("benchmarks/*.py")) + [ROOT / "rlhf_min/pretrain.py"]


@pytest.mark.parametrize("name", [*DOCUMENTS, *(str(path.relative_to(ROOT)) for path in PROGRAMS)])
def test_documented_commands_are_readable(monkeypatch, name):
    """Every python command in README.md, docs/ and docstrings has flags and configuration keys that there are."""
    monkeypatch.chdir(ROOT)
    text = Path(name).read_text(encoding="utf-8").replace("\\\n", " ")
    start = r"(?:python|torchrun --nproc-per-node \d+) (?!tests/|-m pytest|-m venv|-m pip|-m rlhf_min.oracle)"
    found = re.findall(rf"^(?: {{4}}|.*&& )?{start}(.*)$", text, re.MULTILINE)
    found += re.findall(rf"`{start}([^`\n]+)`", text)
    for command in found:
        script, *flags = shlex.split(command.removeprefix("-m "), comments=True)
        if script.endswith(".py") and "parse_options" not in Path(script).read_text(encoding="utf-8"):
            continue  # a program without options, e.g. one that draws a figure
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        (options,) = (c for n, c in vars(module).items() if n.endswith("Options") and c.__module__ == module.__name__)
        try:
            parse_options(options, flags)
        except UserError as error:
            assert "no WARP run in runs/" in str(error), command
    assert name != "README.md" or len(found) > 5


@pytest.mark.parametrize("name", DOCUMENTS)
def test_code_fences_balance(name):
    """Every fence stands alone on its line and is closed; a tool that wraps lines breaks that."""
    fences = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if "```" in line]
    assert all(re.fullmatch(r"```\w*", line) for line in fences)
    assert len(fences) % 2 == 0 and set(fences[1::2]) <= {"```"}
