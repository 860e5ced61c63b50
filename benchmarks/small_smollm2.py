"""A Llama in the shape of SmolLM2 that two cores can carry, with SmolLM2's own tokenizer and chat template.

    python benchmarks/small_smollm2.py --data data/hh_helpful/train.jsonl.gz --out runs/helpsteer2/policy

SmolLM2-135M is 30 blocks of width 576, of 9 heads of 64 (3 for keys and values), tied embeddings, a vocabulary of
49,152. This one has fewer blocks and heads and reads two thousand conversations, so it speaks in the format of a chat,
and hardly in sentences. It is there to run everything that the real one would.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlhf_min.data import load_pairs
from rlhf_min.errors import one_line_errors
from rlhf_min.models import save_model
from rlhf_min.options import TrainingOptions, option, parse_options
from rlhf_min.precision import resolve_device
from rlhf_min.pretrain import train_language_model
from rlhf_min.reward_model import encode_answer
from rlhf_min.runlog import RunLog


@dataclass
class SmallOptions(TrainingOptions):
    """Train a small Llama in SmolLM2's shape on the chosen answers of preference pairs."""

    script: ClassVar[str] = "benchmarks/small_smollm2.py"

    data: str = option("data/hh_helpful/train.jsonl.gz", "pairs of messages, whose chosen answers are read")
    tokenizer: str = option("data/tokenizers/smollm2", "folder of SmolLM2's tokenizer")
    layers: int = option(4, "transformer blocks", low=1)
    heads: int = option(2, "query heads of 64 dimensions, which share one key and value head", low=1)
    max_length: int = option(96, "tokens of a conversation that are read: its last ones", low=8)
    epochs: int = option(1, "passes over the conversations", low=1)
    batch_size: int = option(16, "conversations a step", low=1)
    lr: float = option(2e-3, "AdamW learning rate after a warm-up of 5 %, decayed to 0", low=0)
    weight_decay: float = option(0.0, "AdamW weight decay", low=0)
    seed: int = option(28, "seed of the initial weights and of the order", low=0)

    def files(self):
        return [self.data, f"{self.tokenizer}/tokenizer.json"]


@one_line_errors
def main(argv=None):
    options = parse_options(SmallOptions, argv)
    options.check()
    device = resolve_device(options)
    log = RunLog(options)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    pairs, _ = load_pairs(options.data)
    rows = [encode_answer(tokenizer, pair.prompt, pair.chosen, max_length=options.max_length) for pair in pairs]
    with log.running():
        torch.manual_seed(options.seed)
        width = 64 * options.heads
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=8 * width // 3, tie_word_embeddings=True,
            num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=1,
            max_position_embeddings=2048, rope_theta=100_000.0, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(device)
        steps, loss = train_language_model(model, rows, tokenizer.pad_token_id, options, log)
        save_model(model.eval(), tokenizer, log.folder / "model")
        log.finish(conversations=len(rows), steps=steps, parameters=sum(p.numel() for p in model.parameters()),
                   loss=loss)  # fmt: skip


if __name__ == "__main__":
    main()
