"""Train a reward model on preference pairs: one reward (Bradley–Terry), or a distribution over the ratings 1 to 10.

    python train_rm.py                                      # the embedded world, in seconds
    python train_rm.py --head ordinal --ties half
    python train_rm.py --data pairs.jsonl --base openai-community/gpt2 --lora-r 16 --out runs/rm

The algorithm, for pairs of a chosen answer w and a rejected answer l to one prompt x:

    for each batch of pairs:                                                                             train
        (1)  r_w, r_l  ←  the head on the last token of x + w, and of x + l (BERT and its kin: on the first)
        (2)  L  =  −log σ(r_w − r_l) + c (r_w + r_l)²                         --head scalar      pair_loss
             L  =  −log P(rating of w > rating of l) + c (E_w + E_l − 11)²    --head ordinal
        (3)  θ  ←  Opt(θ, ∇L)
    every --eval-every steps: accuracy and loss on pairs that are held out

r is one logit. An ordinal head has ten, a distribution over the ratings with the mean E; c is --center-coefficient.
The base is any model that transformers can put a classification head on. data.encode_answer writes prompt and answer as
token ids, in training as in scoring, so the model is trained on what it will judge.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from rlhf_min import pretrain, toy
from rlhf_min.data import distinct, encode_pairs, load_pairs, split_pairs
from rlhf_min.lora import LoRAOptions, add_lora, merge_lora, save_adapter
from rlhf_min.losses import ordinal_loss, pairwise_loss
from rlhf_min.reward_model import load_classifier, reward_and_sigma, row_logits
from rlhf_min.support import parallel
from rlhf_min.support.batches import Batches
from rlhf_min.support.errors import UserError, one_line_errors
from rlhf_min.support.models import context_length, get_weights, save_model, set_weights, trained_weights
from rlhf_min.support.options import option, parse_options
from rlhf_min.support.plots import plot_metrics
from rlhf_min.support.precision import Optimizer, autocast, resolve_device
from rlhf_min.support.runlog import RunLog


@dataclass
class RewardModelOptions(LoRAOptions):
    """Train a reward model on preference pairs."""

    script: ClassVar[str] = "train_rm.py"

    data: str = option(toy.TRAIN_PAIRS, "pairs: prompt/chosen/rejected, or text/label, which are paired in order")
    eval_data: str = option("", "pairs to validate on; without, --eval-fraction of --data is held out")
    columns: list = option([], "new=old: other names of the data's fields; =old leaves a field out")
    eval_fraction: float = option(0.1, "share of --data to validate on without --eval-data", low=0.01, high=0.9)
    base: str = option(toy.POLICY, "model that gets the head: a run folder, a transformers folder or a hub name")
    head: str = option("scalar", "one reward, or the ratings 1 to 10", choices=["scalar", "ordinal"])
    ties: str = option("strict", "what equal ratings count as: an error, or half of one", choices=["strict", "half"])
    margin: bool = option(False, "the pairs have a field 'margin', which a scalar head's difference must exceed")
    lr: float = option(1e-3, "AdamW learning rate after the warm-up; decays linearly to 0", low=0)
    warmup_steps: int = option(10, "optimizer steps of linear warm-up", low=0)
    weight_decay: float = option(0.0, "AdamW weight decay", low=0)
    epochs: int = option(3, "passes over the pairs", low=1)
    batch_size: int = option(32, "pairs per forward pass", low=1)
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step", low=1)
    max_length: int = option(512, "tokens; longer pairs are dropped, longer labelled texts keep their beginning", low=8)
    center_coefficient: float = option(0.01, "c of c (r_w + r_l)², or of c (E_w + E_l − 11)²", low=0)
    lora_dropout: float = option(0.0, "dropout in front of the adapters", low=0, high=0.99)
    eval_every: int = option(50, "optimizer steps between validations", low=1)
    keep: str = option("best", "save the weights of the best validation loss, or the last", choices=["best", "last"])
    accept_weak: bool = option(False, "save the model even if it does not beat chance by 3 standard errors")

    def check(self):
        super().check()
        if self.data == toy.TRAIN_PAIRS:
            self.eval_data = self.eval_data or toy.EVAL_PAIRS
        if self.ties != "strict" and self.head == "scalar":
            raise UserError("--ties goes with --head ordinal only; leave one of them out")
        if self.margin and self.head == "ordinal":
            raise UserError("--margin goes with --head scalar only; leave one of them out")


def pair_logits(model, rows, tokenizer):
    """Logits of the chosen and of the rejected answers of B pairs: (B, K), (B, K), in float32."""
    answers = [chosen for chosen, _, _ in rows] + [rejected for _, rejected, _ in rows]
    return row_logits(model, answers, tokenizer.pad_token_id).chunk(2)


def pair_loss(chosen_logits, rejected_logits, rows, options):
    """The loss of --head on logits (B, K) × 2, and what a metrics line says of them."""
    reward_w, reward_l = reward_and_sigma(chosen_logits)[0], reward_and_sigma(rejected_logits)[0]  # (B,), (B,)
    if options.head == "ordinal":
        loss = ordinal_loss(chosen_logits, rejected_logits, options.ties, options.center_coefficient)
    else:
        margin = reward_w.new_tensor([margin for _, _, margin in rows]) if options.margin else None  # (B,)
        loss = pairwise_loss(reward_w, reward_l, margin, options.center_coefficient)
    return loss, {
        "loss": loss.item(),
        "accuracy": (reward_w > reward_l).double().mean().item(),  # a tie is an error
        "margin": (reward_w - reward_l).mean().item(),  # TRL's name: not what --margin asks for
        "mean_reward": torch.cat([reward_w, reward_l]).mean().item(),
    }


@torch.no_grad()
def evaluate_pairs(model, rows, tokenizer, options):
    """The metrics of all rows, with dropout off, eval_ before their names."""
    model.eval()
    rows = sorted(rows, key=lambda row: max(map(len, row[:2])))  # little padding
    batches = [rows[start : start + options.batch_size] for start in range(0, len(rows), options.batch_size)]
    with autocast(model.device, options.precision):
        logits = [pair_logits(model, batch, tokenizer) for batch in batches]
    model.train()
    _, metrics = pair_loss(*(torch.cat(column) for column in zip(*logits)), rows, options)
    return {f"eval_{name}": value for name, value in metrics.items()}


def train(model, tokenizer, train_rows, eval_rows, options, log):
    """Minimise the loss, in place; returns the validation of the weights that it leaves in the model."""
    team, accumulate = log.team, options.gradient_accumulation_steps
    if team.index:
        torch.manual_seed(options.seed + team.index)  # dropout's noise is each process's own
    steps = max(1, options.epochs * len(train_rows) // (options.batch_size * accumulate))
    optimizer = Optimizer(model, options.lr, options.precision, options.warmup_steps, steps, options.weight_decay,
                          max_grad_norm=1.0, team=team)  # fmt: skip
    stream = Batches(train_rows, options.batch_size, torch.Generator().manual_seed(options.seed))
    kept = {}  # the weights that will be saved, and their validation
    state = lambda: {"model": trained_weights(model), "optimizer": optimizer, "stream": stream, "kept": kept}
    model.train()
    for step in log.progress("reward model", steps, state):
        # r_w, r_l, and ∇L summed over the forward passes of a step
        totals = Counter()
        for _ in range(accumulate):
            rows = team.share(next(stream))
            with optimizer.autocast():
                logits = pair_logits(model, rows, tokenizer)  # (B, K), (B, K)
            loss, metrics = pair_loss(*logits, rows, options)
            optimizer.backward(loss / accumulate)
            totals.update(metrics)

        # θ ← Opt(θ, ∇L)
        optimizer.step()

        sums = team.gather(torch.tensor([list(totals.values())], dtype=torch.float64, device=model.device))
        metrics = dict(zip(totals, (sums.mean(0) / accumulate).tolist()))
        if step % options.eval_every == 0 or step == steps:
            validation = evaluate_pairs(model, eval_rows, tokenizer, options)
            metrics |= validation
            if options.keep == "last" or not kept or validation["eval_loss"] < kept["validation"]["eval_loss"]:
                kept.update(validation=validation, weights=get_weights(model))
        log.step(step=step, **metrics, **optimizer.metrics)
    set_weights(model, kept["weights"])
    return kept["validation"]


def load_base(options, device):
    """The base with a head and adapters, and with a pad token that is not EOS, so that all libraries see the EOS."""
    torch.manual_seed(options.seed)
    model, tokenizer = load_classifier(options.base, device, new_head=10 if options.head == "ordinal" else 1)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "right"
    if options.lora_r:
        add_lora(model, options.lora_r, options.lora_alpha, options.lora_dropout, options.lora_target_modules)
    return model, tokenizer


def load_rows(options, tokenizer, max_length):
    """(rows to train on, rows to validate on, what was dropped and why) of the pairs that `options` name."""
    found, unpaired = load_pairs(options.data, options.margin, options.columns)
    pairs = distinct(found)
    dropped = Counter({"copies": len(found) - len(pairs), "without a partner of the other label": unpaired})
    if options.eval_data:
        found, _ = load_pairs(options.eval_data, options.margin, options.columns)
        swapped = [pair._replace(chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
        eval_pairs = distinct(found, [*pairs, *swapped])
        dropped["of --eval-data that are copies or in --data"] = len(found) - len(eval_pairs)
    else:
        pairs, eval_pairs = split_pairs(pairs, options.eval_fraction)
    encoded = [encode_pairs(part, tokenizer, max_length) for part in (pairs, eval_pairs)]
    (rows, unfit), (eval_rows, eval_unfit) = encoded
    dropped = ", ".join(f"{count} {why}" for why, count in (dropped + unfit + eval_unfit).items()) or "none"
    if len(rows) < options.batch_size or not eval_rows or (threshold(eval_rows) >= 1 and not options.accept_weak):
        found = f"{len(rows)} pairs to train and {len(eval_rows)} to validate on (dropped: {dropped})"
        need = f"--batch-size {options.batch_size} and 10 are needed"
        remedy = "lower --batch-size, give more, change --eval-fraction, or insist with --accept-weak"
        raise UserError(f"{options.data}: {found}; {need}; {remedy}")
    return rows, eval_rows, dropped


def threshold(eval_rows):
    """The accuracy to beat: chance + 3 standard errors."""
    return 0.5 + 3 * math.sqrt(0.25 / len(eval_rows))


def prepare_world(names):
    """Make those texts and models of the embedded world in `names` that do not exist yet."""
    ends = {name: Path(name) for name in toy.FILES} | {name: Path(name, "summary.json") for name in toy.MODELS}
    missing = [name for name, end in ends.items() if name in names and not end.exists()]  # end: what is written last
    if missing and parallel.world_size() > 1:
        raise UserError("the embedded world is made by one process: start this command without torchrun first")
    if missing and not Path(toy.PROMPTS).exists():  # the last file that write_world writes
        toy.write_world(toy.FOLDER)
    for folder in toy.MODELS:  # the policy first
        if folder in missing:
            make = pretrain.main if folder == toy.POLICY else main
            head = ["--head", "ordinal"] if folder == toy.ORDINAL_REWARD_MODEL else []
            make(["--out", folder, "--resume", *head])


@one_line_errors
def main(argv=None):
    options = parse_options(RewardModelOptions, argv)
    device = resolve_device(options)
    log = RunLog(options, parallel.join(options.batch_size))
    prepare_world([options.data, options.eval_data, options.base])
    model, tokenizer = load_base(options, device)
    tokenizer.model_max_length = min(options.max_length, context_length(model))  # saved with it: what the judge reads
    train_rows, eval_rows, dropped = load_rows(options, tokenizer, tokenizer.model_max_length)

    with log.running():
        if log.writes:
            head = "ten ratings" if options.head == "ordinal" else "one reward"
            print(f"base: {options.base}, with a head for {head}, new unless it had one")
            print(f"pairs: {len(train_rows)} to train on, {len(eval_rows)} to validate on; dropped: {dropped}")
        validation = train(model, tokenizer, train_rows, eval_rows, options, log)
        if not log.writes:
            return
        accuracy, loss, margin = (validation[f"eval_{name}"] for name in ("accuracy", "loss", "margin"))
        of = ", of the weights with the lowest loss on these pairs" if options.keep == "best" else ""
        print(f"validation: accuracy {accuracy:.3f}, loss {loss:.3f}, margin {margin:.2f}{of}")
        if accuracy <= threshold(eval_rows) and not options.accept_weak:
            chance = f"{threshold(eval_rows):.3f}, chance + 3 standard errors"
            raise UserError(f"validation accuracy {accuracy:.3f} is not above {chance}: no model saved; train longer, "
                            "give more pairs or insist with --accept-weak")  # fmt: skip
        if options.lora_r:
            save_adapter(model, log.folder / "adapter", tokenizer)
        save_model(merge_lora(model), tokenizer, log.folder / "model")
        names = ["loss", "accuracy", "eval_loss", "eval_accuracy"]
        plot_metrics(log.metrics(), names, log.folder / "metrics.png")
        log.finish(train_pairs=len(train_rows), eval_pairs=len(eval_rows), dropped=dropped, **validation)


if __name__ == "__main__":
    main()
