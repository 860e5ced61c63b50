"""Seconds and memory, side by side with what people would use instead: TRL, PEFT, transformers' generate, mergekit.

    pip install -e '.[bench]'
    python benchmarks/speed.py --out runs/speed                       # the rows for a CPU, fifteen minutes on two cores
    python benchmarks/speed.py --rows sample-4x128 merge --repeats 9
    python benchmarks/speed.py --device cuda --precision bf16 --rows sample-smollm2 step-gpt2-64 lora-pass merge

Both sides take turns, on the same model, batch and tokens, after two turns that are not counted; the ratio is the
median over the turns of peer ÷ ours. Each side has a process of its own; its memory is the largest resident set less
that before the models were made, or on a GPU what torch allocated at most. The floor is what the machine could do at
best: the FLOPs of all matrix products over the rate of a large one, and the bytes that must be read over the rate of a
large sum; for a merge, the time to read three sets of weights and write one. All are measured in the same run.
"""

import json
import os
import statistics
import subprocess
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
from rlhf_min import parallel, warp
from rlhf_min.data import Prompt
from rlhf_min.errors import UserError, one_line_errors
from rlhf_min.evaluation import format_table
from rlhf_min.lora import add_lora
from rlhf_min.models import get_weights, load_classifier, load_policy
from rlhf_min.options import RunOptions, option, parse_options
from rlhf_min.precision import autocast, keep_memory, resolve_device
from rlhf_min.reward_model import RewardModel
from rlhf_min.rollout import sample
from rlhf_min.runlog import RunLog

TEMPERATURE, PROMPT, ANSWER = 0.7, 10, 54  # the WARP report's
TINY = {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 4096}
SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}  # GPT-2 small
SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
           "num_key_value_heads": 3, "tie_word_embeddings": True}  # fmt: skip  # SmolLM2-135M's, but for its 30 blocks
LENGTHS = [39, 63, 80, 96, 114, 135, 157, 175, 196, 224, 256]  # deciles of HH-helpful's in SmolLM2's tokens, up to 256


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


def matrix_weights(model):
    """How many weights a token is multiplied with: all matrices, a tied head too, but no embedding."""
    lookups = {"wte", "wpe", "embed_tokens"}
    count = sum(w.numel() for name, w in model.named_parameters() if w.dim() == 2 and not lookups & {*name.split(".")})
    head = model.get_output_embeddings()
    return count + (head.weight.numel() if head is not None and model.config.tie_word_embeddings else 0)


class Turns:
    """The side of a worker process: a turn is taken when the other process says so, and its seconds are told."""

    def __init__(self, options):
        self.synchronise = torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None
        self.start, self.before, self.team = None, resident("VmRSS"), parallel.ALONE

    def pause(self):
        """What stands before each turn."""
        self.synchronise()
        now = time.perf_counter()
        peak = (
            torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else resident("VmHWM") - self.before
        )
        print(json.dumps({"seconds": self.start and now - self.start, "mib": peak}), flush=True)
        if not sys.stdin.readline():
            raise SystemExit
        self.start = time.perf_counter()

    def take(self, turn):
        """Take turns until the other process closes the line."""
        while True:
            self.pause()
            turn()

    def progress(self, title, steps, state=None):
        """In place of RunLog.progress."""
        for step in range(1, steps + 1):
            self.pause()
            yield step

    def step(self, **metrics):
        """In place of RunLog.step."""


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

    def __init__(self, shape, batch_size, answer=ANSWER):
        self.shape, self.batch_size, self.answer = shape, batch_size, answer

    def build(self, folder):
        tokenizer = tokenizer_of(self.shape["vocab_size"])
        for name, model in (("policy", gpt2(self.shape)),
                            ("judge", gpt2(self.shape, GPT2ForSequenceClassification, num_labels=1))):  # fmt: skip
            model.save_pretrained(f"{folder}/{name}")
            tokenizer.save_pretrained(f"{folder}/{name}")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.shape["vocab_size"] - 2, (8 * self.batch_size, PROMPT), generator=generator).tolist()
        self.prompts = [Prompt(row, tokenizer.decode(row)) for row in ids]

    def ours(self, folder, options, turns):
        flags = f"--batch-size {self.batch_size} --num-generations 2 --baseline leave-one-out --lr 1e-4 --steps 1000 "
        flags += f"--device {options.device} --precision {options.precision} --max-length {PROMPT + self.answer}"
        step_options = parse_options(train_reinforce.ReinforceOptions, flags.split())
        policy, tokenizer = load_policy(f"{folder}/policy", options.device, 64)
        judge = RewardModel(*load_classifier(f"{folder}/judge", options.device))
        train_reinforce.train_policy(policy, tokenizer, judge, self.prompts, get_weights(policy), step_options, turns)

    def theirs(self, folder, options, turns):
        from datasets import Dataset
        from trl import RLOOConfig, RLOOTrainer

        policy, tokenizer = load_policy(f"{folder}/policy", options.device, 64)
        judge, judge_tokenizer = load_classifier(f"{folder}/judge", options.device)
        arguments = RLOOConfig(num_generations=2, max_completion_length=self.answer, temperature=TEMPERATURE, top_k=0,
                               beta=0.05, **trl_arguments(folder, options, self.batch_size))  # fmt: skip
        data = Dataset.from_list([{"prompt": prompt.text} for prompt in self.prompts])
        RLOOTrainer(model=policy, reward_funcs=judge, args=arguments, train_dataset=data, processing_class=tokenizer,
                    reward_processing_classes=judge_tokenizer, callbacks=[pause_callback(turns)]).train()  # fmt: skip

    def floor(self, machine):
        policy = gpt2(self.shape)
        weights, head = matrix_weights(policy), policy.lm_head.weight.numel()
        tokens, answers = self.batch_size * (PROMPT + self.answer), self.batch_size * self.answer
        passes = 1 + 1 + 1 + 3  # sampling, judge, reference, policy forward and backward
        flops = 2 * passes * tokens * (weights - head) + 2 * (passes - 1) * answers * head
        return flops / machine.flops + (self.answer - 1) * machine.bytes * weights / machine.bandwidth


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
        model = add_lora(self._model(options), 16, 32.0, target_modules=["q_proj", "v_proj"])
        tokenizer = SimpleNamespace(pad_token_id=2)
        train_rm.train(model, tokenizer, self.rows, self.rows, step_options, turns)

    def theirs(self, folder, options, turns):
        from datasets import Dataset
        from peft import LoraConfig
        from trl import RewardConfig, RewardTrainer

        tokenizer = tokenizer_of(SMOLLM2["vocab_size"])
        arguments = RewardConfig(max_length=256, pad_token="w2", **trl_arguments(folder, options, self.batch_size))
        data = Dataset.from_list(
            [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected, _ in self.rows]
        )
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
        RewardTrainer(model=self._model(options), args=arguments, train_dataset=data, processing_class=tokenizer,
                      peft_config=lora, callbacks=[pause_callback(turns)]).train()  # fmt: skip

    def floor(self, machine):
        tokens = sum(len(chosen) + len(rejected) for chosen, rejected, _ in self.rows) / len(self.rows)
        weights = matrix_weights(smollm2(self.layers, LlamaForSequenceClassification, num_labels=1))
        return 4 * tokens * self.batch_size * weights / machine.flops  # forward, and backward to the inputs alone


class LoraPass:
    """Forward and backward of a causal language model with LoRA r 16 on q_proj and v_proj, 4 × 128 tokens."""

    peer = "PEFT"

    def __init__(self, layers):
        self.layers = layers

    def build(self, folder):
        self.tokens = torch.randint(3, 49000, (4, 128), generator=torch.Generator().manual_seed(0))

    def _turn(self, model, options, turns):
        tokens = self.tokens.to(options.device)

        def turn():
            with autocast(tokens.device, options.precision):
                model(input_ids=tokens, labels=tokens).loss.backward()

        turns.take(turn)

    def ours(self, folder, options, turns):
        model = smollm2(self.layers).to(options.device)
        self._turn(add_lora(model, 16, 32.0, target_modules=["q_proj", "v_proj"]), options, turns)

    def theirs(self, folder, options, turns):
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self._turn(get_peft_model(smollm2(self.layers).to(options.device), lora), options, turns)

    def floor(self, machine):
        return 4 * self.tokens.numel() * matrix_weights(smollm2(self.layers)) / machine.flops


class Sampling:
    """One answer to each prompt, none of which ends early."""

    peer = "transformers generate"

    def __init__(self, model, batch_size, answer=ANSWER):
        self.model, self.batch_size, self.answer = model, batch_size, answer

    def build(self, folder):
        vocabulary = self.model().config.vocab_size
        generator = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(3, vocabulary - 2, (self.batch_size, PROMPT), generator=generator)

    def ours(self, folder, options, turns):
        self._ours(self.model().to(options.device), options, turns)

    def _ours(self, model, options, turns):
        prompts, generator = self.prompts.tolist(), torch.Generator().manual_seed(0)

        def turn():
            with autocast(model.device, options.precision):
                sample(model, prompts, PROMPT + self.answer, TEMPERATURE, -1, 0, generator)

        turns.take(turn)

    def theirs(self, folder, options, turns):
        model = self.model().to(options.device)
        model.generation_config.eos_token_id = None
        tokens = self.prompts.to(options.device)

        def turn():
            with torch.no_grad(), autocast(tokens.device, options.precision):
                model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=True, top_k=0, top_p=1.0,
                               temperature=TEMPERATURE, max_new_tokens=self.answer, pad_token_id=0)  # fmt: skip

        turns.take(turn)

    def floor(self, machine):
        """Matrix products, or reading all weights and the cache so far for each token, whichever takes longer."""
        model = self.model()
        weights, config = matrix_weights(model), model.config
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        a_token = 2 * config.num_hidden_layers * heads * config.hidden_size // config.num_attention_heads
        cached = sum(self.batch_size * a_token * (PROMPT + t) for t in range(self.answer))
        flops = 2 * self.batch_size * (PROMPT + self.answer) * weights / machine.flops
        return max(flops, machine.bytes * (self.answer * weights + cached) / machine.bandwidth)


class AdapterSampling(Sampling):
    """The same with an adapter, against the model without one."""

    peer = "the plain model, ours"

    def ours(self, folder, options, turns):
        model = add_lora(self.model(), 16, 32.0, target_modules=["q_proj", "v_proj"])
        self._ours(model.to(options.device), options, turns)

    def theirs(self, folder, options, turns):
        self._ours(self.model().to(options.device), options, turns)


class Merge:
    """θ_slerp of two policies of GPT-2 small's 124M weights, in memory."""

    peer = "mergekit slerp"

    def build(self, folder):
        pass

    def _weights(self, options):
        weights = [get_weights(gpt2(SMALL).to(options.device)) for _ in range(3)]
        for seed, policy in enumerate(weights[1:]):
            generator = torch.Generator(options.device).manual_seed(seed)
            for tensor in policy.values():
                tensor += 0.01 * torch.randn(tensor.shape, generator=generator, device=tensor.device)
        return weights

    def ours(self, folder, options, turns):
        keep_memory()  # as the optimizer has done when train_warp.py merges
        init, *policies = self._weights(options)
        turns.take(lambda: warp.merge(init, policies))

    def theirs(self, folder, options, turns):
        from mergekit.merge_methods.slerp import slerp

        _, first, second = self._weights(options)
        half = torch.tensor([0.5], device=options.device)
        turns.take(lambda: {name: slerp(half, first[name][None], second[name][None])[0] for name in first})

    def floor(self, machine):
        return machine.merge


def measure_machine(options):
    """The rates of this machine: FLOP/s of a large product, bytes/s of reading, seconds to read three and write one
    new set of 124M weights."""
    synchronise = torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None
    keep_memory()
    a = torch.randn(2048, 2048, device=options.device)
    large = torch.randn(2**26, device=options.device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.precision, torch.float32)

    def best(function, repeats=7):
        function()
        seconds = []
        for _ in range(repeats):
            synchronise()
            start = time.perf_counter()
            function()
            synchronise()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    b = a.to(dtype)
    product = best(lambda: b @ b)
    reading = best(large.sum)
    weights = [torch.randn(2**20, device=options.device) for _ in range(3 * 118)]
    merge = best(lambda: [torch.add(x, y).add_(z) for x, y, z in zip(weights[:118], weights[118:236], weights[236:])])
    return SimpleNamespace(
        flops=2 * 2048**3 / product, bandwidth=4 * 2**26 / reading, merge=merge, bytes=b.element_size()
    )


ROWS = {
    "step-4x128": ReinforceStep(TINY, 64),
    "step-gpt2": ReinforceStep(SMALL, 8),
    "reward-lora": RewardStep(6, 4),
    "lora-pass": LoraPass(6),
    "adapter-sampling": AdapterSampling(lambda: smollm2(6), 16),
    "sample-4x128": Sampling(lambda: gpt2(TINY), 64),
    "sample-gpt2": Sampling(lambda: gpt2(SMALL), 64),
    "merge": Merge(),
    # for a GPU
    "sample-smollm2": Sampling(lambda: smollm2(30), 64, 128),
    "step-gpt2-64": ReinforceStep(SMALL, 64),
}  # fmt: skip
ON_A_CPU = list(ROWS)[:-2]


@dataclass
class SpeedOptions(RunOptions):
    """Measure seconds and memory against the peers."""

    script: ClassVar[str] = "benchmarks/speed.py"

    rows: list = option(ON_A_CPU, f"what to measure, of {', '.join(ROWS)}")
    repeats: int = option(7, "turns of either side", low=3)
    threads: int = option(0, "threads of a process; 0 takes one a core", low=0)
    side: str = option("both", "be the worker of one side: a turn for each line that comes in",
                       choices=["both", "ours", "theirs"])  # fmt: skip

    def check(self):
        super().check()
        for row in self.rows:
            if row not in ROWS:
                raise UserError(f"--rows {row}: there is no such row; there are {', '.join(ROWS)}")


def resident(field):
    """MiB of this process that Linux reports: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


class Worker:
    """A process that takes the turns of one side."""

    def __init__(self, name, side, options):
        command = [sys.executable, __file__, "--rows", name, "--side", side, "--device", options.device, "--precision",
                   options.precision, "--threads", str(options.threads)]  # fmt: skip
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        self.name = f"{name}, {side}"
        self.answer()  # it is ready

    def answer(self):
        """{"seconds", "mib"}: of the turn, and the largest memory so far."""
        for line in self.process.stdout:
            if line.startswith('{"seconds"'):
                return json.loads(line)
        raise UserError(f"{self.name}: the worker stopped; run it with --rows and --side to see why")

    def turn(self):
        """Take one turn."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        """No more turns."""
        self.process.stdin.close()
        self.process.wait()


def measure(name, options, machine):
    """A row of the table."""
    row = ROWS[name]
    workers = {side: Worker(name, side, options) for side in ("ours", "theirs")}
    turns = {side: [] for side in workers}
    for turn in range(-2, options.repeats):
        for side, worker in workers.items():
            taken = worker.turn()
            if turn >= 0:
                turns[side].append(taken["seconds"])
            memory = turns.setdefault(f"{side} MiB", [])
            memory.append(taken["mib"])
    for worker in workers.values():
        worker.close()
    with tempfile.TemporaryDirectory() as folder:
        row.build(folder)
        floor = row.floor(machine)
    ratios = [theirs / ours for ours, theirs in zip(turns["ours"], turns["theirs"])]
    spread = lambda values, digits=3: (
        f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
    )
    return {
        "row": name, "peer": row.peer, "ours, s": spread(turns["ours"]), "peer, s": spread(turns["theirs"]),
        "peer ÷ ours": spread(ratios), "floor, s": floor,
        "ours ÷ floor": round(statistics.median(turns["ours"]) / floor, 1),
        "ours, MiB": round(max(turns["ours MiB"])), "peer, MiB": round(max(turns["theirs MiB"])),
    }  # fmt: skip


@one_line_errors
def main(argv=None):
    options = parse_options(SpeedOptions, argv)
    options.check()
    resolve_device(options)
    torch.set_num_threads(options.threads or os.cpu_count())
    if options.side != "both":
        with tempfile.TemporaryDirectory() as folder:
            turns, row = Turns(options), ROWS[options.rows[0]]
            row.build(folder)
            getattr(row, options.side)(folder, options, turns)
    log = RunLog(options)
    with log.running():
        machine, rows = measure_machine(options), []
        for name in options.rows:
            rows.append(measure(name, options, machine))
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
        text = format_table(rows)
        text += (f"\n\n{options.device}, {options.precision}, {torch.get_num_threads()} threads: "
                 f"{machine.flops / 1e9:.0f} GFLOP/s, reading {machine.bandwidth / 1e9:.0f} GB/s")  # fmt: skip
        print("\n" + text)
        (log.folder / "table.md").write_text(text + "\n", encoding="utf-8")
        log.finish(rows=rows, flops=machine.flops, bandwidth=machine.bandwidth)


if __name__ == "__main__":
    main()
