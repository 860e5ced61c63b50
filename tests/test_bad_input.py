"""The command line: a mistake is exit code 2 and one line that names file, line or flag; nothing is overwritten."""

import contextlib
import gzip
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import evaluate
import rlhf_min.pretrain
import train_reinforce
import train_rm
import train_warp
from rlhf_min.data import load_pairs, load_prompts, read_prompts, read_rows, read_texts
from rlhf_min.errors import UserError, one_line_errors
from rlhf_min.lora import add_lora, save_adapter
from rlhf_min.model_files import LAYOUTS, check_fit, check_tensors, tensor_shapes
from rlhf_min.models import save_model
from rlhf_min.options import parse_options, refuse_mistakes
from rlhf_min.preflight import check_device
from rlhf_min.pretrain import train_tokenizer

MAINS = {
    "warp": train_warp.main, "reinforce": train_reinforce.main, "rm": train_rm.main, "evaluate": evaluate.main,
    "pretrain": rlhf_min.pretrain.main,
}  # fmt: skip
OPTIONS = {
    "warp": train_warp.WarpOptions, "reinforce": train_reinforce.ReinforceOptions, "rm": train_rm.RewardModelOptions,
    "evaluate": evaluate.EvaluateOptions, "pretrain": rlhf_min.pretrain.PretrainOptions,
}  # fmt: skip
FLAGS = {
    "warp": "--policy policy --reward-model judge --prompts prompts.jsonl --num-eval-prompts 3 --iterations 1 --runs 1 "
    "--steps 2 --batch-size 2 --max-length 16 --prompt-tokens 3 --device cpu --out out",
    "reinforce": "--policy policy --reward-model judge --prompts prompts.jsonl --num-eval-prompts 3 --steps 2 "
    "--batch-size 2 --max-length 16 --prompt-tokens 3 --device cpu --out out",
    "rm": "--data pairs.jsonl --base policy --epochs 1 --batch-size 8 --eval-fraction 0.3 --device cpu --out out",
    "evaluate": "--policies policy --judges judge --prompts prompts.jsonl --num-prompts 4 --max-length 16 "
    "--prompt-tokens 3 --device cpu --out out",
    "pretrain": "--data texts.txt --vocab-size 300 --layers 1 --width 32 --epochs 1 --device cpu --out out",
}
TEXTS = "The film was great.\nI slept.\n" * 10
FUNCTIONS = """
def nan(prompts, completions, **columns): return [float("nan")] * len(prompts)
def few(prompts, completions, **columns): return [1.0]
def text(prompts, completions, **columns): return ["good"] * len(prompts)
"""
USER, GOOD, BAD = ({"role": role, "content": text} for role, text in
                   (("user", "A film?"), ("assistant", "Great."), ("assistant", "Dull.")))  # fmt: skip
MESSAGES = [{"prompt": [{**USER, "content": f"Film {i}"}]} for i in range(12)]
SHORT, LONG = [{"text": letter} for letter in "bcde"], [{"prompt": "film " * 40 + letter} for letter in "bcde"]


class Case(NamedTuple):
    script: str
    flags: str  # behind the script's own flags; the last of two equal flags counts
    fragment: str  # what the error line must contain
    files: dict = {}  # noqa: RUF012  name → content: bytes, or rows of JSON Lines
    late: bool = False  # True for what only the run itself can find out: its new folder stays


def rows(*values):
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def run(script, **changes):
    """The run.json of a run of this file's flags, its options changed."""
    options_class = OPTIONS[script]
    options = asdict(parse_options(options_class, FLAGS[script].split())) | changes
    return json.dumps({"script": options_class.script, "options": options, "inputs": {}}).encode()


RUN = "out/run.json"
LAUGHS = b"judges:\n- &a [ha]\n" + b"".join(
    b"- &%c [%s]\n" % (98 + i, b", ".join([b"*%c" % (97 + i)] * 10)) for i in range(4)
)  # fmt: skip

CASES = {
    # files
    "missing prompts": Case("warp", "--prompts none.jsonl", "none.jsonl: no such file"),
    "missing pairs": Case("rm", "--data none.jsonl.gz", "none.jsonl.gz: no such file"),
    "missing validation pairs": Case("rm", "--eval-data none.jsonl", "none.jsonl: no such file"),
    "missing held-out prompts": Case("warp", "--eval-prompts none.jsonl", "none.jsonl: no such file"),
    "missing texts": Case("pretrain", "--data none.txt", "none.txt: no such file"),
    "data set without the hub": Case("rm", "--data owner/name", "owner/name is no local file"),
    "folder as file": Case("warp", "--prompts policy", "policy: no such file"),
    "empty prompts": Case("warp", "--prompts a.jsonl", "a.jsonl: the file is empty", {"a.jsonl": b""}),
    "blank pairs": Case("rm", "--data a.jsonl", "a.jsonl: the file is empty", {"a.jsonl": b"\n \n"}),
    "empty texts": Case("pretrain", "--data a.txt", "a.txt: the file is empty", {"a.txt": b"\n"}),
    "texts of blanks": Case(
        "pretrain", "--data a.txt", "a.txt: the file is empty", {"a.txt": b"\xef\xbb\xbf\n\xc2\xa0\n"}
    ),
    "gzip cut off": Case(
        "rm",
        "--data a.jsonl.gz",
        "a.jsonl.gz cannot be read",
        {"a.jsonl.gz": gzip.compress(rows({"text": "a", "label": 1}))[:-9]},
    ),
    "no gzip": Case("warp", "--prompts a.jsonl.gz", "a.jsonl.gz cannot be read", {"a.jsonl.gz": rows({"prompt": "a"})}),
    # lines
    "no JSON": Case(
        "warp", "--prompts a.jsonl", "a.jsonl, line 2: not JSON", {"a.jsonl": rows({"prompt": "a"}) + b"{oops\n"}
    ),
    "invalid UTF-8": Case("rm", "--data a.jsonl", "a.jsonl, line 1: not JSON", {"a.jsonl": b'{"text": "\xff"}\n'}),
    "half a surrogate pair": Case(
        "warp", "--prompts a.jsonl", "a.jsonl, line 1", {"a.jsonl": rows({"prompt": "\ud83d"})}
    ),
    "row is a list": Case("warp", "--prompts a.jsonl", "a.jsonl, line 1: list", {"a.jsonl": rows(["a"])}),
    "prompt row without fields": Case(
        "evaluate", "--prompts a.jsonl", "'text' must be", {"a.jsonl": rows({"title": "a"})}
    ),
    "text row without fields": Case(
        "pretrain", "--data a.jsonl", "a.jsonl, line 1: field 'text'", {"a.jsonl": rows({})}
    ),
    "pair without rejected": Case("rm", "--data a.jsonl", "no field 'rejected'", {"a.jsonl": rows({"chosen": "a"})}),
    "prompt of the wrong type": Case("warp", "--prompts a.jsonl", "'prompt' must be", {"a.jsonl": rows({"prompt": 3})}),
    "empty prompt": Case("warp", "--prompts a.jsonl", "'prompt' is empty", {"a.jsonl": rows({"prompt": " "})}),
    "empty answer": Case(
        "rm", "--data a.jsonl", "line 1: field 'rejected' is empty", {"a.jsonl": rows({"chosen": "a", "rejected": ""})}
    ),
    "bad label": Case(
        "rm",
        "--data a.jsonl",
        "line 2: 'label' must be 0",
        {"a.jsonl": rows(*({"text": "a", "label": y} for y in (1, 5)))},
    ),
    "one label only": Case("rm", "--data a.jsonl", "both labels", {"a.jsonl": rows({"text": "a", "label": 1})}),
    "chosen messages, rejected text": Case(
        "rm",
        "--data a.jsonl",
        "line 1: 'chosen' is a list",
        {"a.jsonl": rows({"chosen": [USER, GOOD], "rejected": "b"})},
    ),
    "message without role": Case(
        "rm",
        "--data a.jsonl",
        "line 1: every message of 'rejected'",
        {"a.jsonl": rows({"prompt": [USER], "chosen": [GOOD], "rejected": [{"role": "assistant"}]})},
    ),
    "answer by the user": Case(
        "rm",
        "--data a.jsonl",
        "line 1: 'chosen' must end in exactly one assistant message",
        {"a.jsonl": rows({"prompt": [USER], "chosen": [USER], "rejected": [BAD]})},
    ),
    "prompt by the assistant": Case(
        "warp", "--prompts a.jsonl", "line 1: the last message", {"a.jsonl": rows({"prompt": [USER, GOOD]})}
    ),
    "no chat template": Case("warp", "--prompts a.jsonl", "no chat template", {"a.jsonl": rows(*MESSAGES)}),
    # lengths and numbers of prompts and pairs
    "prompt too long": Case(
        "warp",
        "--prompts a.jsonl",
        "a.jsonl, line 1: the prompt has",
        {"a.jsonl": rows({"prompt": "film " * 40}, *MESSAGES)},
    ),
    "no room for an answer": Case("warp", "--prompt-tokens 16", "--prompt-tokens 16 leaves no room"),
    "texts too short": Case(
        "warp",
        "--prompts a.jsonl",
        "lower --prompt-tokens",
        {"a.jsonl": rows({"text": "a"}, *SHORT)},
    ),
    "hundreds of texts too short": Case(
        "warp", "--prompts a.jsonl", "lower --prompt-tokens", {"a.jsonl": rows(*SHORT) * 200}
    ),
    "hundreds of pairs too long": Case(
        "rm",
        "--data a.jsonl --max-length 8",
        "120 longer than 8 tokens",
        {"a.jsonl": rows(*[{"chosen": "great " * 9, "rejected": "dull " * 9}] * 120)},
    ),
    "beyond the context": Case("warp", "--max-length 65", "lower --max-length 65"),
    "too few prompts to hold out": Case("warp", "--num-eval-prompts 12", "--num-eval-prompts"),
    "too few prompts to evaluate on": Case("evaluate", "--num-prompts 13", "lower --num-prompts 13"),
    "too few pairs": Case("rm", "--batch-size 500", "lower --batch-size"),
    "all pairs too long": Case("rm", "--accept-weak --max-length 8", "10 longer than 8 tokens"),
    # models
    "a name that is too long": Case("warp", f"--prompts {'x' * 300}.jsonl", "File name too long"),
    "missing policy": Case("warp", "--policy nowhere", "nowhere: no such folder"),
    "missing run": Case("evaluate", "--policies runs/rm", "runs/rm: no such folder"),
    "missing second policy": Case("evaluate", "--policies policy runs/rm", "runs/rm: no such folder"),
    "hub unreachable": Case("rm", "--base owner/name", "the hub cannot be reached"),
    "folder without a model": Case("warp", "--policy empty", "empty: no config.json"),
    "no pad, no EOS": Case("warp", "--policy plain", "plain: its tokenizer has neither"),
    "base without pad and EOS": Case("rm", "--accept-weak --base plain", "plain: its tokenizer has neither"),
    "reward model as policy": Case("warp", "--policy judge", "judge"),
    "judge with two labels": Case(
        "warp", "--reward-model two_labels", "two_labels: a classifier with the labels LABEL_0, LABEL_1"
    ),
    "judge without a head": Case("evaluate", "--judges j=policy", "no sequence classifier"),
    "missing judge": Case("evaluate", "--judges gold=nowhere", "nowhere: no such folder"),
    "two judges of one name": Case("evaluate", "--judges judge judge", "the name judge is taken"),
    # reward functions
    "unknown module": Case("warp", "--reward-model nosuch.f", "No module named 'nosuch'"),
    "unknown function": Case("warp", "--reward-model functions.f", "no function f"),
    "reward NaN": Case("warp", "--reward-model functions.nan", "functions.nan returned nan", late=True),
    "too few rewards": Case("warp", "--reward-model functions.few", "1 numbers for 2 answers", late=True),
    "rewards of text": Case("evaluate", "--judges functions.text", "must return a list of numbers", late=True),
    # flags
    "eta": Case("warp", "--eta 1.5", "--eta must be between 0 and 1, not 1.5"),
    "mu": Case("warp", "--mu=-0.1", "--mu must be between 0 and 1, not -0.1"),
    "runs": Case("warp", "--runs 0", "--runs must be at least 1, not 0"),
    "lr NaN": Case("warp", "--lr nan", "--lr must be at least 0, not nan"),
    "lr no number": Case("rm", "--lr fast", "--lr: invalid float value"),
    "value missing": Case("warp", "--lr", "--lr: expected one argument"),
    "unknown choice": Case("warp", "--merge-by layer", "--merge-by"),
    "unknown precision": Case("evaluate", "--precision fp8", "--precision"),
    "unknown flag": Case("warp", "--gamma 0.9", "--gamma"),
    "misspelt flag": Case("rm", "--lerning-rate 1", "--lerning-rate"),
    "abbreviated flag": Case("warp", "--temp 1", "--temp"),
    "stray word": Case("pretrain", "stray", "unrecognized arguments: stray"),
    "seed too large": Case("warp", f"--seed {2**64}", "--seed"),
    "unknown device": Case("warp", "--device banana", "--device banana"),
    "missing device": Case("rm", "--accept-weak --device cuda:99", "--device cuda:99"),
    "width that heads cannot share": Case("pretrain", "--width 97", "--width"),
    "front and policies": Case("evaluate", "--front policy", "exclude each other"),
    # configuration files
    "config missing": Case("warp", "--config none.yaml", "--config none.yaml cannot be read"),
    "config is a folder": Case("warp", "--config policy", "--config policy cannot be read"),
    "config no YAML": Case("warp", "--config a.yaml", "--config a.yaml is not YAML", {"a.yaml": b"lr: [1\n"}),
    "config no text": Case("warp", "--config a.yaml", "--config a.yaml", {"a.yaml": b"\xff\xfe\x00"}),
    "config a list": Case("warp", "--config a.yaml", "--config a.yaml must hold", {"a.yaml": b"- lr\n- eta\n"}),
    "config empty": Case("rm", "--config a.yaml", "--config a.yaml must hold", {"a.yaml": b""}),
    "config key": Case("rm", "--config a.yaml", "did you mean batch_size?", {"a.yaml": b"batchsize: 8\n"}),
    "config value": Case("rm", "--config a.yaml", "--config a.yaml", {"a.yaml": b"lr: fast\n"}),
    "config range": Case("warp", "--config a.yaml", "--eta must be between 0 and 1", {"a.yaml": b"mu: 0.1\neta: 3\n"}),
    # the folder of the run
    "out holds a run": Case("warp", "--out old", "--out old holds another run", {"old/run.json": b"{}"}),
    "out holds a model": Case("rm", "--out old", "--out old holds", {"old/model/config.json": b"{}"}),
    "out of an evaluation": Case("evaluate", "--out old", "--out old holds", {"old/table.md": b"|"}),
    "out of a pretraining": Case("pretrain", "--out policy", "--out policy holds"),
    "out is a file": Case("warp", "--out old", "--out old cannot be made", {"old": b"precious"}),
    "out under a file": Case("rm", "--out old/new", "--out old/new cannot be made", {"old": b"precious"}),
    # fronts of runs
    "front without a run": Case("evaluate", "--policies --front empty", "--front empty: no run.json"),
    "front of another script": Case(
        "evaluate", "--policies --front old", "--front old", {"old/run.json": b'{"options": {"data": "x"}}'}
    ),
    "front with a broken run.json": Case(
        "evaluate", "--policies --front old", "old/run.json cannot", {"old/run.json": b"[1]"}
    ),
    "front of an unfinished run": Case(
        "evaluate", "--policies --front old", "no merged/ in it", {"old/run.json": b'{"options": {"policy": "policy"}}'}
    ),
    # at once: before anything that takes long
    "out before the embedded world": Case(
        "warp", "--policy runs/toy/policy --out old", "--out old", {"old/run.json": b"{}"}
    ),
    "pairs before the embedded world": Case(
        "rm", "--base runs/toy/policy --data none.jsonl", "none.jsonl: no such file"
    ),
    "validation that cannot pass": Case("rm", "--eval-fraction 0.1", "validat"),
    # what only the run shows
    "diverged": Case("warp", "--lr 1e20", "diverged", late=True),
    # REINFORCE
    "missing prompts of reinforce": Case("reinforce", "--prompts none.jsonl", "none.jsonl: no such file"),
    "missing held-out prompts of reinforce": Case("reinforce", "--eval-prompts none.jsonl", "none.jsonl: no such file"),
    "policy with a dot": Case("reinforce", "--policy my-model-1.5b", "my-model-1.5b: no such folder"),
    "policy of 5,000 letters": Case("warp", f"--policy {'x' * 5000}/y", "the hub cannot be reached"),
    "function as policy": Case("rm", "--base functions.few", "functions.few: no such folder"),
    "gradients clipped to 0": Case("warp", "--max-grad-norm 0", "--max-grad-norm must be at least"),
    "missing policy of reinforce": Case("reinforce", "--policy nowhere", "nowhere: no such folder"),
    "missing reward model": Case("reinforce", "--reward-model runs/rm", "runs/rm: no such folder"),
    "unknown reward function": Case("reinforce", "--reward-model functions.f", "no function f"),
    "reward model as policy of reinforce": Case("reinforce", "--policy judge", "judge"),
    "judge without a head of reinforce": Case("reinforce", "--reward-model policy", "no sequence classifier"),
    "judge of sentiments": Case(
        "reinforce", "--reward-model sentiment", "sentiment: a classifier with the labels NEGATIVE, POSITIVE"
    ),
    "judge of sentiments in an evaluation": Case("evaluate", "--judges s=sentiment", "NEGATIVE, POSITIVE"),
    "batch that k does not divide": Case(
        "reinforce", "--num-generations 3", "--batch-size 2 must be a multiple of --num-generations 3"
    ),
    "more generations than answers": Case("reinforce", "--num-generations 4", "must be a multiple"),
    "leave-one-out without others": Case("reinforce", "--baseline leave-one-out", "set --num-generations to 2 or more"),
    "unknown baseline": Case("reinforce", "--baseline ema", "--baseline: invalid choice: 'ema'"),
    "unknown sigma": Case("reinforce", "--sigma weight", "--sigma: invalid choice: 'weight'"),
    "negative beta": Case("reinforce", "--beta=-0.1", "--beta must be at least 0, not -0.1"),
    "sigma coefficient without a penalty": Case(
        "reinforce", "--sigma advantage --sigma-coefficient 2", "--sigma-coefficient goes with --sigma penalty only"
    ),
    "alpha without a rank": Case("warp", "--lora-alpha 8", "--lora-alpha goes with LoRA only"),
    "negative sigma coefficient": Case("reinforce", "--sigma-coefficient=-1", "--sigma-coefficient must be"),
    "no generations": Case("reinforce", "--num-generations 0", "--num-generations must be at least 1"),
    "flags of WARP": Case("reinforce", "--mu 0.01", "--mu"),
    "too few prompts of reinforce": Case("reinforce", "--num-eval-prompts 12", "lower --num-eval-prompts"),
    "all prompts too long": Case("reinforce", "--max-prompt-characters 5", "raise --max-prompt-characters 5"),
    "all prompts of WARP too long": Case("warp", "--max-prompt-characters 5", "raise --max-prompt-characters 5"),
    "all prompts of an evaluation too long": Case(
        "evaluate", "--max-prompt-characters 5", "raise --max-prompt-characters 5"
    ),
    "too few short prompts": Case("evaluate", "--max-prompt-characters 10 --num-prompts 12", "10 distinct prompts"),
    "negative length of prompts": Case("reinforce", "--max-prompt-characters=-1", "--max-prompt-characters must be"),
    "reward NaN in reinforce": Case(
        "reinforce", "--reward-model functions.nan", "functions.nan returned nan", late=True
    ),
    "diverged in reinforce": Case("reinforce", "--lr 1e20", "diverged", late=True),
    "out of reinforce holds a run": Case(
        "reinforce", "--out old", "--out old holds another run", {"old/run.json": b"{}"}
    ),
    "config key of reinforce": Case(
        "reinforce", "--config a.yaml", "did you mean num_generations?", {"a.yaml": b"num_generation: 8\n"}
    ),
    "out before the embedded world of reinforce": Case(
        "reinforce", "--policy runs/toy/policy --out old", "--out old", {"old/run.json": b"{}"}
    ),
    "prompts before the embedded world": Case(
        "reinforce", "--reward-model runs/toy/ordinal_reward_model --prompts none.jsonl", "none.jsonl: no such file"
    ),
    # LoRA
    "target that is not there": Case(
        "reinforce", "--lora-r 2 --lora-target-modules q_proj", "named q_proj; there are c_attn, c_fc, c_proj"
    ),
    "target of WARP that is not there": Case(
        "warp",
        "--lora-r 2 --lora-target-modules c_attn query",
        "--lora-target-modules: no linear module is named query",
    ),
    "target of a reward model that is not there": Case(
        "rm", "--lora-r 2 --lora-target-modules attn", "--lora-target-modules: no linear module is named attn"
    ),
    "negative rank": Case("reinforce", "--lora-r=-1", "--lora-r must be at least 0, not -1"),
    "negative rank of WARP": Case("warp", "--lora-r=-1", "--lora-r must be at least 0, not -1"),
    "half a rank": Case("rm", "--lora-r 0.5", "--lora-r: invalid int value"),
    "alpha NaN": Case("warp", "--lora-alpha nan", "--lora-alpha must be at least 1e-06, not nan"),
    "targets without a rank": Case("reinforce", "--lora-target-modules c_attn", "goes with LoRA only; set --lora-r"),
    "dropout without a rank": Case("rm", "--lora-dropout 0.1", "--lora-dropout goes with LoRA only; set --lora-r"),
    "ties of one reward": Case("rm", "--ties half", "--ties goes with --head ordinal only"),
    "a judge without doubt": Case("reinforce", "--sigma advantage", "judge gives no σ; name an ordinal reward model"),
    "dropout": Case("rm", "--lora-dropout 1.5", "--lora-dropout must be between 0 and 0.99, not 1.5"),
    "dropout of a policy": Case("reinforce", "--lora-dropout 0.1", "--lora-dropout"),
    "adapter without its base": Case("reinforce", "--policy orphan", "gone/base: no such folder"),
    "adapter without its base in an evaluation": Case(
        "evaluate", "--policies policy orphan", "gone/base: no such folder"
    ),
    "adapter without its base as base": Case("rm", "--base orphan", "gone/base: no such folder"),
    "judge's adapter without its base": Case("warp", "--reward-model orphan_judge", "gone/base: no such folder"),
    "judge's adapter as policy": Case("reinforce", "--policy adapted_judge", "adapted_judge"),
    "broken adapter": Case(
        "reinforce", "--policy old", "old/adapter_config.json cannot be read", {"old/adapter_config.json": b"{oops"}
    ),
    # reward models
    "unknown head": Case("rm", "--head ternary", "--head: invalid choice: 'ternary'"),
    "unknown ties": Case("rm", "--head ordinal --ties none", "--ties: invalid choice: 'none'"),
    "margin without a field": Case("rm", "--margin", "pairs.jsonl, line 1: a pair with a field 'margin' is needed"),
    "margin with an ordinal head": Case("rm", "--margin --head ordinal", "--margin goes with --head scalar only"),
    "margin of the wrong type": Case(
        "rm",
        "--margin --data a.jsonl",
        "a.jsonl, line 2: 'margin' must be a finite number, but is 'wide'",
        {"a.jsonl": rows(*({"chosen": "a", "rejected": "b", "margin": m} for m in (1, "wide")))},
    ),
    "margin NaN": Case(
        "rm",
        "--margin --data a.jsonl",
        "a.jsonl, line 1: 'margin' must be a finite number, but is nan",
        {"a.jsonl": b'{"chosen": "a", "rejected": "b", "margin": NaN}\n'},
    ),
    "margin of labelled texts": Case(
        "rm",
        "--margin --data a.jsonl",
        "a.jsonl, line 1: a pair with a field 'margin' is needed",
        {"a.jsonl": rows(*({"text": "a", "label": label, "margin": 1} for label in (0, 1)))},
    ),
    "margin of the training pairs only": Case(
        "rm",
        "--margin --data a.jsonl --eval-data pairs.jsonl",
        "pairs.jsonl, line 1: a pair with a field 'margin' is needed",
        {"a.jsonl": rows(*({"chosen": f"a{i}", "rejected": "b", "margin": 1} for i in range(20)))},
    ),
    # comparing at one KL
    "KL of a front": Case("evaluate", "--policies --front empty --match-kl 1", "--match-kl goes with --policies"),
    "judge that would head the z of another": Case(
        "evaluate", "--judges judge judge_z=functions.fluent", "the name judge_z is taken or cannot head a column"
    ),
    "judge whose name is empty": Case("evaluate", "--judges =judge", "the name is taken or cannot head a column"),
    "judge whose name breaks a table": Case("evaluate", "--judges a|b=judge", "the name a|b is taken or cannot"),
    "config that is a pipe": Case("warp", "--config /dev/fd/0", "--config /dev/fd/0 cannot be read: no such file"),
    "out below a file that is none": Case("warp", "--out /dev/null/x", "cannot be made: /dev/null is no folder"),
    "out that is no UTF-8": Case("warp", "--out caf\udce9", "a name that is no UTF-8"),
    "judge that exits as it is imported": Case(
        "warp", "--reward-model exits.reward", "exits.reward: SystemExit: 0", {"exits.py": b"import sys; sys.exit(0)"}
    ),
    "judge that exits": Case(
        "warp",
        "--reward-model leaves.reward",
        "leaves.reward raised SystemExit: bye",
        {"leaves.py": b"def reward(**x): raise SystemExit('bye')"},
        late=True,
    ),
    "vocabulary beyond memory": Case("pretrain", "--vocab-size 2000000000", "--vocab-size must be between"),
    "negative KL": Case("evaluate", "--match-kl=-1", "--match-kl must be at least 0"),
    "KL of another architecture": Case(
        "evaluate", "--policies policy wide --match-kl 0.1", "--match-kl needs policies of one architecture"
    ),
    "KL of another vocabulary": Case(
        "evaluate",
        "--policies policy other_words --match-kl 0.1",
        "other_words: --match-kl needs the vocabulary of policy",
    ),
    # what is nearly right
    "gzip cut off in the middle": Case(
        "warp",
        "--prompts a.jsonl.gz",
        "a.jsonl.gz cannot be read",
        {"a.jsonl.gz": gzip.compress(rows(*({"prompt": f"Film {i}"} for i in range(999))))[:2000]},
    ),
    "gzip of nothing": Case("rm", "--data a.jsonl.gz", "the file is empty", {"a.jsonl.gz": gzip.compress(b"")}),
    "a file of 0 bytes named .gz": Case("rm", "--data a.jsonl.gz", "the file is empty", {"a.jsonl.gz": b""}),
    "texts cut off": Case(
        "pretrain", "--data a.jsonl.gz", "cannot be read", {"a.jsonl.gz": gzip.compress(rows({"text": "a"}))[:-4]}
    ),
    "UTF-16": Case(
        "warp", "--prompts a.jsonl", "a.jsonl, line 1: not JSON", {"a.jsonl": '{"prompt": "a"}\n'.encode("utf-16")}
    ),
    "UTF-16 as configuration": Case(
        "rm", "--config a.yaml", "--config a.yaml cannot be read", {"a.yaml": "lr: 1e-4\n".encode("utf-16")}
    ),
    "Latin-1": Case(
        "rm", "--data a.jsonl", "line 1: not JSON", {"a.jsonl": '{"text": "fünf", "label": 1}\n'.encode("latin-1")}
    ),
    "Latin-1 texts": Case("pretrain", "--data a.txt", "a.txt, line 2", {"a.txt": b"fine\nf\xfcnf\n"}),
    "only a byte order mark": Case("warp", "--prompts a.jsonl", "a.jsonl", {"a.jsonl": b"\xef\xbb\xbf"}),
    "line ends of an old Mac": Case(
        "warp", "--prompts a.jsonl", "line 1: not JSON", {"a.jsonl": b'{"prompt": "a"}\r{"prompt": "b"}\r'}
    ),
    "a zero byte behind a row": Case(
        "warp", "--prompts a.jsonl", "line 1: not JSON", {"a.jsonl": b'{"prompt": "a"}\0\n'}
    ),
    "a row over two lines": Case("rm", "--data a.jsonl", "line 1: not JSON", {"a.jsonl": b'{"chosen":\n"a"}\n'}),
    "a JSON file of one list": Case("rm", "--data a.json", "line 1: list", {"a.json": b'[{"chosen": "a"}]\n'}),
    "two rows on a line": Case(
        "rm", "--data a.jsonl", "line 1: not JSON", {"a.jsonl": b'{"text": "a"} {"text": "b"}\n'}
    ),
    "deep nesting": Case("rm", "--data a.jsonl", "line 1: not JSON", {"a.jsonl": b'{"a":' * 100_000 + b"\n"}),
    "a 10 MB line that is no JSON": Case(
        "rm", "--data a.jsonl", "line 2: not JSON", {"a.jsonl": b"\n" + b"x" * 10_000_000}
    ),
    "a number of a million digits": Case(
        "rm",
        "--data a.jsonl",
        "line 1",
        {"a.jsonl": b'{"chosen": "a", "rejected": "b", "margin": 1%s}\n' % (b"0" * 1_000_000)},
    ),
    "a key twice in a row": Case(
        "warp", "--prompts a.jsonl", "a.jsonl, line 1", {"a.jsonl": b'{"prompt": "a", "prompt": "b"}\n'}
    ),
    "an answer twice in a row": Case(
        "rm", "--data a.jsonl", "a.jsonl, line 1", {"a.jsonl": b'{"chosen": "a", "rejected": "b", "chosen": "c"}\n'}
    ),
    "label as text": Case(
        "rm",
        "--data a.jsonl",
        "'label' must be 0 (bad) or 1 (good), but is '1'",
        {"a.jsonl": rows({"text": "a", "label": "1"})},
    ),
    "label of 5000 characters": Case(
        "rm", "--data a.jsonl", "'label' must be", {"a.jsonl": rows({"text": "a", "label": "x" * 5000})}
    ),
    "margin of 5000 characters": Case(
        "rm",
        "--data a.jsonl",
        "'margin' must be",
        {"a.jsonl": rows({"chosen": "a", "rejected": "b", "margin": "x" * 5000})},
    ),
    "label NaN": Case("rm", "--data a.jsonl", "but is nan", {"a.jsonl": rows({"text": "a", "label": float("nan")})}),
    "label null": Case("rm", "--data a.jsonl", "but is None", {"a.jsonl": rows({"text": "a", "label": None})}),
    "margin as text": Case(
        "rm", "--data a.jsonl", "but is '2'", {"a.jsonl": rows({"chosen": "a", "rejected": "b", "margin": "2"})}
    ),
    "text as number": Case(
        "pretrain", "--data a.jsonl", "'text' must be text, but is int", {"a.jsonl": rows({"text": 1})}
    ),
    "chosen equal to rejected": Case(
        "rm",
        "--accept-weak --data a.jsonl",
        "dropped: 20 identical",
        {"a.jsonl": rows(*[{"chosen": "a", "rejected": "a"}] * 20)},
    ),
    "message that is text": Case(
        "rm", "--data a.jsonl", "every message of", {"a.jsonl": rows({"chosen": [USER, "a"], "rejected": [USER, BAD]})}
    ),
    "content in parts": Case(
        "rm",
        "--data a.jsonl",
        "every message of 'chosen'",
        {
            "a.jsonl": rows(
                {"chosen": [USER, {**GOOD, "content": [{"type": "text", "text": "a"}]}], "rejected": [USER, BAD]}
            )
        },
    ),
    "prompt of no messages": Case("warp", "--prompts a.jsonl", "'prompt' must be", {"a.jsonl": rows({"prompt": []})}),
    "half a surrogate pair in a role": Case(
        "warp", "--prompts a.jsonl", "line 1", {"a.jsonl": rows({"prompt": [{**USER, "role": "\udc00"}]})}
    ),
    "half a surrogate pair in UTF-8": Case(
        "pretrain", "--data a.jsonl", "a.jsonl, line 1", {"a.jsonl": b'{"text": "\xed\xa0\x80"}\n'}
    ),
    "second line of held-out prompts": Case(
        "warp", "--eval-prompts a.jsonl", "a.jsonl, line 2: not JSON", {"a.jsonl": rows({"prompt": "a"}) + b"{"}
    ),
    "broken prompts to exclude": Case("evaluate", "--exclude a.jsonl", "a.jsonl, line 1", {"a.jsonl": b"{"}),
    # values
    "lr infinite": Case("warp", "--lr inf", "--lr"),
    "lr beyond all floats": Case("rm", "--lr 1e400", "--lr"),
    "beta infinite": Case("reinforce", "--beta inf", "--beta"),
    "temperature infinite": Case("evaluate", "--temperature inf", "--temperature"),
    "alpha infinite": Case("rm", "--lora-r 2 --lora-alpha inf", "--lora-alpha"),
    "weight decay infinite": Case("pretrain", "--weight-decay inf", "--weight-decay"),
    "infinite in a file": Case("warp", "--config a.yaml", "--lr", {"a.yaml": b"lr: .inf\n"}),
    "NaN in a file": Case(
        "warp", "--config a.yaml", "--mu must be between 0 and 1, not nan", {"a.yaml": b"mu: .nan\n"}
    ),
    "batch size with an exponent": Case("rm", "--batch-size 1e3", "--batch-size: invalid int value: '1e3'"),
    "steps of 1.0": Case("warp", "--config a.yaml", "--steps: invalid int value: '1.0'", {"a.yaml": b"steps: 1.0\n"}),
    "negative seed": Case("pretrain", "--seed -1", "--seed must be between 0 and 2147483647, not -1"),
    "seed of 5000 digits": Case("rm", f"--seed {'9' * 5000}", "--seed"),
    "negative save_every": Case("warp", "--save-every -1", "--save-every must be at least 0, not -1"),
    "lr beyond float32": Case("warp", "--lr 1e300", "--lr"),
    "vocabulary beyond 64 bits": Case("pretrain", f"--vocab-size {10**30}", "--vocab-size"),
    "length beyond 64 bits": Case("pretrain", f"--max-length {10**30}", "--max-length"),
    "rank beyond 64 bits": Case("rm", f"--lora-r {10**30}", "--lora-r"),
    "accumulation beyond 64 bits": Case("rm", f"--accept-weak --accumulation-steps {10**30}", "--accumulation-steps"),
    "lr in hexadecimal": Case("rm", "--lr 0x1", "--lr: invalid float value: '0x1'"),
    "lr without digits": Case("rm", "--lr=", "--lr: invalid float value: ''"),
    "flag without a name": Case("rm", "--=1", "unrecognized arguments: --=1"),
    "judge without a name": Case("evaluate", "--judges =", "--judges = names no judge"),
    "policy without a name": Case("warp", "--policy=", "--policy"),
    "prompts without a name": Case("warp", "--prompts=", "--prompts"),
    "config without a name": Case("warp", "--config=", "--config"),
    # YAML
    "config tag of Python": Case(
        "warp",
        "--config a.yaml",
        "--config a.yaml is not YAML",
        {"a.yaml": b'lr: !!python/object/apply:os.system ["echo > executed"]\n'},
    ),
    "config key twice": Case("warp", "--config a.yaml", "--config a.yaml", {"a.yaml": b"lr: 1.0e-4\nlr: 1.0e-3\n"}),
    "config key in two spellings": Case(
        "warp", "--config a.yaml", "--config a.yaml", {"a.yaml": b"batch-size: 2\nbatch_size: 4\n"}
    ),
    "config of deep nesting": Case(
        "rm", "--config a.yaml", "--config a.yaml is not YAML", {"a.yaml": b"lr: " + b"[" * 500}
    ),
    "config of two documents": Case("rm", "--config a.yaml", "is not YAML", {"a.yaml": b"lr: 1\n---\nlr: 2\n"}),
    "config with tabs": Case("rm", "--config a.yaml", "is not YAML", {"a.yaml": b"\tlr: 1\n"}),
    "config key a list": Case("rm", "--config a.yaml", "is not YAML", {"a.yaml": b"? [lr]\n: 1\n"}),
    "config key a number": Case("rm", "--config a.yaml", "unknown key 3", {"a.yaml": b"3: 1\n"}),
    "config of JSON rows": Case("rm", "--config pairs.jsonl", "--config pairs.jsonl"),
    "config number without digits": Case("rm", "--config a.yaml", "--config a.yaml", {"a.yaml": b'lr: !!float ""\n'}),
    "config boolean that is none": Case("rm", "--config a.yaml", "--config a.yaml", {"a.yaml": b"lr: !!bool x\n"}),
    "config date that is none": Case("rm", "--config a.yaml", "--config a.yaml", {"a.yaml": b"lr: !!timestamp x\n"}),
    "config value a mapping": Case("rm", "--config a.yaml", "", {"a.yaml": b"eval_data: {train: pairs.jsonl}\n"}),
    "config list of lists": Case("warp", "--config a.yaml", "", {"a.yaml": b"judges: [[judge]]\n"}),
    "config of a hundred thousand laughs": Case(
        "warp", "--config a.yaml", "--config a.yaml", {"a.yaml": LAUGHS + b"seed: *e\n"}
    ),
    "data with a zero byte": Case("rm", "--config a.yaml", "no such file", {"a.yaml": b'eval_data: "a\\0b"\n'}),
    "prompts with a zero byte": Case("warp", "--config a.yaml", "no such file", {"a.yaml": b'eval_prompts: "a\\0b"\n'}),
    "judge with a zero byte": Case("warp", "--config a.yaml", "no such folder", {"a.yaml": b'judges: "a\\0b"\n'}),
    # going on with a run
    "resume without out": Case("warp", "--out= --resume", "--resume needs --out"),
    "resume in a folder of no run": Case("rm", "--resume", "--out out holds", {"out/letters.txt": b"precious"}),
    "resume of another script": Case(
        "warp", "--resume", f"{RUN} is not that of a run of train_warp.py", {RUN: run("rm")}
    ),
    "resume of a run without a script": Case("rm", "--resume", f"{RUN} is not that of a run", {RUN: b"{}"}),
    "resume of a broken run": Case("rm", "--resume", f"{RUN} cannot be read", {RUN: b'{"script": '}),
    "resume of an empty run": Case("rm", "--resume", f"{RUN} cannot be read", {RUN: b""}),
    "resume of a deep run": Case("rm", "--resume", f"{RUN} cannot be read", {RUN: b'{"a":' * 100_000}),
    "resume of a run that is a list": Case("rm", "--resume", f"{RUN} cannot be read", {RUN: b"[1]"}),
    "resume of options that are a list": Case(
        "rm", "--resume", f"{RUN} is not that of a run", {RUN: b'{"script": "train_rm.py", "options": [1]}'}
    ),
    "resume with another lr": Case("warp", "--resume --lr 1", "--lr is 1e-05 there, not 1.0", {RUN: run("warp")}),
    "resume with another list": Case(
        "warp", "--resume --judges judge", "--judges is [] there, not ['judge']", {RUN: run("warp")}
    ),
    "resume of an unknown option": Case("rm", "--resume", f"{RUN}: unknown key 'gamma'", {RUN: run("rm", gamma=1)}),
    "resume of an option of the wrong type": Case(
        "rm", "--resume", f"{RUN}: argument --lr", {RUN: run("rm", lr="fast")}
    ),
    "resume of an option out of its range": Case(
        "rm", "--resume", "--lr must be at least 0", {RUN: run("rm", lr=-1.0)}
    ),
    "resume of a run of other inputs": Case(
        "pretrain", "--resume", "texts.txt: not what the run in out", {RUN: run("pretrain")}
    ),
    "resume of a run whose inputs are a list": Case(
        "pretrain",
        "--resume",
        "texts.txt: not what the run in out began with",
        {RUN: run("pretrain").replace(b'"inputs": {}', b'"inputs": [1]')},
    ),
}

PARAMETERS = [pytest.param(case, id=name) for name, case in CASES.items()]


class Trap:
    """Unpickled, it would leave a file `executed`."""

    def __reduce__(self):
        return os.system, ("echo > executed",)


REMOTE = """
open("executed", "w").close()
class Model: pass
Config = Tokenizer = Model
"""


def put(**files):
    """Write files into a model's folder; in a name, __ stands for a dot; None takes the file away."""

    def change(folder):
        for name, content in files.items():
            path = folder / name.replace("__", ".")
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    return change


def also(name, **values):
    """Put values into one of a folder's JSON files; None takes the key away."""

    def change(folder):
        old = json.loads((folder / name).read_text(encoding="utf-8"))
        new = {key: value for key, value in (old | values).items() if value is not None}
        put(**{name.replace(".", "__"): new})(folder)

    return change


def cut(length, name="model.safetensors"):
    """Leave so many bytes of a file; negative: take so many away."""
    return lambda folder: put(**{name.replace(".", "__"): (folder / name).read_bytes()[:length]})(folder)


def tensors(change, name="model.safetensors"):
    """Have `change` edit the dictionary of a folder's tensors."""

    def edit(folder):
        values = load_file(folder / name)
        change(values)
        (folder / name).unlink()
        save_file(
            {key: tensor.contiguous() for key, tensor in values.items()}, folder / name, metadata={"format": "pt"}
        )

    return edit


def as_folder(name):
    """A folder of a file's name in its place."""

    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def both(*changes):
    """One change after the other."""
    return lambda folder: [change(folder) for change in changes]


class Broken(NamedTuple):
    model: str  # of models_folder, whose copy is the folder `broken`
    change: Callable  # of that folder
    fragment: str = "broken"
    flags: tuple = ("reinforce --policy broken",)
    files: dict = {}  # noqa: RUF012


POLICY = ("reinforce --policy broken", "rm --base broken")
UNREAD = (
    "v_head.ln_f.weight",
    "ema.wte.weight",
    "v_head.0.weight",
    "v_head.1.weight",
    "transformer.h.2.ln_1.weight",
    "h.0.ln_1.weight",
    "h.1.ln_1.weight",
)
JUDGE = ("evaluate --judges broken",)
JUDGES = ("warp --reward-model broken", *JUDGE)
PICKLE = pickle.dumps(Trap())
WTE, ATTENTION, HEAD = "transformer.wte.weight", "transformer.h.0.attn.c_attn", "score.weight"
LORA_A, LORA_B = (f"base_model.model.{ATTENTION}.lora_{side}.weight" for side in "AB")
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
CHAT = {"prompts.jsonl": rows(*MESSAGES)}
BROKEN = {
    # weights
    "weights cut off in the header": Broken("policy", cut(100), "model.safetensors cannot be read"),
    "weights cut off in the middle": Broken("policy", cut(-1000), "model.safetensors cannot be read"),
    "weights without the last byte": Broken("policy", cut(-1), "model.safetensors cannot be read"),
    "weights of 0 bytes": Broken("policy", cut(0), "model.safetensors cannot be read"),
    "a header of 2^64 bytes": Broken(
        "policy", put(model__safetensors=b"\xff" * 99), "model.safetensors cannot be read"
    ),
    "text for weights": Broken(
        "policy",
        put(model__safetensors=b"version https://git-lfs.github.com/spec/v1\n"),
        "model.safetensors cannot be read",
    ),
    "a folder for weights": Broken("policy", as_folder("model.safetensors")),
    "a tensor of another shape": Broken(
        "policy", tensors(lambda t: t.update({WTE: t[WTE][:-7]})), f"lack 1 tensors, such as {WTE}", POLICY
    ),
    "a missing tensor": Broken(
        "policy", tensors(lambda t: t.pop(f"{ATTENTION}.weight")), f"lack 1 tensors, such as {ATTENTION}.weight", POLICY
    ),
    "no tensors": Broken("policy", tensors(lambda t: t.clear())),
    "tensors of other names": Broken("policy", tensors(lambda t: [t.update({f"x.{k}": t.pop(k)}) for k in list(t)])),
    "weights NaN": Broken(
        "policy",
        tensors(lambda t: t[WTE].fill_(float("nan"))),
        f"{WTE} is not finite",
    ),
    "an infinite bias": Broken(
        "policy",
        tensors(lambda t: t[f"{ATTENTION}.bias"][1:2].fill_(float("-inf"))),
        f"{ATTENTION}.bias is not finite",
        POLICY,
    ),
    "an index of shards that are missing": Broken(
        "policy",
        both(
            put(model__safetensors__index__json={"metadata": {}, "weight_map": {WTE: "a.safetensors"}}),
            put(model__safetensors=None),
        ),
        "a.safetensors cannot be read",
    ),
    "pickled weights": Broken(
        "policy", put(model__safetensors=None, pytorch_model__bin=PICKLE), "pickled weights could run code", POLICY
    ),
    "pickled weights beside an empty file": Broken("policy", put(model__safetensors=b"", pytorch_model__bin=PICKLE)),
    "pickled weights under the other name": Broken("policy", put(model__safetensors=PICKLE)),
    "an index of pickled weights": Broken(
        "policy",
        put(
            model__safetensors__index__json={"metadata": {}, "weight_map": {WTE: "pytorch_model.bin"}},
            model__safetensors=None,
            pytorch_model__bin=PICKLE,
        ),
    ),
    # config.json
    "config.json of 0 bytes": Broken("policy", put(config__json=b""), "config.json cannot be read"),
    "config.json a list": Broken("policy", put(config__json=[1]), "config.json cannot be read"),
    "config.json of deep nesting": Broken("policy", put(config__json=b'{"a":' * 99_999), "config.json cannot be read"),
    "config.json in Latin-1": Broken("policy", put(config__json=b'{"a": "\xfc"}'), "config.json cannot be read"),
    "a folder for config.json": Broken("policy", as_folder("config.json"), "no config.json"),
    "no config.json": Broken("policy", put(config__json=None), "no config.json"),
    "unknown model type": Broken("policy", also("config.json", model_type="evil")),
    "no model type": Broken("policy", also("config.json", model_type=None)),
    "model type a number": Broken("policy", also("config.json", model_type=3)),
    "layers as text": Broken("policy", also("config.json", n_layer="two")),
    "one layer more than there are weights": Broken("policy", also("config.json", n_layer=3), "lack 12 tensors"),
    "a width that its heads cannot share": Broken("policy", also("config.json", n_head=3)),
    "positions as text": Broken("policy", also("config.json", n_positions="64")),
    "no vocabulary": Broken("policy", also("config.json", vocab_size=-1)),
    "code of its own": Broken(
        "policy",
        both(
            put(evil__py=REMOTE.encode()),
            also(
                "config.json",
                model_type="evil",
                auto_map={
                    name: f"evil.{kind}"
                    for name, kind in (
                        ("AutoConfig", "Config"),
                        ("AutoModelForCausalLM", "Model"),
                        ("AutoModelForSequenceClassification", "Model"),
                    )
                },
            ),
        ),
        flags=POLICY,
    ),
    "a tokenizer with code of its own": Broken(
        "policy",
        both(
            put(evil__py=REMOTE.encode(), tokenization_evil__py=REMOTE.encode(), tokenizer__json=None),
            also(
                "tokenizer_config.json",
                tokenizer_class="EvilTokenizer",
                auto_map={"AutoTokenizer": ["evil.Tokenizer", None]},
            ),
        ),
    ),
    # tokenizer and template
    "tokenizer.json of 0 bytes": Broken("policy", put(tokenizer__json=b"")),
    "tokenizer.json of no tokenizer": Broken("policy", put(tokenizer__json={"model": {"type": "none"}})),
    "tokenizer.json cut off": Broken("policy", cut(-99, "tokenizer.json")),
    "no tokenizer": Broken("policy", put(tokenizer__json=None, tokenizer_config__json=None), "broken", POLICY),
    "tokenizer_config.json cut off": Broken(
        "policy", cut(-9, "tokenizer_config.json"), "tokenizer_config.json cannot be read"
    ),
    "tokenizer_config.json a list": Broken(
        "policy", put(tokenizer_config__json=[]), "tokenizer_config.json cannot be read"
    ),
    "EOS a number": Broken("policy", also("tokenizer_config.json", eos_token=3)),
    "generation_config.json of 0 bytes": Broken("policy", put(generation_config__json=b"")),
    "EOS of the generation config as text": Broken("policy", also("generation_config.json", eos_token_id="0")),
    "a tokenizer without tokens": Broken(
        "policy",
        also("tokenizer.json", normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": ""}),
        "prompts.jsonl, line 1: the prompt has no tokens",
    ),
    "a template that raises": Broken(
        "policy",
        put(chat_template__jinja=b"{{ raise_exception('no\nfilms') }}"),
        "refuses a conversation: no films",
        files=CHAT,
    ),
    "a template of wrong syntax": Broken(
        "policy", put(chat_template__jinja=b"{% for %}"), "its chat template refuses", files=CHAT
    ),
    "a template that divides by zero": Broken(
        "policy", put(chat_template__jinja=b"{{ 1 / 0 }}"), "its chat template refuses", files=CHAT
    ),
    "a template that leaves its sandbox": Broken(
        "policy",
        put(chat_template__jinja=b"{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "its chat template refuses",
        files=CHAT,
    ),
    "a template that is a number": Broken("policy", also("tokenizer_config.json", chat_template=3), files=CHAT),
    # judges
    "judge cut off": Broken("judge", cut(-1000), "model.safetensors cannot be read", flags=JUDGE),
    "judge without its head": Broken(
        "judge", tensors(lambda t: t.pop(HEAD)), f"lack 1 tensors, such as {HEAD}", flags=JUDGE
    ),
    "judge whose head has another shape": Broken(
        "judge", tensors(lambda t: t.update({HEAD: torch.zeros(3, 16)})), f"lack 1 tensors, such as {HEAD}", flags=JUDGE
    ),
    "judge without a tensor": Broken(
        "judge",
        tensors(lambda t: t.pop(f"{ATTENTION}.bias")),
        f"lack 1 tensors, such as {ATTENTION}.bias",
        flags=JUDGES,
    ),
    "judge with a tensor of another shape": Broken(
        "judge", tensors(lambda t: t.update({WTE: t[WTE][:, :8]})), f"lack 1 tensors, such as {WTE}", flags=JUDGES
    ),
    "pickled judge": Broken(
        "judge", put(model__safetensors=None, pytorch_model__bin=PICKLE), "pickled weights could run code", flags=JUDGES
    ),
    "judge of ratings out of order": Broken(
        "two_labels", also("config.json", id2label={"0": "2", "1": "1"}), "the labels 2, 1", flags=JUDGE
    ),
    "judge whose labels are a list": Broken("two_labels", also("config.json", id2label=["1", "2"]), flags=JUDGE),
    "judge whose labels are no numbers": Broken(
        "two_labels", also("config.json", id2label={"a": "1", "b": "2"}), flags=JUDGE
    ),
    "judge NaN": Broken("judge", tensors(lambda t: t[HEAD].fill_(float("nan"))), f"{HEAD} is not finite", flags=JUDGES),
    # adapters
    "adapter of another base": Broken(
        "adapted_judge",
        also(ADAPTER_CONFIG, base_model_name_or_path="wide"),
        f"{ATTENTION} does not fit the model",
        flags=JUDGES,
    ),
    "adapter of a module that is not there": Broken(
        "adapted_judge",
        tensors(lambda t: [t.update({k.replace("h.0", "h.9"): t.pop(k)}) for k in (LORA_A, LORA_B)], ADAPTER),
        "transformer.h.9.attn.c_attn does not fit the model",
        flags=JUDGE,
    ),
    "adapter of a module that is no matrix": Broken(
        "adapted_judge",
        tensors(lambda t: [t.update({k.replace("attn.c_attn", "ln_1"): t.pop(k)}) for k in (LORA_A, LORA_B)], ADAPTER),
        "ln_1 does not fit the model",
        flags=JUDGE,
    ),
    "adapter NaN": Broken(
        "adapted_judge",
        tensors(lambda t: t[LORA_B][0].fill_(float("nan")), ADAPTER),
        f"{LORA_B} is not finite",
        flags=JUDGES,
    ),
    "adapter without its B": Broken(
        "adapted_judge", tensors(lambda t: t.pop(LORA_B), ADAPTER), "and lora_B ()", flags=JUDGE
    ),
    "adapter without its A": Broken(
        "adapted_judge", tensors(lambda t: t.pop(LORA_A), ADAPTER), "has lora_A () and", flags=JUDGE
    ),
    "adapter without its head": Broken(
        "adapted_judge", tensors(lambda t: t.pop(f"base_model.model.{HEAD}"), ADAPTER), flags=JUDGE
    ),
    "adapter with the head alone": Broken(
        "adapted_judge",
        tensors(lambda t: [t.pop(k) for k in list(t) if "lora" in k], ADAPTER),
        "no lora_A and lora_B",
        flags=JUDGE,
    ),
    "adapter of two ranks": Broken(
        "adapted_judge",
        tensors(lambda t: t.update({LORA_A: t[LORA_A][:1]}), ADAPTER),
        "has lora_A (1, 16) and lora_B (48, 2), which does not fit r 2",
        flags=JUDGE,
    ),
    "adapter of rank 0": Broken(
        "adapted_judge",
        tensors(lambda t: t.update({LORA_A: t[LORA_A][:0], LORA_B: t[LORA_B][:, :0]}), ADAPTER),
        flags=JUDGE,
    ),
    "adapter of another rank than its config": Broken(
        "adapted_judge", also(ADAPTER_CONFIG, r=16), "broken", flags=JUDGE
    ),
    "adapter whose alpha is text": Broken(
        "adapted_judge", also(ADAPTER_CONFIG, lora_alpha="4"), "must be a number, not '4'", flags=JUDGE
    ),
    "adapter whose alpha is NaN": Broken(
        "adapted_judge", also(ADAPTER_CONFIG, lora_alpha=float("nan")), "broken", flags=JUDGE
    ),
    "adapter without alpha": Broken(
        "adapted_judge", also(ADAPTER_CONFIG, lora_alpha=None), "must be a number, not None", flags=JUDGE
    ),
    "adapter of another kind": Broken(
        "adapted_judge", also(ADAPTER_CONFIG, peft_type="IA3"), "peft_type IA3", flags=JUDGE
    ),
    "adapter with code of its own": Broken(
        "adapted_judge",
        both(
            put(evil__py=REMOTE.encode()),
            also(ADAPTER_CONFIG, peft_type="EVIL", auto_mapping={"parent_library": "evil"}),
        ),
        "peft_type EVIL",
        flags=JUDGE,
    ),
    "adapter that names no base": Broken(
        "adapted_judge", also(ADAPTER_CONFIG, base_model_name_or_path=None), "names no base_model", flags=JUDGE
    ),
    "adapter whose base is a number": Broken(
        "adapted_judge", also(ADAPTER_CONFIG, base_model_name_or_path=3), "names no base_model", flags=JUDGE
    ),
    "adapter that is its own base": Broken(
        "adapted_judge", also(ADAPTER_CONFIG, base_model_name_or_path="broken"), flags=JUDGE
    ),
    "adapter config a list": Broken(
        "adapted_judge", put(adapter_config__json=[1]), "adapter_config.json cannot be read", flags=JUDGE
    ),
    "adapter cut off": Broken(
        "adapted_judge", cut(-9, ADAPTER), "adapter_model.safetensors cannot be read", flags=JUDGE
    ),
    "pickled adapter": Broken(
        "adapted_judge",
        put(adapter_model__safetensors=None, adapter_model__bin=PICKLE),
        "pickled weights could run code",
        flags=JUDGES,
    ),
    "adapter of a pickled base": Broken(
        "adapted_judge",
        both(put(pytorch_model__bin=PICKLE), also(ADAPTER_CONFIG, base_model_name_or_path="pickled")),
        "pickled",
        flags=JUDGE,
    ),
}


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory, tiny_tokenizer):
    """Policies and judges, good and bad: see the names; adapters whose base is gone, and one whose base is not."""
    folder = tmp_path_factory.mktemp("models")
    size = {"vocab_size": len(tiny_tokenizer), "n_positions": 64, "n_layer": 2, "n_embd": 16, "n_head": 2}
    save_model(GPT2LMHeadModel(GPT2Config(**size)), tiny_tokenizer, folder / "policy")
    save_model(GPT2LMHeadModel(GPT2Config(**{**size, "n_embd": 32})), tiny_tokenizer, folder / "wide")
    words = train_tokenizer(["no word of a film"], 270)
    save_model(GPT2LMHeadModel(GPT2Config(**size)), words, folder / "other_words")
    sentiments = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    for name, labels in (("judge", {"num_labels": 1}), ("two_labels", {"num_labels": 2}), ("sentiment", sentiments)):
        classifier = GPT2ForSequenceClassification(GPT2Config(**size, **labels, pad_token_id=1))
        save_model(classifier, tiny_tokenizer, folder / name)
    for name, kind, base in (("orphan", GPT2LMHeadModel, "gone/base"),
                             ("orphan_judge", GPT2ForSequenceClassification, "gone/base"),
                             ("adapted_judge", GPT2ForSequenceClassification, "policy"),
                             ("adapter", GPT2LMHeadModel, "policy")):  # fmt: skip
        model = kind(GPT2Config(**size, num_labels=1, pad_token_id=1))
        model.config._name_or_path = base
        save_adapter(add_lora(model, r=2, alpha=4), folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    save_model(GPT2LMHeadModel(GPT2Config(**size)), PreTrainedTokenizerFast(tokenizer_object=words), folder / "plain")
    (folder / "empty").mkdir()
    before = snapshot(folder)
    yield folder
    assert snapshot(folder) == before


@pytest.fixture
def workplace(tmp_path, monkeypatch, models_folder):
    """The working directory: models, 12 prompts, 20 pairs, texts; whoever builds the embedded world fails the test."""
    for path in models_folder.iterdir():  # links, to save time: see the end of models_folder
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "prompts.jsonl").write_bytes(rows(*({"prompt": f"The film {i}"} for i in range(12))))
    pairs = ({"prompt": f"The film {i}", "chosen": " was great.", "rejected": " was dull."} for i in range(20))
    (tmp_path / "pairs.jsonl").write_bytes(rows(*pairs))
    (tmp_path / "texts.txt").write_text(TEXTS)
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "functions", raising=False)
    for name in ("rlhf_min.toy.ensure_run", "rlhf_min.toy.ensure_texts"):
        monkeypatch.setattr(name, lambda *arguments: pytest.fail("built the embedded world"))
    return tmp_path


def snapshot(folder):
    """{path: content} of all files below a folder, and its empty folders."""
    paths = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.mark.parametrize("case", PARAMETERS)
def test_a_mistake_is_one_line_and_exit_code_2(workplace, capfd, recwarn, case):
    """T59, T69: exit code 2, one line on stderr that names what to mend, and no file written or changed."""
    for name, content in case.files.items():
        (workplace / name).parent.mkdir(parents=True, exist_ok=True)
        (workplace / name).write_bytes(content)
    check_refusal(workplace, capfd, case)
    assert not recwarn.list  # a warning is a line, too


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.late])
def test_a_mistake_is_refused_early(workplace, monkeypatch, capfd, name):
    """T59: the same line comes from the checks before torch's import."""
    case = CASES[name]
    for file, content in case.files.items():
        (workplace / file).parent.mkdir(parents=True, exist_ok=True)
        (workplace / file).write_bytes(content)
    code, line = refused_early(monkeypatch, capfd, case.script, case.flags)
    assert (code, line.count("\n")) == (2, 1) and case.fragment in line


def refused_early(monkeypatch, capfd, script, flags):
    """(the exit code of refuse_mistakes with these flags behind a script's own, None if it lets them pass, stderr)"""
    monkeypatch.setattr("sys.argv", ["script", *FLAGS[script].split(), *flags.split()])
    code = None
    try:
        refuse_mistakes(OPTIONS[script])
    except SystemExit as stop:
        code = stop.code
    return code, capfd.readouterr().err


def test_a_rank_is_checked_with_its_targets(workplace, monkeypatch, capfd):
    """A target that is there passes; so does any target of an adapter, whose base is not looked into."""
    for flags in ("--lora-r 2 --lora-target-modules c_attn c_proj lm_head", "--lora-r 2"):
        assert refused_early(monkeypatch, capfd, "warp", flags) == (None, "")


TEMPLATE = b"{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}A:"
RATINGS = {"id2label": {"0": "1", "1": "2"}}
LONGER, CHATTY = "--policy copy --max-length 99", "--policy copy --prompts chat.jsonl --max-length 64"
NAMED, MARK = [{"name": "default", "template": TEMPLATE.decode()}], "<a long mark>"
NO_JSON = put(tokenizer__json=None, vocab__json={}, merges__txt=b"")
LEGAL = {  # name → script, flags, and changes of copies of models, {copy: (original, change)}
    "adapter as judge": ("warp", "--reward-model adapted_judge --judges a=adapted_judge", {}),
    "function as judge": ("warp", "--reward-model functions.few", {}),
    "adapter as policy": ("reinforce", "--policy adapter", {}),
    "judge as base": ("rm", "--accept-weak --base judge", {}),
    "adapted judge as base": ("rm", "--accept-weak --base adapted_judge", {}),
    "ratings and their sigma": (
        "reinforce", "--reward-model copy --sigma advantage", {"copy": ("two_labels", also("config.json", **RATINGS))},
    ),
    "another file of safetensors": (
        "warp", "--policy copy", {"copy": ("policy", put(consolidated__safetensors=b"version https://git-lfs"))},
    ),
    "template of a tokenizer that goes by the model": (
        "warp", CHATTY,
        {"copy": ("policy", both(put(chat_template__jinja=TEMPLATE),
                                 also("tokenizer_config.json", tokenizer_class=None)))},
    ),
    "world that is made later": ("reinforce", "--policy runs/toy/policy --reward-model runs/toy/reward_model", {}),
    "sigma of a world that is made later": (
        "reinforce", "--reward-model runs/toy/ordinal_reward_model --sigma penalty", {},
    ),
    "adapter on a world that is made later": (
        "warp", "--policy copy",
        {"copy": ("adapter", also(ADAPTER_CONFIG, base_model_name_or_path="runs/toy/policy/model"))},
    ),
    "judge of one unnamed label": (
        "warp", "--reward-model copy", {"copy": ("judge", also("config.json", id2label=None, num_labels=1))},
    ),
    "context of another name": (
        "warp", LONGER,
        {"copy": ("policy", also("config.json", n_positions=None, max_position_embeddings=99))},
    ),
    "context by default": ("warp", LONGER, {"copy": ("policy", also("config.json", n_positions=None))}),
    "tokenizer without tokenizer.json": (
        "warp", "--policy copy --max-length 8", {"copy": ("policy", NO_JSON)},
    ),
    "prompts that leave room for one token": ("warp", "--max-length {just} --prompts prompts.jsonl", {}),
    "template with special tokens": (
        "warp", CHATTY, {"copy": ("policy", put(chat_template__jinja=TEMPLATE))},
    ),
    "one template of several": (
        "warp", CHATTY,
        {"copy": ("policy", also("tokenizer_config.json", chat_template=NAMED))},
    ),
    "special tokens that tokenizer.json does not know": (
        "warp", "--policy copy --prompts marked.jsonl",
        {"copy": ("policy", also("tokenizer_config.json", eos_token=MARK))},
    ),
    "long texts behind a thousand short ones": ("warp", "--prompts growing.jsonl", {}),
    "short pairs behind a thousand long ones": ("rm", "--accept-weak --data shrinking.jsonl --max-length 24", {}),
    "several tokens that end an answer": (
        "warp", "--policy copy", {"copy": ("policy", also("generation_config.json", eos_token_id=[0, 1]))},
    ),
    "base without EOS but with pad": (
        "rm", "--accept-weak --base copy", {"copy": ("policy", also("tokenizer_config.json", eos_token=None))},
    ),
    "weights that no model reads": (
        "warp", "--policy copy", {"copy": ("policy", tensors(lambda t: t.update(v_head=t[WTE] * float("nan"))))},
    ),
    "weights of others beside the model's": (
        "warp", "--policy copy", {"copy": ("policy", tensors(lambda t: [t.update({key: t[WTE].mean(1) * float("nan")})
                                                                        for key in UNREAD]))},
    ),
    "a tokenizer class of transformers beside a map of code": (
        "warp", "--policy copy --max-length 8",
        {"copy": ("policy", both(NO_JSON, also("tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]})))},
    ),
    "policies of one architecture": ("evaluate", "--policies policy adapter copy --match-kl 0.1",
                                     {"copy": ("policy", also("config.json", n_embd=None, hidden_size=16))}),
}  # fmt: skip


@pytest.mark.parametrize("name", LEGAL)
def test_what_is_legal_passes_early(workplace, monkeypatch, capfd, tiny_tokenizer, name):
    """No early check refuses what the run would take: a late refusal costs seconds, a false one the run."""
    script, flags, copies = LEGAL[name]
    for copy, (model, change) in copies.items():
        shutil.copytree(workplace / model, workplace / copy)
        change(workplace / copy)
    longest = max(len(tiny_tokenizer(f"The film {i}")["input_ids"]) for i in range(12))
    (workplace / "chat.jsonl").write_bytes(rows(*MESSAGES))
    (workplace / "marked.jsonl").write_bytes(rows(*({"prompt": f"Film {i}" + MARK * 7} for i in range(12))))
    (workplace / "growing.jsonl").write_bytes(rows(*SHORT) * 250 + rows(*({"text": "film " * i} for i in range(9, 21))))
    pairs = (
        {"prompt": f"Film {i}", "chosen": "great " * (1 if i > 999 else 99), "rejected": "dull"} for i in range(1020)
    )
    (workplace / "shrinking.jsonl").write_bytes(rows(*pairs))
    judged = "--reward-model functions.few " if "chat.jsonl" in flags else ""
    assert refused_early(monkeypatch, capfd, script, judged + flags.format(just=longest + 1)) == (None, "")
    if "{just}" in flags:
        code, line = refused_early(monkeypatch, capfd, script, flags.format(just=longest))
        assert (code, f"the prompt has {longest} tokens" in line) == (2, True)


def test_a_name_of_the_hub_passes_early(workplace, monkeypatch, capfd):
    """Of a model that is only on the hub nothing is known: it passes in every place."""
    monkeypatch.setattr("rlhf_min.sources.hub_refusal", lambda path: "")
    (workplace / "chat.jsonl").write_bytes(rows(*MESSAGES))
    flags = "--policy owner/name --reward-model owner/judge --prompts chat.jsonl --lora-r 2 --lora-target-modules x"
    assert refused_early(monkeypatch, capfd, "reinforce", f"{flags} --sigma advantage --max-length 999") == (None, "")
    assert refused_early(monkeypatch, capfd, "rm", "--base owner/name --accept-weak") == (None, "")


def test_a_distilbert_judge_passes_early(workplace, monkeypatch, capfd):
    """An encoder's judge with a tokenizer class of its own passes, and is missed a template only where it needs one."""
    (workplace / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film"]))
    config = DistilBertConfig(vocab_size=7, dim=16, hidden_dim=16, n_layers=1, n_heads=2, num_labels=1)
    words = DistilBertTokenizer(str(workplace / "vocab.txt"))
    save_model(DistilBertForSequenceClassification(config), words, workplace / "bert")
    assert refused_early(monkeypatch, capfd, "warp", "--reward-model bert") == (None, "")
    put(chat_template__jinja=TEMPLATE)(workplace / "bert")
    shutil.copytree(workplace / "bert", workplace / "mute")
    (workplace / "mute" / "chat_template.jinja").unlink()
    (workplace / "chat.jsonl").write_bytes(rows(*MESSAGES))
    shutil.copytree(workplace / "policy", workplace / "chatty")
    put(chat_template__jinja=TEMPLATE)(workplace / "chatty")
    flags = "--policy chatty --prompts chat.jsonl --max-length 64 --reward-model"
    assert refused_early(monkeypatch, capfd, "warp", f"{flags} bert") == (None, "")
    code, line = refused_early(monkeypatch, capfd, "warp", f"{flags} mute")
    assert (code, "mute: its tokenizer has no chat template" in line) == (2, True)


ODD_VALUES = ([], {}, "", "GPT2ForSequenceClassification", 3, -1, 0.5, True, [None], {"0": 1}, {"x": "y"}, [[]], 10**30)


@pytest.mark.parametrize("key", ["architectures", "id2label", "num_labels", "n_positions", "max_position_embeddings"])
@pytest.mark.parametrize("model", ["policy", "two_labels", "judge"])
def test_odd_values_of_a_config_are_no_traceback(workplace, monkeypatch, capfd, model, key):
    """Whatever JSON a config.json holds, the early checks let it pass or refuse it in one line."""
    shutil.copytree(workplace / model, workplace / "broken")
    for value in ODD_VALUES:
        also("config.json", **{key: value})(workplace / "broken")
        for script, flags in (("warp", "--policy broken"), ("reinforce", "--reward-model broken --sigma advantage")):
            code, line = refused_early(monkeypatch, capfd, script, flags)
            assert (code, line.count("\n")) in ((None, 0), (2, 1))


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        ("--policy runs/toy/reward_model", "is a classifier, not a language model"),
        ("--reward-model runs/toy/policy", "no sequence classifier"),
        ("--sigma advantage", "runs/toy/reward_model gives no σ"),
        ("--max-length 4096", "reads at most"),
        ("--num-eval-prompts 100", "too few to hold out 100"),
    ],
)
def test_a_world_that_is_made_is_checked_early(in_world, monkeypatch, capfd, flags, fragment):
    """The embedded world's models are no exception once they are there."""
    monkeypatch.setattr("sys.argv", ["script", *flags.split(), "--out", "new"])
    with pytest.raises(SystemExit):
        refuse_mistakes(OPTIONS["reinforce"])
    assert fragment in capfd.readouterr().err


def check_refusal(workplace, capfd, case, start=lambda script, flags: MAINS[script](flags)):
    """Start the script of a case: it must exit with 2 and one short line, and leave the folder as it was."""
    before = snapshot(workplace)
    with pytest.raises(SystemExit) as stop:
        start(case.script, [*FLAGS[case.script].split(), *case.flags.split()])
    assert stop.value.code == 2
    lines = [line for line in capfd.readouterr().err.split("\n") if line.strip()]
    lines = [line for line in lines if not (case.late and line.startswith("\r"))]  # progress bars
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert case.fragment in lines[0]
    assert len(lines[0]) < 1000
    after = snapshot(workplace)
    assert {path: after.get(path) for path in before} == before
    if not case.late:
        assert after.keys() == before.keys()


@pytest.mark.parametrize(
    ("name", "flags"),
    [pytest.param(name, flags, id=f"{name}: {flags.split()[0]}")
     for name, broken in BROKEN.items() for flags in broken.flags],
)  # fmt: skip
def test_a_broken_model_is_one_line_and_exit_code_2(workplace, capfd, recwarn, monkeypatch, name, flags):
    """A folder whose files are cut off, do not fit or would run code is refused by name; no code in it is run."""
    broken, (script, flags) = BROKEN[name], flags.split(maxsplit=1)
    questions = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "n")
    shutil.copytree(workplace / broken.model, workplace / "broken")
    shutil.copytree(workplace / "policy", workplace / "pickled")
    put(model__safetensors=None, pytorch_model__bin=PICKLE)(workplace / "pickled")
    broken.change(workplace / "broken")
    for file, content in broken.files.items():
        (workplace / file).write_bytes(content)

    def early(script, flags):
        monkeypatch.setattr("sys.argv", ["script", *flags])
        refuse_mistakes(OPTIONS[script])

    check_refusal(workplace, capfd, Case(script, flags, broken.fragment), early)
    assert not recwarn.list
    assert not questions  # transformers would ask whether to run the code
    assert not (workplace / "executed").exists()


def test_the_traps_of_this_file_would_spring(tmp_path, monkeypatch):
    """The pickle and the module of the models above do leave their trace where they are run."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(PICKLE)
    assert (tmp_path / "executed").exists()
    (tmp_path / "executed").unlink()
    exec(REMOTE)
    assert (tmp_path / "executed").exists()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The folder of a pretraining that was stopped behind its last step, and the folder that it was called in."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("rlhf_min.runlog.RunLog.finish", raise_stopped)
        (folder / "texts.txt").write_text(TEXTS)
        with pytest.raises(SystemExit):
            MAINS["pretrain"](FLAGS["pretrain"].split())
    assert (folder / "out" / "checkpoint" / "state.pt").exists()
    return folder


def raise_stopped(*arguments, **names):
    raise KeyboardInterrupt


def as_folder(path):
    """Put a folder where a file was."""
    path.unlink()
    path.mkdir()


def as_file(path):
    """Put a file where a folder was."""
    shutil.rmtree(path)
    path.write_bytes(b"")


OTHER = {"format": "another program", "title": "language model"}
DAMAGE = {
    "state of 0 bytes": (put(state__pt=b""), "state.pt is not a whole checkpoint"),
    "state cut off": (cut(-500, "state.pt"), "state.pt is not a whole checkpoint"),
    "state that would run code": (put(state__pt=PICKLE), "state.pt is not a whole checkpoint"),
    "state of another program": (
        lambda folder: torch.save(OTHER, folder / "state.pt"),
        "state.pt is not a whole checkpoint of this program (it has another format)",
    ),
    "metrics that lost lines": (lambda folder: (folder.parent / "metrics.jsonl").write_bytes(b""), "has lost lines"),
    "no metrics": (lambda folder: (folder.parent / "metrics.jsonl").unlink(), "has lost lines"),
    "metrics that are a folder": (
        lambda folder: as_folder(folder.parent / "metrics.jsonl"),
        "metrics.jsonl is not what a run leaves",
    ),
    "checkpoint that is a file": (as_file, "out/checkpoint is not what a run leaves"),
    "checkpoint that is a link to nothing": (
        lambda folder: (shutil.rmtree(folder), folder.symlink_to("gone")),
        "out/checkpoint is not what a run leaves",
    ),
    "state that is a folder": (lambda folder: as_folder(folder / "state.pt"), "(it is no file)"),
    "state that is a pipe": (
        lambda folder: ((folder / "state.pt").unlink(), os.mkfifo(folder / "state.pt")),
        "(it is no file)",
    ),
    "metrics with a line that broke": (
        lambda folder: (folder.parent / "metrics.jsonl").write_bytes(
            b'{"a: 1}' + (folder.parent / "metrics.jsonl").read_bytes()
        ),
        "metrics.jsonl is not as the run left it",
    ),
    "state of another run": (
        lambda folder: also("run.json", id="7")(folder.parent),
        "state.pt is not a whole checkpoint of this program (it is one of another run)",
    ),
    "other texts": (
        lambda folder: (folder.parents[1] / "texts.txt").write_text("a b c"),
        "texts.txt: not what the run in out",
    ),
}


@pytest.mark.parametrize("early", [True, False], ids=["early", "by the run"])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_one_line_and_exit_code_2(
    interrupted, tmp_path, monkeypatch, capfd, recwarn, name, early
):
    """What --resume cannot go on with is refused by name, before torch is imported; and no code in it is run."""
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    change, fragment = DAMAGE[name]
    change(tmp_path / "out" / "checkpoint")
    capfd.readouterr()
    flags = [*FLAGS["pretrain"].split(), "--resume"]
    monkeypatch.setattr("sys.argv", ["script", *flags])
    with pytest.raises(SystemExit) as stop:
        refuse_mistakes(OPTIONS["pretrain"]) if early else MAINS["pretrain"](flags)
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert not recwarn.list
    assert line.startswith("error: ")
    assert fragment in line
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("resumed", [{}, "x", [1]])
def test_a_run_whose_history_was_edited_goes_on(interrupted, tmp_path, monkeypatch, resumed):
    """What run.json says of earlier resumes is for its reader; links in the way of a new file are removed."""
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    also("run.json", resumed=resumed)(tmp_path / "out")
    (tmp_path / "out" / ".run.json.new").symlink_to(tmp_path)
    MAINS["pretrain"]([*FLAGS["pretrain"].split(), "--resume"])
    assert json.loads((tmp_path / "out" / "run.json").read_text())["resumed"][-1]["processes"] == 1
    assert (tmp_path / "texts.txt").exists()


@pytest.mark.parametrize("policy", [5, None, True, ["policy"], {}])
def test_a_front_whose_policy_is_no_name(workplace, monkeypatch, capfd, policy):
    """The run.json of a WARP run that somebody has edited is told, not followed."""
    (workplace / "front").mkdir()
    (workplace / "front" / "run.json").write_text(json.dumps({"options": {"policy": policy}}))
    code, line = refused_early(monkeypatch, capfd, "evaluate", "--policies --front front")
    assert (code, "--front front: no run.json of a WARP run" in line) == (2, True)


@pytest.mark.parametrize("out", ["link", "link/x"])
def test_a_folder_that_is_not_mounted(workplace, monkeypatch, capfd, out):
    """A link to a disk that is not there is named, also where the runs without --out would go."""
    (workplace / "link").symlink_to("/nowhere/disk")
    code, line = refused_early(monkeypatch, capfd, "warp", f"--out {out}")
    assert (code, "link is no folder" in line) == (2, True)
    (workplace / "runs").symlink_to("/nowhere/disk")
    code, line = refused_early(monkeypatch, capfd, "warp", "--out=")
    assert (code, "runs is no folder" in line) == (2, True)


ODD = {
    "emoji": "🎬👩‍👩‍👧‍👦 great 🇺🇳",
    "right to left": "\u202eהסרט היה נהדר\u202c فيلم رائع",
    "combining characters": "e\u0301" + "\u0336" * 10,
    "next line and line separator": "first\u0085second\u2028third\u2029fourth\x0b\x0c\x1c",
    "control characters": "bell \x07 zero \x00 escape \x1b[31m",
    "byte order mark inside": "\ufeffgreat\ufffe",
    "noncharacters and private use": "\uffff\ue000\U0010ffff",
    "what looks like markup": '<|endoftext|> {{ 7 * 7 }} {% raise %} %s \\n "',
    "astral letters": "𝔤𝔯𝔢𝔞𝔱 𠀀",
}
ENCODINGS = {
    "plain": lambda text: text.encode(),
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "CR LF": lambda text: text.replace("\n", "\r\n").encode(),
    "no last line end": lambda text: text.rstrip("\n").encode(),
}


@pytest.mark.parametrize("encode", [pytest.param(encode, id=name) for name, encode in ENCODINGS.items()])
@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in ODD.items()])
def test_odd_text_survives(tmp_path, tiny_tokenizer, text, encode):
    """T70: text in any script and with any separator is read as it was written, and no row is cut or lost."""
    path, film = tmp_path / "a.jsonl", "A film: "
    rows = [{"text": text, "prompt": film + text, "chosen": text, "rejected": film}] * 2
    path.write_bytes(encode("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)))
    assert [row for _, row in read_rows(str(path))] == rows
    assert list(read_texts(str(path))) == [text] * 2
    assert [prompt for _, prompt, _ in read_prompts(str(path))] == [film + text] * 2
    assert [pair.chosen for pair in load_pairs(str(path))[0]] == [text] * 2
    (prompt,) = load_prompts(str(path), tiny_tokenizer, 3, 999)
    if "<|endoftext|>" not in text:
        assert tiny_tokenizer.decode(prompt.tokens) == film + text


@pytest.mark.parametrize("encode", [pytest.param(e, id=n) for n, e in ENCODINGS.items()])
def test_odd_lines_of_a_txt_file_survive(tmp_path, encode):
    """T70: a .txt file is read the same with a byte order mark and with Windows' line ends."""
    texts = [text for name, text in ODD.items() if name != "byte order mark inside"]
    (tmp_path / "a.txt").write_bytes(encode("".join(text + "\n" for text in texts)))
    assert list(read_texts(str(tmp_path / "a.txt"))) == [text.strip() for text in texts]


def test_a_line_of_10_megabytes_survives(tmp_path, tiny_tokenizer):
    """A row has no largest length: it is read whole, and a prompt is cut from its beginning."""
    text = "The film was great fun. " * 420_000
    (tmp_path / "a.jsonl").write_bytes(rows({"text": text}, {"text": "The plot was dull."}))
    assert len(text) > 10_000_000
    assert [len(text) for text in read_texts(str(tmp_path / "a.jsonl"))] == [len(text), 18]
    first, second = load_prompts(str(tmp_path / "a.jsonl"), tiny_tokenizer, 3, 16)
    assert (len(first.tokens), len(second.tokens)) == (3, 3)


def test_deep_nesting_beside_the_fields_is_no_mistake(tmp_path):
    """What a row has beside its own fields is nobody's business, a hundred levels of it included."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a", "x": ' + b"[" * 100 + b"]" * 100 + b"}\n")
    assert list(read_texts(str(tmp_path / "a.jsonl"))) == ["a"]


def test_the_scripts_take_odd_text(workplace, capsys):
    """Emoji, right-to-left text and separators are trained on and judged, from a file that Windows wrote."""
    pairs = [{"prompt": f"Film {i}", "chosen": text, "rejected": "no"} for i, text in enumerate([*ODD.values()] * 3)]
    prompts = [{"prompt": text} for text in ODD.values()] + [{"text": "The film was great. " * 9}] * 2
    for name, values in (("pairs.jsonl", pairs), ("prompts.jsonl", prompts)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in values)
        (workplace / name).write_bytes(b"\xef\xbb\xbf" + lines.encode())
    for script, flags in (("rm", "--accept-weak --max-length 64"), ("evaluate", "--max-length 64 --out judged")):
        MAINS[script]([*FLAGS[script].split(), *flags.split()])
    assert (workplace / "judged" / "table.md").exists()
    assert json.loads((workplace / "out" / "summary.json").read_text())["train_pairs"] >= 15
    assert "error" not in capsys.readouterr().err


GPT2 = {"model_type": "gpt2", "n_layer": 3, "n_embd": 4, "vocab_size": 9}
SHAPES = {"transformer.wte.weight": (9, 4), "transformer.wpe.weight": (8, 4), "transformer.ln_f.weight": (4,)} | {
    f"transformer.h.{i}.{name}": shape for i in range(3) for name, shape in (("a.weight", (4, 12)), ("a.bias", (12,)))
}


@pytest.mark.parametrize(
    ("changes", "config", "fragment"),
    [
        ({"transformer.h.1.a.weight": None}, {}, "lack 1 tensors, such as transformer.h.1.a.weight"),
        ({"transformer.h.2.a.bias": (11,)}, {}, "lack 1 tensors, such as transformer.h.2.a.bias"),
        ({"transformer.h.0.{x}.weight": (1,), "a.{0}.1.weight": (2,)}, {}, ""),  # of what one block has, no notice
        (
            {"v_head.0.weight": (1,), "v_head.2.weight": (1,), "tower.h.0.b.weight": (2,), "tower.h.1.b.weight": (2,)},
            {},
            "",
        ),
        ({"transformer.h.0.attn.buffer": (1,), "transformer.h.1.attn.buffer": (1,)}, {}, ""),
        (dict.fromkeys(SHAPES) | {f"transformer.{name}": shape for name, shape in SHAPES.items()}, {}, ""),
        (
            dict.fromkeys(SHAPES) | {f"x.{name}": shape for name, shape in SHAPES.items()},
            {},
            "lack 1 tensors, such as transformer's blocks",
        ),
        ({"transformer.wte.weight": None, "lm_head.decoder.weight": (9, 4)}, {}, ""),  # as RoBERTa calls it
        ({"mtp.h.3.a.weight": (3, 3), "v_head.norm.weight": (1,), "v_head.0.weight": (1,)}, {}, ""),
        ({"transformer.wte.weight": None, "lm_head.weight": (9, 4)}, {}, ""),  # tied, under its other name
        ({"transformer.wte.weight": None, "lm_head.weight": (9, 5)}, {}, "such as wte.weight"),
        ({"transformer.wte.weight": (8, 4)}, {}, "lack 1 tensors, such as transformer.wte.weight"),
        ({"transformer.wte.weight": None}, {}, "lack 1 tensors, such as wte.weight"),
        ({"transformer.ln_f.weight": None}, {}, "lack 1 tensors, such as ln_f.weight"),
        ({"transformer.wpe.weight": (8, 5)}, {}, "lack 1 tensors, such as transformer.wpe.weight"),
        ({}, {"n_layer": 4}, "lack 2 tensors, such as transformer.h.3.a.bias"),
        ({}, {"n_embd": 8}, "lack 3 tensors, such as transformer.ln_f.weight"),
        ({}, {}, ""),
        ({}, {"n_layer": 2}, ""),  # what is too much, transformers leaves alone
        ({"transformer.h.1.a.weight": None}, {"model_type": "jamba"}, ""),  # whose blocks differ
        ({}, {"n_embd": "four"}, "n_embd in its config.json must be a whole number, not 'four'"),
        ({}, {"n_embd": "four", "model_type": "jamba"}, ""),  # transformers says what is wrong with it
    ],
)
def test_tensors_by_their_names(changes, config, fragment):
    """A broken checkpoint of a family whose blocks are alike is told from names and shapes, without torch."""
    shapes = {name: shape for name, shape in (SHAPES | changes).items() if shape}
    if not fragment:
        check_tensors("model", shapes, GPT2 | config)
        return
    with pytest.raises(UserError, match=fragment):
        check_tensors("model", shapes, GPT2 | config)


SMALL = {  # under the names of all families
    "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "rotary_dim": 4, "head_dim": 8,
    **dict.fromkeys(("hidden_size", "n_embd", "dim", "d_model"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim"), 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 32),
    "attention_types": [[["global", "local", "global"], 1]], "word_embed_proj_dim": 12, "embedding_size": 12,
}  # fmt: skip


@pytest.mark.parametrize("family", LAYOUTS)
def test_no_tensor_of_a_family_may_lack(family, tmp_path):
    """A model of each family passes as transformers saves it, bare, as a language model and as a judge, tied or not;
    and none does without a tensor of its blocks, its embedding, last norm or head, or with another shape of it.
    """
    if family not in CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    default = AutoConfig.for_model(family)
    small = {name: value for name, value in SMALL.items() if name in default.to_dict() or name in default.attribute_map}
    classes, wrong = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification), []
    for cls, tied in itertools.product(classes, (False, True)):
        config = AutoConfig.for_model(family, **small, num_labels=1, tie_word_embeddings=tied)
        try:
            model = cls.from_config(config)
        except ValueError:  # the family has none of this kind
            continue
        model.save_pretrained(tmp_path)
        shapes, config = tensor_shapes(tmp_path), json.loads((tmp_path / "config.json").read_text())
        labels = int("SequenceClassification" in type(model).__name__)
        certain = check_tensors("model", shapes, config, labels)
        outside = [f".{name}.weight" for name in (*LAYOUTS[family].outside, LAYOUTS[family].head)]
        if any(key.endswith(("lm_head.weight", "decoder.weight")) for key in shapes):
            del outside[0]  # it may be tied to it
        needed = {key for key in shapes if re.search(r"\.\d+\.", key)}
        wrong += needed - certain
        for key in needed | {key for key in shapes if f".{key}".endswith(tuple(outside))}:
            for broken in ({}, {key: (*shapes[key][:-1], 99)}):
                try:
                    check_tensors("model", {k: v for k, v in shapes.items() if k != key} | broken, config, labels)
                    wrong.append(key)
                except UserError as error:
                    assert "its weights lack 1 tensors" in str(error)
        assert len(needed) > 12
    assert wrong == []


EARLY = """
import json, runpy, sys
for flags in json.loads(sys.argv[1]):
    sys.argv = ["script", *flags]
    try:
        runpy.run_path(SCRIPT, run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code
    print(code, "torch" in sys.modules or "transformers.modeling_utils" in sys.modules)
"""
ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "train_warp.py": "warp", "train_rm.py": "rm", "train_reinforce.py": "reinforce", "evaluate.py": "evaluate",
    "rlhf_min/pretrain.py": "pretrain",
}  # fmt: skip
MISTAKES = {
    "train_warp.py": [
        ("--eta 2", "--eta must be between 0 and 1"),
        ("--config a.yaml", "--config a.yaml: unknown key 'gamma'"),
        ("--prompts bad.jsonl", "bad.jsonl, line 2: not JSON"),
        ("--prompts none.jsonl", "none.jsonl: no such file"),
        ("--policy nowhere", "nowhere: no such folder"),
        ("--policy cut", "cut/model.safetensors cannot be read"),
        ("--policy pickled", "pickled weights could run code"),
        ("--policy owner/name", "the hub cannot be reached"),
        ("--reward-model functions.f", "no function f"),
        ("--resume --out=", "--resume needs --out"),
        ("--device banana", "--device banana is not to be had"),
        ("--reward-model misfit", "does not fit the model in wide"),
        ("--reward-model headless", "lack 1 tensors, such as score.weight"),
        ("--out policy", "--out policy holds"),
        ("--policy judge", "judge is a classifier, not a language model"),
        ("--policy adapted_judge", "adapted_judge is a classifier, not a language model"),
        ("--reward-model policy", "no sequence classifier"),
        ("--reward-model sentiment", "the labels NEGATIVE, POSITIVE"),
        ("--max-length 65", "policy reads at most 64 tokens; lower --max-length 65"),
        ("--lora-r 2 --lora-target-modules q_proj", "named q_proj; there are c_attn, c_fc, c_proj"),
        ("--lora-target-modules c_attn", "goes with LoRA only"),
        ("--num-eval-prompts 12", "12 distinct prompts: too few"),
        ("--prompts long.jsonl", "long.jsonl, line 1: the prompt has"),
        ("--prompts chat.jsonl", "no chat template"),
        ("--prompts chat.jsonl --policy refusing", "refuses a conversation: no films"),
    ],
    "train_rm.py": [
        ("--margin", "pairs.jsonl, line 1: a pair with a field 'margin' is needed"),
        ("--batch-size 20", "are too few"),
        ("--data chat_pairs.jsonl --accept-weak", "no chat template"),
        ("--lora-r 2 --lora-target-modules attn --accept-weak", "named attn"),
        ("--data bad.jsonl", "bad.jsonl, line 1: no field 'chosen'"),
        ("--data owner/name", "owner/name is no local file"),
        ("--base owner/name", "the hub cannot be reached"),
    ],
    "train_reinforce.py": [
        ("--beta -1", "--beta must be at least 0"),
        ("--policy empty", "empty: no config.json"),
        ("--sigma advantage", "judge gives no σ"),
        ("--sigma penalty --reward-model functions.few", "functions.few gives no σ"),
    ],
    "evaluate.py": [
        ("--judges j=nowhere", "nowhere: no such folder"),
        ("--exclude bad.jsonl", "bad.jsonl, line 2: not"),
        ("--num-prompts 13", "12 distinct prompts; lower --num-prompts 13"),
        ("--policies policy judge", "judge is a classifier"),
        ("--prompts chat.jsonl --policies refusing", "refuses a conversation"),
    ],
    "rlhf_min/pretrain.py": [("--data none.txt", "none.txt: no such file"), ("--width 33", "--width 33 must be")],
}


@pytest.mark.parametrize("rename", [lambda key: f"transformer.{key}", lambda key: key.removeprefix("transformer.")])
def test_an_adapter_fits_a_base_of_more_or_fewer_parts(workplace, rename):
    """transformers loads a base whose names have the prefix twice or not at all; so does the check of an adapter."""
    shutil.copytree(workplace / "policy", workplace / "renamed")
    tensors(lambda t: [t.update({rename(key): t.pop(key)}) for key in list(t)])(workplace / "renamed")
    check_fit(workplace / "adapter", workplace / "renamed")
    with pytest.raises(UserError, match="does not fit the model in"):
        check_fit(workplace / "adapter", workplace / "wide")


@pytest.fixture(scope="module")
def light_tokenizers():
    """Whether transformers' tokenizers do without torch; those of 5.17 import it."""
    program = "import sys, transformers; transformers.PreTrainedTokenizerFast; sys.exit('torch' in sys.modules)"
    return subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("script", MISTAKES)
def test_mistakes_are_refused_before_torch_is_imported(workplace, monkeypatch, light_tokenizers, script):
    """T59, T69: called as its users call it, a script says what is wrong in one line before torch takes its seconds."""
    (workplace / "a.yaml").write_text("gamma: 1\n")
    (workplace / "bad.jsonl").write_bytes(rows({"prompt": "a"}) + b"{")
    (workplace / "long.jsonl").write_bytes(rows(*LONG))
    (workplace / "chat.jsonl").write_bytes(rows(*MESSAGES))
    chats = ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]} for _ in range(20))
    (workplace / "chat_pairs.jsonl").write_bytes(rows(*chats))
    for name, change in (
        ("policy cut", cut(-9)),
        ("policy pickled", put(model__safetensors=None, pytorch_model__bin=PICKLE)),
        ("policy refusing", put(chat_template__jinja=b"{{ raise_exception('no films') }}")),
        ("adapted_judge misfit", also(ADAPTER_CONFIG, base_model_name_or_path="wide")),
        ("judge headless", tensors(lambda t: t.pop(HEAD))),
    ):
        model, name = name.split()
        shutil.copytree(workplace / model, workplace / name)
        change(workplace / name)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(workplace)]))
    flags = [[*FLAGS[KINDS[script]].split(), *flags.split()] for flags, _ in MISTAKES[script]]
    call = f"runpy.run_path({str(ROOT / script)!r}" if "/" not in script else "runpy.run_module('rlhf_min.pretrain'"
    program = EARLY.replace("runpy.run_path(SCRIPT", call)
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(flags)], capture_output=True, text=True, timeout=60
    )
    seen = done.stdout.splitlines()
    assert [line[:2] for line in seen] == ["2 "] * len(flags)
    first = next((i for i, line in enumerate(seen) if line == "2 True"), None)
    assert first is None or (
        not light_tokenizers and re.search("prompt has|chat template|conver", MISTAKES[script][first][1])
    )
    lines = done.stderr.splitlines()
    assert len(lines) == len(flags)
    for line, (_, fragment) in zip(lines, MISTAKES[script]):
        assert line.startswith("error: ")
        assert fragment in line


@pytest.mark.parametrize(
    ("built", "name", "there"),
    [
        ({"cuda": None}, "cuda", False),
        ({"cuda": None, "hip": None}, "cuda:1", False),
        ({"cuda": "12.8", "hip": None}, "cuda:99", True),  # torch itself counts the GPUs
        ({"cuda": None, "hip": "6.3"}, "cuda", True),
        ({"cuda": None}, "cpu", True),
        ({"cuda": None}, "auto", True),
        ({"cuda": "12.8"}, "banana", False),
        ({"cuda": "12.8"}, "cuda:x", False),
    ],
)
def test_a_torch_without_cuda_is_told_by_its_version(monkeypatch, built, name, there):
    """T59: a device that no GPU could be is refused without torch; where there may be one, torch is asked."""
    monkeypatch.setattr("runpy.run_path", lambda path: built if Path(path).name == "version.py" else {})
    with contextlib.nullcontext() if there else pytest.raises(UserError, match=f"--device {name} is not to be had"):
        check_device(name)


def test_an_uncaught_mistake_is_the_exit_code_of_the_process(workplace):
    """The exit code of the process itself is 2, with one line on stderr and nothing on stdout."""
    command = [sys.executable, str(ROOT / "train_rm.py"), "--data", "none.jsonl"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "error: none.jsonl: no such file; give a .jsonl or .jsonl.gz file or a hub data set owner/name\n"
    )


@pytest.mark.parametrize("script", MAINS)
def test_the_flags_of_this_file_are_right(workplace, script, capsys):
    """Each mistake above is the only one: without it the command succeeds and writes its summary."""
    MAINS[script]([*FLAGS[script].split(), *(["--accept-weak"] if script == "rm" else [])])
    assert (workplace / "out" / "summary.json").exists()
    assert "error" not in capsys.readouterr().err


def test_own_pairs_are_validated_on_own_pairs(workplace, monkeypatch):
    """T26: with pairs of one's own on the default base, the validation pairs are held out of them, as --help says."""
    shutil.copytree("policy", "runs/toy/policy")
    for name in ("ensure_run", "ensure_texts"):
        monkeypatch.setattr(f"rlhf_min.toy.{name}", lambda *arguments: None)
    flags = FLAGS["rm"].replace("--base policy ", "")
    train_rm.main([*flags.split(), "--accept-weak"])
    assert json.loads((workplace / "out" / "summary.json").read_text())["eval_pairs"] == 6


def test_held_out_prompts_that_are_all_trained_on(workplace, capsys):
    """T26: with one file for both nothing is held out, and the message says so."""
    with pytest.raises(SystemExit):
        MAINS["reinforce"]([*FLAGS["reinforce"].split(), "--eval-prompts", "prompts.jsonl"])
    assert "error: 0 of --eval-prompts are not in --prompts" in capsys.readouterr().err


def test_a_batch_of_one_and_a_text_that_just_fits(workplace):
    """T58: a text of one token more than --max-length must not leave a batch without any token to predict."""
    (workplace / "texts.txt").write_text("one\none two\none two three\none two three four\n")
    MAINS["pretrain"]([*FLAGS["pretrain"].split(), "--batch-size", "1", "--max-length", "2"])
    assert json.loads((workplace / "out" / "summary.json").read_text())["loss"] > 0


def test_messages_become_one_line(capsys):
    """Whatever line breaks a message has, the user sees one line and exit code 2."""

    @one_line_errors
    def main():
        raise UserError("a file:\n  cannot be\tread")

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: a file: cannot be read\n"


@pytest.mark.parametrize("defect", [RuntimeError, ValueError, KeyError, AssertionError])
def test_a_defect_keeps_its_traceback(defect):
    """T58: what is not the user's mistake is not swallowed."""

    @one_line_errors
    def main():
        raise defect("ours")

    with pytest.raises(defect, match="ours"):
        main()
