"""Where θ_sft comes from: a BPE tokenizer and a small GPT-2 trained on any texts.

    python -m rlhf_min.pretrain --data reviews.jsonl.gz --out runs/imdb/policy

Every text starts at position 0, as a prompt does, and ends in EOS. What is longer than --max-length becomes several
sequences. The loss is next-token cross-entropy, averaged over tokens:  L = −mean_t log π(y_t | y_<t).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from . import toy
from .data import read_texts
from .support.batches import Batches, pad
from .support.errors import UserError, one_line_errors
from .support.models import save_model, trained_weights
from .support.options import TrainingOptions, option, parse_options
from .support.precision import Optimizer, resolve_device
from .support.runlog import RunLog

EOS, PAD = "<|endoftext|>", "<|pad|>"


@dataclass
class PretrainOptions(TrainingOptions):
    """Train a tokenizer and a small GPT-2 on texts."""

    script: ClassVar[str] = "-m rlhf_min.pretrain"

    data: str = option(toy.REVIEWS, "texts: .jsonl(.gz) with a field 'text'")
    vocab_size: int = option(600, "entries of the BPE vocabulary", low=260, high=10**6)
    layers: int = option(2, "transformer blocks", low=1)
    width: int = option(64, "size of the residual stream, a multiple of 32", low=32)
    max_length: int = option(64, "longest sequence, in tokens; a longer text becomes several", low=2)
    epochs: int = option(4, "passes over the texts", low=1)
    batch_size: int = option(64, "sequences per step", low=1)
    lr: float = option(3e-3, "AdamW learning rate after a warm-up of 5 %, decayed to 0", low=0)
    weight_decay: float = option(0.01, "AdamW weight decay", low=0)

    def check(self):
        super().check()
        if self.width % 32:
            raise UserError(f"--width {self.width} must be a multiple of 32, the size of a head")


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE tokenizer: no text is out of its vocabulary. EOS and pad are two different tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {"special_tokens": [EOS, PAD], "initial_alphabet": alphabet, "show_progress": False}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **settings))
    special = {"bos_token": EOS, "eos_token": EOS, "pad_token": PAD}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, padding_side="left", **special)


def build_model(tokenizer, layers, width, max_length):
    """A GPT-2 with heads of 32 and no dropout: policy, anchor and reference must be functions of their weights."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    positions = max(128, max_length)  # a reward model made of these weights reads whole answers
    sizes = {"n_layer": layers, "n_embd": width, "n_head": width // 32, "n_positions": positions}
    config = GPT2Config(vocab_size=len(tokenizer), **sizes, **ids, **no_dropout)
    return GPT2LMHeadModel(config)


def language_model_loss(model, texts, pad_token_id):
    """Mean cross-entropy of the next token over a batch of token lists, in nats."""
    tokens, attention_mask = pad(texts, pad_token_id, model.device)  # (B, T), padded on the right: positions start at 0
    is_target = attention_mask[:, 1:]  # (B, T-1)
    logits = model(input_ids=tokens).logits[:, :-1][is_target]  # (N, V): position t-1 predicts token t
    return F.cross_entropy(logits.float(), tokens[:, 1:][is_target])


def train_language_model(model, rows, pad_token_id, options, log):
    """`options.epochs` passes over the token lists, in place."""
    steps = max(1, options.epochs * len(rows) // options.batch_size)
    optimizer = Optimizer(model, options.lr, options.precision, warmup_steps=steps // 20, decay_steps=steps,
                          weight_decay=options.weight_decay, max_grad_norm=1.0)  # fmt: skip
    stream = Batches(rows, options.batch_size, torch.Generator().manual_seed(options.seed))
    state = lambda: {"model": trained_weights(model), "optimizer": optimizer, "stream": stream}
    for step in log.progress("language model", steps, state):
        with optimizer.autocast():
            loss = language_model_loss(model, next(stream), pad_token_id)
        optimizer.backward(loss)
        optimizer.step()
        log.step(step=step, loss=loss.item(), **optimizer.metrics)


@one_line_errors
def main(argv=None):
    options = parse_options(PretrainOptions, argv)
    device = resolve_device(options)
    log = RunLog(options)
    if options.data == toy.REVIEWS and not Path(toy.PROMPTS).exists():
        toy.write_world(toy.FOLDER)
    texts = read_texts(options.data)
    with log.running():
        torch.manual_seed(options.seed)
        tokenizer = train_tokenizer(texts, options.vocab_size)
        eos = [tokenizer.eos_token_id]
        rows = [ids + eos for ids in tokenizer(texts)["input_ids"]]
        # a last piece of one token would have no target, hence - 1
        rows = [row[i : i + options.max_length] for row in rows for i in range(0, len(row) - 1, options.max_length)]
        model = build_model(tokenizer, options.layers, options.width, options.max_length).to(device)
        train_language_model(model, rows, tokenizer.pad_token_id, options, log)
        save_model(model.eval(), tokenizer, log.folder / "model")
        parameters = sum(p.numel() for p in model.parameters())
        last = log.metrics()[-1]
        log.finish(texts=len(texts), sequences=len(rows), steps=last["step"], parameters=parameters, loss=last["loss"])


if __name__ == "__main__":
    main()
