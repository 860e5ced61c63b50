"""A BPE tokenizer and a small GPT-2 from any text file: the toy policy, or one on IMDB.

    python -m rlhf_min.pretrain --data reviews.jsonl.gz --out runs/imdb/policy

Every text starts at position 0, as a prompt does, and ends in EOS; what is longer than --max-length becomes several
sequences. The loss is next-token cross-entropy, averaged over tokens:  L = −mean_t log π(y_t | y_<t).
"""

from dataclasses import dataclass
from typing import ClassVar

from . import toy
from .data import read_texts
from .errors import UserError, one_line_errors
from .options import TrainingOptions, option, parse_options, refuse_mistakes


@dataclass
class PretrainOptions(TrainingOptions):
    """Train a tokenizer and a small GPT-2 on texts."""

    script: ClassVar[str] = "-m rlhf_min.pretrain"

    data: str = option(toy.REVIEWS, "texts: .jsonl(.gz) with a field 'text', or .txt with a text per line")
    vocab_size: int = option(600, "entries of the BPE vocabulary", low=260, high=10**6)
    layers: int = option(2, "transformer blocks", low=1)
    width: int = option(64, "size of the residual stream, a multiple of 32", low=32)
    max_length: int = option(64, "longest sequence, in tokens; a longer text becomes several", low=2)
    epochs: int = option(4, "passes over the texts", low=1)
    batch_size: int = option(64, "texts per step", low=1)
    lr: float = option(3e-3, "AdamW learning rate after a warm-up of 5 %, decayed to 0", low=0)
    weight_decay: float = option(0.01, "AdamW weight decay", low=0)
    seed: int = option(42, "seed of the initial weights and of the order of the texts", low=0, high=2**31 - 1)

    def files(self):
        return [self.data]

    def check(self):
        super().check()
        if self.width % 32:
            raise UserError(f"--width {self.width} must be a multiple of 32, the size of a head")

    def check_rows(self):
        for _ in read_texts(self.data) if self.all_local() else ():
            pass


if __name__ == "__main__":  # a mistake is told before torch takes its seconds to import
    refuse_mistakes(PretrainOptions)

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from .batches import Batches, pad
from .models import save_model, trained_weights
from .precision import Optimizer, autocast, resolve_device
from .runlog import RunLog

EOS, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE tokenizer: no text is out of its vocabulary. EOS and pad are two different tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, bos_token=EOS, pad_token=PAD,
                                   padding_side="left")  # fmt: skip


def build_model(tokenizer, layers, width, max_length):
    """A GPT-2 with heads of 32 and no dropout: policy, anchor and reference must be functions of their weights."""
    config = GPT2Config(  # a reward model made of these weights reads whole answers, hence at least 128 positions
        vocab_size=len(tokenizer), n_positions=max(128, max_length), n_layer=layers, n_embd=width,
        n_head=width // 32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def language_model_loss(model, texts, pad_token_id, device):
    """Mean cross-entropy of the next token over a batch of token lists, in nats."""
    tokens, attention_mask = pad(texts, pad_token_id, device)  # (B, T), padded on the right: positions start at 0
    is_target = attention_mask[:, 1:]  # (B, T-1)
    logits = model(input_ids=tokens).logits[:, :-1][is_target]  # (N, V): position t-1 predicts token t
    return torch.nn.functional.cross_entropy(logits.float(), tokens[:, 1:][is_target])


def train_language_model(model, rows, pad_token_id, options, log):
    """`options.epochs` passes over the token lists, in place; returns the number of steps and the last loss."""
    steps = max(1, options.epochs * len(rows) // options.batch_size)
    optimizer = Optimizer(model.parameters(), options.lr, model.device, options.precision, warmup_steps=steps // 20,
                          decay_steps=steps, weight_decay=options.weight_decay)  # fmt: skip
    stream = Batches(rows, options.batch_size, torch.Generator().manual_seed(options.seed))
    state = lambda: {"model": trained_weights(model), "optimizer": optimizer, "stream": stream}
    for step in log.progress("language model", steps, state):
        with autocast(model.device, options.precision):
            loss = language_model_loss(model, next(stream), pad_token_id, model.device)
        optimizer.backward(loss)
        grad_norm, _ = optimizer.step()
        log.step(step=step, loss=loss.item(), grad_norm=grad_norm, learning_rate=optimizer.lr)
    return steps, log.metrics()[-1]["loss"]


@one_line_errors
def main(argv=None):
    options = parse_options(PretrainOptions, argv)
    options.check()
    device = resolve_device(options)
    log = RunLog(options)
    if options.data in toy.FILES:
        toy.ensure_texts()
    texts = list(read_texts(options.data))
    with log.running():
        torch.manual_seed(options.seed)
        tokenizer = train_tokenizer(texts, options.vocab_size)
        eos = [tokenizer.eos_token_id]
        rows = [ids + eos for ids in tokenizer(texts)["input_ids"]]
        # a last piece of one token would have no target, hence - 1
        rows = [row[i : i + options.max_length] for row in rows for i in range(0, len(row) - 1, options.max_length)]
        model = build_model(tokenizer, options.layers, options.width, options.max_length).to(device)
        steps, loss = train_language_model(model, rows, tokenizer.pad_token_id, options, log)
        save_model(model.eval(), tokenizer, log.folder / "model")
        parameters = sum(p.numel() for p in model.parameters())
        log.finish(texts=len(texts), sequences=len(rows), steps=steps, parameters=parameters, loss=loss)


if __name__ == "__main__":
    main()
