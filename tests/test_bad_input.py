"""The command line: a mistake is exit code 2 and one line that names file, line or flag; nothing is overwritten."""

import gzip
import json
import os
import shutil
from typing import NamedTuple

import pytest
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

import evaluate
import rlhf_min.pretrain
import train_reinforce
import train_rm
import train_warp
from rlhf_min.errors import UserError, one_line_errors
from rlhf_min.lora import add_lora, save_adapter
from rlhf_min.models import save_model
from rlhf_min.pretrain import train_tokenizer

MAINS = {
    "warp": train_warp.main, "reinforce": train_reinforce.main, "rm": train_rm.main, "evaluate": evaluate.main,
    "pretrain": rlhf_min.pretrain.main,
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
FUNCTIONS = """
def nan(prompts, completions, **columns): return [float("nan")] * len(prompts)
def few(prompts, completions, **columns): return [1.0]
def text(prompts, completions, **columns): return ["good"] * len(prompts)
"""
USER, GOOD, BAD = ({"role": role, "content": text} for role, text in
                   (("user", "A film?"), ("assistant", "Great."), ("assistant", "Dull.")))  # fmt: skip


class Case(NamedTuple):
    script: str
    flags: str  # behind the script's own flags; the last of two equal flags counts
    fragment: str  # what the error line must contain
    files: dict = {}  # noqa: RUF012  name → content: bytes, or rows of JSON Lines
    late: bool = False  # True for what only the run itself can find out: its new folder stays


def rows(*values):
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


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
    "no chat template": Case("warp", "--prompts a.jsonl", "no chat template", {"a.jsonl": rows({"prompt": [USER]})}),
    # lengths and numbers of prompts and pairs
    "prompt too long": Case(
        "warp", "--prompts a.jsonl", "a.jsonl, line 1: the prompt has", {"a.jsonl": rows({"prompt": "film " * 40})}
    ),
    "no room for an answer": Case("warp", "--prompt-tokens 16", "--prompt-tokens 16 leaves no room"),
    "texts too short": Case("warp", "--prompts a.jsonl", "lower --prompt-tokens", {"a.jsonl": rows({"text": "a"})}),
    "beyond the context": Case("warp", "--max-length 65", "lower --max-length 65"),
    "too few prompts to hold out": Case("warp", "--num-eval-prompts 12", "--num-eval-prompts"),
    "too few prompts to evaluate on": Case("evaluate", "--num-prompts 13", "lower --num-prompts 13"),
    "too few pairs": Case("rm", "--batch-size 500", "lower --batch-size"),
    "all pairs too long": Case("rm", "--max-length 8", "10 longer than 8 tokens"),
    # models
    "missing policy": Case("warp", "--policy nowhere", "nowhere: no such folder"),
    "missing run": Case("evaluate", "--policies runs/rm", "runs/rm: no such folder"),
    "missing second policy": Case("evaluate", "--policies policy runs/rm", "runs/rm: no such folder"),
    "hub unreachable": Case("rm", "--base owner/name", "the hub cannot be reached"),
    "folder without a model": Case("warp", "--policy empty", "empty: no config.json"),
    "no pad, no EOS": Case("warp", "--policy plain", "plain: its tokenizer has neither"),
    "base without pad and EOS": Case("rm", "--base plain", "plain: its tokenizer has neither"),
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
    "missing device": Case("rm", "--device cuda:99", "--device cuda:99"),
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
    "alpha NaN": Case("warp", "--lora-alpha nan", "--lora-alpha must be at least 0, not nan"),
    "targets without a rank": Case("reinforce", "--lora-target-modules c_attn", "go with LoRA only; set --lora-r"),
    "dropout without a rank": Case("rm", "--lora-dropout 0.1", "go with LoRA only; set --lora-r"),
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
    "margin without a field": Case("rm", "--margin", "--margin: 20 pairs have no field 'margin'; leave out the flag"),
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
        "--margin: 1 pairs have no field",
        {"a.jsonl": rows(*({"text": "a", "label": label, "margin": 1} for label in (0, 1)))},
    ),
    "margin of the training pairs only": Case(
        "rm",
        "--margin --data a.jsonl --eval-data pairs.jsonl",
        "--margin: 20 pairs have no field",
        {"a.jsonl": rows(*({"chosen": f"a{i}", "rejected": "b", "margin": 1} for i in range(20)))},
    ),
    # comparing at one KL
    "KL of a front": Case("evaluate", "--policies --front empty --match-kl 1", "--match-kl goes with --policies"),
    "negative KL": Case("evaluate", "--match-kl=-1", "--match-kl must be at least 0"),
    "KL of another architecture": Case(
        "evaluate", "--policies policy wide --match-kl 0.1", "--match-kl needs policies of one architecture"
    ),
    "KL of another vocabulary": Case(
        "evaluate",
        "--policies policy other_words --match-kl 0.1",
        "other_words: --match-kl needs the vocabulary of policy",
    ),
}

PARAMETERS = [pytest.param(case, id=name) for name, case in CASES.items()]


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory, tiny_tokenizer):
    """Policies and judges, good and bad: see the names; adapters whose base is gone, and one whose base is not."""
    folder = tmp_path_factory.mktemp("models")
    size = {"vocab_size": len(tiny_tokenizer), "n_positions": 64, "n_layer": 1, "n_embd": 16, "n_head": 2}
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
                             ("adapted_judge", GPT2ForSequenceClassification, "policy")):  # fmt: skip
        model = kind(GPT2Config(**size, num_labels=1, pad_token_id=1))
        model.config._name_or_path = base
        save_adapter(add_lora(model, r=2, alpha=4), folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    save_model(GPT2LMHeadModel(GPT2Config(**size)), PreTrainedTokenizerFast(tokenizer_object=words), folder / "plain")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch, models_folder):
    """The working directory: models, 12 prompts, 20 pairs, texts; whoever builds the embedded world fails the test."""
    shutil.copytree(models_folder, tmp_path, dirs_exist_ok=True, copy_function=os.link)
    (tmp_path / "prompts.jsonl").write_bytes(rows(*({"prompt": f"The film {i}"} for i in range(12))))
    pairs = ({"prompt": f"The film {i}", "chosen": " was great.", "rejected": " was dull."} for i in range(20))
    (tmp_path / "pairs.jsonl").write_bytes(rows(*pairs))
    (tmp_path / "texts.txt").write_text("The film was great.\nI slept.\n" * 10)
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
def test_a_mistake_is_one_line_and_exit_code_2(workplace, capsys, case):
    """T59, T69: exit code 2, one line on stderr that names what to mend, and no file written or changed."""
    for name, content in case.files.items():
        (workplace / name).parent.mkdir(parents=True, exist_ok=True)
        (workplace / name).write_bytes(content)
    before = snapshot(workplace)
    with pytest.raises(SystemExit) as stop:
        MAINS[case.script]([*FLAGS[case.script].split(), *case.flags.split()])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if line.strip()]
    lines = [line for line in lines if not (case.late and line.startswith("\r"))]  # progress bars
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert case.fragment in lines[0]
    after = snapshot(workplace)
    assert {path: after.get(path) for path in before} == before
    if not case.late:
        assert after.keys() == before.keys()


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
    """T26: with one file for both nothing is held out; the message counts each of its 12 prompts once."""
    with pytest.raises(SystemExit):
        MAINS["reinforce"]([*FLAGS["reinforce"].split(), "--eval-prompts", "prompts.jsonl"])
    assert "error: 12 distinct prompts" in capsys.readouterr().err


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
