"""Train a reward model on preference pairs: one reward (Bradley–Terry), or a distribution over the ratings 1 to 10.

    python train_rm.py                                      # the embedded world, in seconds
    python train_rm.py --head ordinal --ties half
    python train_rm.py --data pairs.jsonl --base openai-community/gpt2 --lora-r 16 --out runs/rm

The base is any model that transformers can put a classification head on. Prompt and answer
are tokenised by data.encode_answer, in training as in scoring, so the model is trained on what it will judge.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rlhf_min import toy
from rlhf_min.data import encode_answer, load_pairs, pair_of_row, read_rows, with_answer
from rlhf_min.errors import UserError, one_line_errors
from rlhf_min.model_files import check_ends, context_of_config
from rlhf_min.options import LoRAOptions, option, parse_options, refuse_mistakes
from rlhf_min.preflight import FIRST, check_base, check_template, first_rows, quick_tokenizer, read_config


@dataclass
class RewardModelOptions(LoRAOptions):
    """Train a reward model on preference pairs."""

    script: ClassVar[str] = "train_rm.py"
    parallel: ClassVar[bool] = True

    data: str = option(toy.TRAIN_PAIRS, "pairs: prompt/chosen/rejected, or text/label, which are paired in order")
    eval_data: str = option("", "pairs to validate on; without, --eval-fraction of --data is held out")
    eval_fraction: float = option(
        0.1, "share of --data to validate on where there is no --eval-data", low=0.01, high=0.9
    )
    base: str = option(toy.POLICY, "model that gets the head: a run folder, a transformers folder or a hub name")
    head: str = option("scalar", "one reward, or the ratings 1 to 10", choices=["scalar", "ordinal"])
    ties: str = option("strict", "what an ordinal head makes of equal ratings: an error, or half of one",
                       choices=["strict", "half"])  # fmt: skip
    margin: bool = option(False, "the pairs have a field 'margin', which a scalar head's difference shall exceed")
    lora_dropout: float = option(0.0, "dropout in front of the adapters", low=0, high=0.99)
    epochs: int = option(3, "passes over the pairs", low=1)
    batch_size: int = option(32, "pairs per forward pass", low=1)
    accumulation_steps: int = option(1, "forward passes per optimizer step", low=1)
    lr: float = option(1e-3, "AdamW learning rate after the warm-up; decays linearly to 0", low=0)
    warmup_steps: int = option(10, "optimizer steps of linear warm-up", low=0)
    weight_decay: float = option(0.0, "AdamW weight decay", low=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", low=1e-6)
    center_coefficient: float = option(0.01, "c of the centering term: c (r_w + r_l)², for ratings "
                                             "c (E_w + E_l − 11)²; 0 leaves it out", low=0)  # fmt: skip
    max_length: int = option(512, "tokens; longer pairs are dropped, longer labelled texts keep their beginning", low=8)
    eval_every: int = option(50, "optimizer steps between validations", low=1)
    keep: str = option(
        "best", "which weights to save: those of the best validation loss, or the last", choices=["best", "last"]
    )
    accept_weak: bool = option(False, "save the model even if it does not beat chance by 3 standard errors")
    seed: int = option(42, "seed of the head, the order of the pairs and dropout", low=0, high=2**31 - 1)

    def files(self):
        return [self.data, self.eval_data]

    def model_names(self):
        return [self.base]

    def check(self):
        if self.data == toy.TRAIN_PAIRS:
            self.eval_data = self.eval_data or toy.EVAL_PAIRS
        super().check()
        check_base(self.base)
        self.check_lora(self.base)
        if self.ties != "strict" and self.head == "scalar":
            raise UserError("--ties goes with --head ordinal only; leave one of them out")
        if self.margin and self.head == "ordinal":
            raise UserError("--margin goes with --head scalar only; leave one of them out")

    def check_rows(self):
        files = [load_pairs(file, self.margin)[0] if Path(file).is_file() else [] for file in self.files()]
        if self.all_local():
            differ = [[pair for pair in pairs if pair.chosen != pair.rejected] for pairs in files]
            same = len(files[0]) - len(differ[0])
            self.split(*differ, f"{same} identical" if same else "none")

    def check_tokens(self):
        rows = first_rows(self.files(), read_rows)
        pairs = [pair for pair in (pair_of_row(*row) for row in rows if "chosen" in row[1])
                 if isinstance(pair.prompt, list)]  # fmt: skip
        tokenizer, exact = quick_tokenizer(self.base)
        check_template(tokenizer, [with_answer(p.prompt, answer) for p in pairs for answer in (p.chosen, p.rejected)])
        if not exact:
            return
        check_ends(self.base, tokenizer)
        if self.all_local() and len(rows) < FIRST:  # these are all
            max_length = min(self.max_length, context_of_config(read_config(self.base)))
            rows, eval_rows, dropped = encode_rows(self, tokenizer, max_length)
            self.split(rows, eval_rows, reasons(dropped))

    def split(self, rows, eval_rows, dropped="none"):
        """(rows to train on, rows to validate on) of rows in random order; UserError where they are too few."""
        if not self.eval_data:
            held_out = math.ceil(self.eval_fraction * len(rows))
            eval_rows, rows = rows[:held_out], rows[held_out:]
        if len(rows) < self.batch_size or not eval_rows:
            raise UserError(f"{self.data}: {len(rows)} pairs to train and {len(eval_rows)} to validate on are too few: "
                            f"--batch-size {self.batch_size} and 10 are needed (dropped: {dropped}); lower "
                            "--batch-size, change --eval-fraction or give more")  # fmt: skip
        if accuracy_to_beat(eval_rows) >= 1 and not self.accept_weak:
            raise UserError(f"{len(eval_rows)} validation pairs cannot tell a reward model from chance; give 10 at "
                            "least (--eval-data, --eval-fraction), or insist with --accept-weak")  # fmt: skip
        return rows, eval_rows


def accuracy_to_beat(eval_rows):
    """Chance + 3 standard errors."""
    return 0.5 + 3 * math.sqrt(0.25 / len(eval_rows))


def encode_pairs(pairs, tokenizer, max_length):
    """[(chosen ids, rejected ids, margin)] and a Counter of the pairs that were dropped, by reason."""
    rows, dropped = [], Counter()
    for pair in pairs:
        limit = max_length if pair.may_be_cut else None
        chosen, rejected = (encode_answer(tokenizer, pair.prompt, answer, max_length=limit, keep="start")
                            for answer in (pair.chosen, pair.rejected))  # fmt: skip
        if chosen == rejected:
            dropped["identical"] += 1
        elif max(len(chosen), len(rejected)) > max_length:
            dropped[f"longer than {max_length} tokens"] += 1
        else:
            rows.append((chosen, rejected, pair.margin))
    return rows, dropped


def encode_rows(options, tokenizer, max_length):
    """(rows, those of --eval-data, Counter of what was dropped, by reason) of the pairs that `options` name."""
    pairs, unpaired = load_pairs(options.data, options.margin)
    rows, dropped = encode_pairs(pairs, tokenizer, max_length)
    if unpaired:
        dropped["without a partner of the other label"] = unpaired
    eval_pairs = load_pairs(options.eval_data, options.margin)[0] if options.eval_data else []
    return rows, encode_pairs(eval_pairs, tokenizer, max_length)[0], dropped


def reasons(dropped):
    """What was dropped, as words."""
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"


if __name__ == "__main__":  # a mistake is told before torch takes its seconds to import
    refuse_mistakes(RewardModelOptions)

import torch

from rlhf_min import parallel, pretrain
from rlhf_min.batches import Batches, shuffle
from rlhf_min.lora import add_lora_of, lora_layers, merge_lora, save_adapter
from rlhf_min.losses import ordinal_loss, pairwise_loss
from rlhf_min.models import context_length, get_weights, load_classifier, save_model, set_weights, trained_weights
from rlhf_min.plots import plot_metrics
from rlhf_min.precision import Optimizer, autocast, resolve_device
from rlhf_min.reward_model import reward_and_sigma, row_logits
from rlhf_min.runlog import RunLog


def pair_logits(model, rows, tokenizer):
    """Logits of the chosen and of the rejected answers of B pairs: (B, K), (B, K), in float32."""
    answers = [chosen for chosen, _, _ in rows] + [rejected for _, rejected, _ in rows]
    return row_logits(model, answers, tokenizer.pad_token_id).chunk(2)


def pair_loss(chosen, rejected, rows, options):
    """The loss of --head on logits (B, K) × 2, and what a metrics line says of them."""
    reward_w, reward_l = reward_and_sigma(chosen)[0], reward_and_sigma(rejected)[0]  # (B,), (B,)
    if options.head == "ordinal":
        loss = ordinal_loss(chosen, rejected, options.ties, options.center_coefficient)
    else:
        margin = chosen.new_tensor([margin for _, _, margin in rows]) if options.margin else None  # (B,)
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
    with autocast(model.device, options.precision):
        logits = [pair_logits(model, rows[i : i + options.batch_size], tokenizer)
                  for i in range(0, len(rows), options.batch_size)]  # fmt: skip
    model.train()
    _, metrics = pair_loss(*(torch.cat(column) for column in zip(*logits)), rows, options)
    return {f"eval_{name}": value for name, value in metrics.items()}


def train(model, tokenizer, train_rows, eval_rows, options, log):
    """Minimise the loss; returns the validation of the weights that it leaves in the model."""
    team = log.team  # who share a batch
    if team.index:
        torch.manual_seed(options.seed + team.index)  # dropout's noise is each one's own
    steps = max(1, options.epochs * len(train_rows) // (options.batch_size * options.accumulation_steps))
    optimizer = Optimizer(model.parameters(), options.lr, model.device, options.precision, options.warmup_steps,
                          decay_steps=steps, max_grad_norm=options.max_grad_norm, weight_decay=options.weight_decay,
                          team=team)  # fmt: skip
    stream = Batches(train_rows, options.batch_size, torch.Generator().manual_seed(options.seed))
    kept = {}  # the weights that shall be saved, and their validation
    state = lambda: {"model": trained_weights(model), "optimizer": optimizer, "stream": stream,
                     "kept": kept}  # what --resume goes on with  # fmt: skip
    model.train()
    for step in log.progress("reward model", steps, state):
        totals = Counter()
        for _ in range(options.accumulation_steps):
            rows = team.share(next(stream))
            with autocast(model.device, options.precision):
                chosen, rejected = pair_logits(model, rows, tokenizer)  # (B, K), (B, K)
            loss, metrics = pair_loss(chosen, rejected, rows, options)
            optimizer.backward(loss / options.accumulation_steps)
            totals.update(metrics)
        grad_norm, _ = optimizer.step()

        sums = team.gather(torch.tensor([list(totals.values())], dtype=torch.float64, device=model.device))
        metrics = dict(zip(totals, (sums.mean(0) / options.accumulation_steps).tolist()))
        if step % options.eval_every == 0 or step == steps:
            validation = evaluate_pairs(model, eval_rows, tokenizer, options)
            metrics |= validation
            if options.keep == "last" or not kept or validation["eval_loss"] < kept["validation"]["eval_loss"]:
                kept.update(validation=validation, weights=get_weights(model))
        log.step(step=step, **metrics, grad_norm=grad_norm, learning_rate=optimizer.lr, show=["loss", "accuracy"])
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
    add_lora_of(model, options)
    return model, tokenizer


def save_reward_model(model, tokenizer, folder):
    """The whole model into model/, its adapters with the head into adapter/."""
    if lora_layers(model):
        save_adapter(model, folder / "adapter", tokenizer)
    save_model(merge_lora(model), tokenizer, folder / "model")


def prepare_inputs(files, models):
    """Make what is named of the embedded world and not cached yet."""
    if toy.FILES & set(files) or toy.MODELS & set(models):
        toy.ensure_texts()
    if toy.MODELS & set(models):
        toy.ensure_run(toy.POLICY, pretrain.main)
    if toy.REWARD_MODEL in models:
        toy.ensure_run(toy.REWARD_MODEL, main)
    if toy.ORDINAL_REWARD_MODEL in models:
        toy.ensure_run(toy.ORDINAL_REWARD_MODEL, main, ["--head", "ordinal"])


@one_line_errors
def main(argv=None):
    options = parse_options(RewardModelOptions, argv)
    options.check()
    device = resolve_device(options)
    parallel.join()
    log = RunLog(options)
    log.team = parallel.everyone()
    log.team.check(options.batch_size)
    parallel.one_a_machine(prepare_inputs, options.files(), options.model_names())
    model, tokenizer = load_base(options, device)
    max_length = min(options.max_length, context_length(model))
    rows, eval_rows, dropped = encode_rows(options, tokenizer, max_length)
    rows = rows if options.eval_data else shuffle(rows, torch.Generator().manual_seed(options.seed))
    train_rows, eval_rows = options.split(rows, eval_rows, reasons(dropped))
    threshold = accuracy_to_beat(eval_rows)

    with log.running():
        head = "ten ratings" if options.head == "ordinal" else "one reward"
        if log.writes:
            print(f"base: {options.base}, with a head for {head}, new unless it had one")
            print(f"pairs: {len(train_rows)} to train on, {len(eval_rows)} to validate on; dropped: {reasons(dropped)}")
        validation = train(model, tokenizer, train_rows, eval_rows, options, log)
        if not log.writes:
            return
        accuracy = validation["eval_accuracy"]
        refused = accuracy <= threshold and not options.accept_weak
        if not refused:
            save_reward_model(model, tokenizer, log.folder)
        names = ["loss", "accuracy", "eval_loss", "eval_accuracy"]
        plot_metrics(log.metrics(), names, log.folder / "metrics.png")
        print(f"validation: accuracy {accuracy:.3f}, loss {validation['eval_loss']:.3f}, "
              f"margin {validation['eval_margin']:.2f}")  # fmt: skip
        log.finish(train_pairs=len(train_rows), eval_pairs=len(eval_rows), dropped=dict(dropped), **validation)
    if refused:
        raise UserError(f"validation accuracy {accuracy:.3f} is not above {threshold:.3f}, chance + 3 standard errors: "
                        "no model saved; train longer, give more pairs or insist with --accept-weak")  # fmt: skip


if __name__ == "__main__":
    main()
