"""Seconds and memory, side by side with what people would use instead: TRL, PEFT, transformers' generate.

    pip install -e '.[bench]'
    python benchmarks/speed.py --out runs/speed                       # the rows for a CPU
    python benchmarks/speed.py --rows sample-4x128 lora-pass --repeats 9
    python benchmarks/speed.py --device cuda --precision bf16 --rows sample-smollm2 step-gpt2-64 lora-pass merge

Both sides take turns, on the same model, batch and tokens, after two turns that are not counted; the ratio is the
median over the turns of peer ÷ ours. Each side has a process of its own; its memory is the largest resident set less
that before the models were made, or on a GPU what torch allocated at most. Merging has no peer. A side that fails, for
example because it is not installed, is reported in its row, and the rest goes on.
"""

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import train_reinforce
import train_rm
from rlhf_min import warp
from rlhf_min.data import Prompt
from rlhf_min.evaluation import Task, format_table
from rlhf_min.lora import add_lora
from rlhf_min.reward_model import RewardModel, load_classifier
from rlhf_min.rollout import load_policy, sample, uniform_numbers
from rlhf_min.support import gpu_step, parallel
from rlhf_min.support.errors import UserError, first_line, one_line_errors
from rlhf_min.support.models import get_weights, load_plain_model
from rlhf_min.support.options import RunOptions, option, parse_options
from rlhf_min.support.precision import autocast, resolve_device
from rlhf_min.support.runlog import RunLog

TEMPERATURE, PROMPT, ANSWER = 0.7, 10, 54  # the WARP report's
TINY = {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 4096}
SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}  # GPT-2 small
SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
           "num_key_value_heads": 3, "tie_word_embeddings": True}  # fmt: skip  # SmolLM2-135M's, but for its 30 blocks
LENGTHS = [39, 63, 80, 96, 114, 135, 157, 175, 196, 224, 256]  # deciles of HH-helpful's in SmolLM2's tokens, up to 256
LORA = ["q_proj", "v_proj"]
Process = multiprocessing.get_context("spawn").Process


def tokenizer_of(vocab_size):
    """A tokenizer of words w0, w1, ..., whose last two entries are EOS and pad."""
    vocab = {f"w{i}": i for i in range(vocab_size - 2)} | {"<eos>": vocab_size - 2, "<pad>": vocab_size - 1}
    words = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def gpt2(shape, kind=GPT2LMHeadModel, **kwargs):
    """A GPT-2 with random weights, without dropout."""
    torch.manual_seed(0)
    end, pad = shape["vocab_size"] - 2, shape["vocab_size"] - 1
    return kind(GPT2Config(n_positions=256, bos_token_id=end, eos_token_id=end, pad_token_id=pad, resid_pdrop=0.0,
                           embd_pdrop=0.0, attn_pdrop=0.0, **shape, **kwargs)).eval()  # fmt: skip


def smollm2(layers, kind=LlamaForCausalLM, **kwargs):
    """A Llama of SmolLM2's shape with random weights."""
    torch.manual_seed(0)
    return kind(LlamaConfig(**SMOLLM2, num_hidden_layers=layers, max_position_embeddings=2048, pad_token_id=2,
                            eos_token_id=0, bos_token_id=1, **kwargs)).eval()  # fmt: skip


# Turns


def resident(field):
    """MiB of this process that Linux reports: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def graph():
    """Whether a CUDA graph has been recorded in this process, or why not."""
    return next(iter(gpu_step.REFUSED.values()), "used" if gpu_step.STEPS else "none")


class Turns:
    """One side of a row, in its process: a turn is taken when the other process says so, and then reported."""

    team = parallel.ALONE

    def __init__(self, line, options):
        self.line, self.start, self.before = line, None, resident("VmRSS")
        self.gpu = options.device.startswith("cuda")

    def pause(self):
        """Before each turn: report (seconds, MiB, graph) of the one before, and wait. EOFError after the last."""
        if self.gpu:
            torch.cuda.synchronize()
        if self.start:
            peak = torch.cuda.max_memory_allocated() / 2**20 if self.gpu else resident("VmHWM") - self.before
            self.line.send((time.perf_counter() - self.start, peak, graph()))
        self.line.recv()
        self.start = time.perf_counter()

    def take(self, turn):
        """Take turns until the other process closes the line."""
        while True:
            self.pause()
            turn()

    def progress(self, title, steps, state):
        """In place of RunLog.progress."""
        for step in range(1, steps + 1):
            self.pause()
            yield step

    def step(self, **metrics):
        """In place of RunLog.step."""


def work(line, name, side, options):
    """A process's work: the turns of one side of a row. What goes wrong is sent in place of a report."""
    set_threads(options)
    if side == "ours":
        resolve_device(options)  # as in every script; the peer runs as its users run it
    row, turns = ROWS[name], Turns(line, options)
    try:
        with tempfile.TemporaryDirectory() as folder:
            row.build(folder)
            getattr(row, side)(folder, options, turns)
    except EOFError:  # no more turns
        return
    except (Exception, SystemExit) as error:
        line.send(f"{type(error).__name__}: {first_line(error)}")


def take_turn(process, line):
    """(seconds, MiB, graph) of a turn that the process takes now, or why it took none."""
    line.send("go")
    while not line.poll(1):
        if not process.is_alive() and not line.poll():
            return "its process died; out of memory?"
    return line.recv()


def set_threads(options):
    """--threads, in whichever process."""
    torch.set_num_threads(options.threads or os.cpu_count())


# Rows


def pause_callback(turns):
    """TRL's trainers pause before each step, too."""
    from transformers import TrainerCallback

    class Pause(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            turns.pause()

    return Pause()


def trl_arguments(folder, options, batch_size):
    """What TRL's trainers are told alike: nothing but training."""
    return {
        "output_dir": f"{folder}/trl", "per_device_train_batch_size": batch_size, "learning_rate": 1e-4,
        "max_steps": 1000, "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "gradient_checkpointing": False, "use_cpu": options.device == "cpu", "bf16": options.precision == "bf16",
        "fp16": options.precision == "fp16",
    }  # fmt: skip


class ReinforceStep:
    """One step: rollout, reward, log-probs under policy and reference, update; two answers to each prompt (RLOO)."""

    peer = "TRL RLOOTrainer"

    def __init__(self, shape, batch_size):
        self.shape, self.batch_size = shape, batch_size

    def build(self, folder):
        tokenizer = tokenizer_of(self.shape["vocab_size"])
        judge = gpt2(self.shape, GPT2ForSequenceClassification, num_labels=1)
        for name, model in (("policy", gpt2(self.shape)), ("judge", judge)):
            model.save_pretrained(f"{folder}/{name}")
            tokenizer.save_pretrained(f"{folder}/{name}")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.shape["vocab_size"] - 2, (8 * self.batch_size, PROMPT), generator=generator).tolist()
        self.prompts = [Prompt(row, tokenizer.decode(row)) for row in ids]

    def ours(self, folder, options, turns):
        flags = f"--batch-size {self.batch_size} --num-generations 2 --baseline leave-one-out --lr 1e-4 --steps 1000 "
        flags += f"--device {options.device} --precision {options.precision} --max-length {PROMPT + ANSWER}"
        step_options = parse_options(train_reinforce.ReinforceOptions, flags.split())
        policy, tokenizer = load_policy(f"{folder}/policy", options.device, PROMPT + ANSWER)
        judge = RewardModel(*load_classifier(f"{folder}/judge", options.device))
        task = Task(policy, tokenizer, {"reward": judge}, self.prompts, [])
        train_reinforce.train_policy(task, get_weights(policy), step_options, turns)

    def theirs(self, folder, options, turns):
        from datasets import Dataset
        from trl import RLOOConfig, RLOOTrainer

        policy, tokenizer = load_policy(f"{folder}/policy", options.device, PROMPT + ANSWER)
        judge, judge_tokenizer = load_classifier(f"{folder}/judge", options.device)
        arguments = RLOOConfig(num_generations=2, max_completion_length=ANSWER, temperature=TEMPERATURE, top_k=0,
                               beta=0.05, **trl_arguments(folder, options, self.batch_size))  # fmt: skip
        data = Dataset.from_list([{"prompt": prompt.text} for prompt in self.prompts])
        RLOOTrainer(model=policy, reward_funcs=judge, args=arguments, train_dataset=data, processing_class=tokenizer,
                    reward_processing_classes=judge_tokenizer, callbacks=[pause_callback(turns)]).train()  # fmt: skip


class RewardStep:
    """One optimizer step of a scalar reward model with LoRA r 16 on q_proj and v_proj."""

    peer = "TRL RewardTrainer, PEFT"

    def __init__(self, layers, batch_size):
        self.layers, self.batch_size = layers, batch_size

    def build(self, folder):
        generator = torch.Generator().manual_seed(0)
        u = torch.rand(2, self.batch_size, generator=generator) * (len(LENGTHS) - 1)  # one batch, again and again
        lengths = [[round(LENGTHS[int(v)] + (v % 1).item() * (LENGTHS[int(v) + 1] - LENGTHS[int(v)])) for v in row]
                   for row in u]  # fmt: skip
        make = lambda n: torch.randint(3, 49000, (n,), generator=generator).tolist()
        self.rows = [(make(n), make(m), None) for n, m in zip(*lengths)]

    def _model(self, options):
        return smollm2(self.layers, LlamaForSequenceClassification, num_labels=1).to(options.device)

    def ours(self, folder, options, turns):
        flags = f"--batch-size {self.batch_size} --lr 1e-4 --epochs 10000 --lora-r 16 --center-coefficient 0 "
        flags += f"--device {options.device} --precision {options.precision} --eval-every 100000"
        step_options = parse_options(train_rm.RewardModelOptions, flags.split())
        model = add_lora(self._model(options), 16, 32.0, target_modules=LORA)
        train_rm.train(model, SimpleNamespace(pad_token_id=2), self.rows, self.rows, step_options, turns)

    def theirs(self, folder, options, turns):
        from datasets import Dataset
        from peft import LoraConfig
        from trl import RewardConfig, RewardTrainer

        tokenizer = tokenizer_of(SMOLLM2["vocab_size"])
        arguments = RewardConfig(max_length=256, pad_token="w2", **trl_arguments(folder, options, self.batch_size))
        data = Dataset.from_list([dict(zip(("chosen_ids", "rejected_ids"), row)) for row in self.rows])
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=LORA, task_type="SEQ_CLS")
        RewardTrainer(model=self._model(options), args=arguments, train_dataset=data, processing_class=tokenizer,
                      peft_config=lora, callbacks=[pause_callback(turns)]).train()  # fmt: skip


class LoraPass:
    """Forward and backward of a causal language model with LoRA r 16 on q_proj and v_proj, 4 × 128 tokens."""

    peer = "PEFT"

    def __init__(self, layers):
        self.layers = layers

    def build(self, folder):
        self.tokens = torch.randint(3, 49000, (4, 128), generator=torch.Generator().manual_seed(0))

    def _take(self, model, options, turns):
        tokens = self.tokens.to(options.device)

        def turn():
            with autocast(tokens.device, options.precision):
                model(input_ids=tokens, labels=tokens).loss.backward()

        turns.take(turn)

    def ours(self, folder, options, turns):
        model = smollm2(self.layers).to(options.device)
        self._take(add_lora(model, 16, 32.0, target_modules=LORA), options, turns)

    def theirs(self, folder, options, turns):
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=16, lora_alpha=32, target_modules=LORA, task_type="CAUSAL_LM")
        self._take(get_peft_model(smollm2(self.layers).to(options.device), lora), options, turns)


class Sampling:
    """One answer to each prompt, none of which ends early."""

    peer = "transformers generate"

    def __init__(self, make, batch_size, answer=ANSWER):
        self.make, self.batch_size, self.answer = make, batch_size, answer

    def build(self, folder):
        model = self.make()
        model.save_pretrained(folder)
        self.prompts = torch.randint(3, model.config.vocab_size - 2, (self.batch_size, PROMPT))

    def ours(self, folder, options, turns):
        model = load_plain_model(AutoModelForCausalLM, folder).to(options.device).eval()  # as load_policy does
        prompts, generator = self.prompts.tolist(), torch.Generator()
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = -1, 0

        def turn():
            with autocast(model.device, options.precision):
                sample(model, prompts, uniform_numbers(len(prompts), PROMPT + self.answer, generator), TEMPERATURE)

        turns.take(turn)

    def theirs(self, folder, options, turns):
        model, tokens = AutoModelForCausalLM.from_pretrained(folder).to(options.device), self.prompts.to(options.device)
        model.generation_config.eos_token_id = None

        def turn():
            with torch.no_grad(), autocast(tokens.device, options.precision):
                model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=True, top_k=0, top_p=1.0,
                               temperature=TEMPERATURE, max_new_tokens=self.answer, pad_token_id=0)  # fmt: skip

        turns.take(turn)


class Merge:
    """θ_slerp of two policies of GPT-2 small's 124M weights, in memory."""

    peer = None

    def build(self, folder):
        pass

    def ours(self, folder, options, turns):
        init, *policies = (get_weights(gpt2(SMALL).to(options.device)) for _ in range(3))
        for policy in policies:
            for tensor in policy.values():
                tensor += 0.01 * torch.randn_like(tensor)
        turns.take(lambda: warp.merge(init, policies))


ROWS = {
    "step-4x128": ReinforceStep(TINY, 64),
    "step-gpt2": ReinforceStep(SMALL, 8),
    "reward-lora": RewardStep(6, 4),
    "lora-pass": LoraPass(6),
    "sample-4x128": Sampling(lambda: gpt2(TINY), 64),
    "sample-gpt2": Sampling(lambda: gpt2(SMALL), 64),
    "merge": Merge(),
    # for a GPU
    "sample-smollm2": Sampling(lambda: smollm2(30), 64, 128),
    "step-gpt2-64": ReinforceStep(SMALL, 64),
    # for a rehearsal of benchmarks/gpu.py
    "toy": Sampling(lambda: gpt2(TINY | {"vocab_size": 99}), 2, 4),
}
ON_A_CPU = list(ROWS)[:-3]


# The table


@dataclass
class SpeedOptions(RunOptions):
    """Measure seconds and memory against the peers."""

    script: ClassVar[str] = "benchmarks/speed.py"

    rows: list = option(ON_A_CPU, f"what to measure, of {', '.join(ROWS)}")
    repeats: int = option(7, "turns of either side", low=1)
    threads: int = option(0, "threads of a process; 0 takes one a core", low=0)

    def check(self):
        for row in self.rows:
            if row not in ROWS:
                raise UserError(f"--rows {row}: there is no such row; there are {', '.join(ROWS)}")


def measure(name, options):
    """({side: [(seconds, MiB, graph) of a turn]}, {side: why it failed}); the first two turns are not counted."""
    sides, turns, failed = {}, {}, {}

    def turn(side):
        answer = take_turn(*sides[side])
        if isinstance(answer, str):
            failed[side] = answer
        else:
            turns[side].append(answer)

    for side in ("ours", "theirs") if ROWS[name].peer else ("ours",):
        line, other_end = multiprocessing.Pipe()
        process = Process(target=work, args=(other_end, name, side, options), daemon=True)
        process.start()
        sides[side], turns[side] = (process, line), []
        turn(side)
    for _ in range(1 + options.repeats):
        for side in [side for side in sides if side not in failed]:
            turn(side)
    for process, line in sides.values():
        line.close()
        process.join()
    return {side: taken[2:] for side, taken in turns.items() if side not in failed}, failed


def table_row(name, turns, failed):
    """A row of the table, of what `measure` returns."""
    spread = lambda values: f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
    row = {"row": name, "peer": ROWS[name].peer}
    for side, taken in turns.items():
        seconds, memory, graphs = zip(*taken)
        row |= {f"{side}, s": spread(seconds), f"{side}, MiB": round(max(memory))}
        row |= {"graph": graphs[-1]} if side == "ours" and graphs[-1] != "none" else {}
    if len(turns) == 2:
        pairs = zip(turns["ours"], turns["theirs"])
        row["peer ÷ ours"] = spread([theirs / ours for (ours, *_), (theirs, *_) in pairs])
    return row | ({"failed": "; ".join(f"{side}: {why}" for side, why in failed.items())} if failed else {})


@one_line_errors
def main(argv=None):
    options = parse_options(SpeedOptions, argv)
    resolve_device(options)
    set_threads(options)
    log, rows = RunLog(options), []
    with log.running():
        for name in options.rows:
            rows.append(table_row(name, *measure(name, options)))
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
        text = f"{format_table(rows)}\n\n{options.device}, {options.precision}, {torch.get_num_threads()} threads"
        print("\n" + text)
        (log.folder / "table.md").write_text(text + "\n", encoding="utf-8")
        log.finish(rows=rows)


if __name__ == "__main__":
    main()
