"""The command line: a mistake is exit code 2 and one line that names file, line or flag; nothing is written."""

import dataclasses
import json
import os
import shutil
import sys
import time

import pytest
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

import evaluate
import train_reinforce
import train_rm
import train_warp
from rlhf_min import pretrain
from rlhf_min.lora import add_lora, save_adapter
from rlhf_min.support.errors import UserError, one_line_errors
from rlhf_min.support.models import save_model
from rlhf_min.support.options import parse_options

SCRIPTS = {
    "warp": (train_warp.main, train_warp.WarpOptions),
    "reinforce": (train_reinforce.main, train_reinforce.ReinforceOptions),
    "rm": (train_rm.main, train_rm.RewardModelOptions),
    "evaluate": (evaluate.main, evaluate.EvaluateOptions),
    "front": (evaluate.main, evaluate.EvaluateOptions),
    "pretrain": (pretrain.main, pretrain.PretrainOptions),
}
TASK = "--policy policy --reward-model judge --prompts prompts.jsonl --prompt-tokens 3 --num-eval-prompts 3 --steps 2 "
TASK += "--batch-size 2 --max-length 16"
FLAGS = {
    "warp": f"{TASK} --iterations 1 --runs 1",
    "reinforce": TASK,
    "rm": "--data pairs.jsonl --base policy --epochs 1 --batch-size 8 --eval-fraction 0.4",
    "front": "",
    "evaluate": "--policies policy --judges judge --prompts prompts.jsonl --num-prompts 4 --max-length 16",
    "pretrain": "--data texts.jsonl --vocab-size 300 --layers 1 --width 32 --epochs 1",
}
FUNCTIONS = b"""
def nan(prompts, completions, **columns): return [float("nan")] * len(prompts)
def few(prompts, completions, **columns): return [1.0]
def text(prompts, completions, **columns): return ["good"] * len(prompts)
def bad(prompts, completions, **columns): return len(completions[99])
"""


def command(script, flags=""):
    """A script's own flags, which are right, and others; of two equal flags the last counts."""
    return f"{FLAGS[script]} --device cpu --out out {flags}".split()


def rows(*values):
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def pair(i, best="great", worst="dull"):
    return {"prompt": f"The film {i}", "chosen": f" was {best}.", "rejected": f" was {worst}."}


def run_json(script, **changes):
    """The run.json of an interrupted run of this file's flags, with some of its options changed."""
    options = parse_options(SCRIPTS[script][1], command(script))
    changed = dataclasses.asdict(options) | changes
    return json.dumps({"script": options.script, "options": changed, "processes": 1}).encode()


FILES = {
    "prompts.jsonl": rows(*({"prompt": f"The film {i}"} for i in range(12))),
    "pairs.jsonl": rows(*(pair(i) for i in range(40))),
    "texts.jsonl": rows({"text": "The film was great."}, {"text": "I slept."}) * 10,
    "functions.py": FUNCTIONS,
    "broken.jsonl": rows({"prompt": "a"}) + b"{oops\n",
    "titles.jsonl": rows({"title": "a"}),
    "good.jsonl": rows({"text": "a", "label": 1}, {"text": "b", "label": 1}),
    "chat.jsonl": rows(*({"prompt": [{"role": "user", "content": f"Film {i}"}]} for i in range(12))),
    "long.jsonl": rows({"prompt": "a"}, {"prompt": "film " * 40}),
    "reviews.jsonl": rows(*({"text": f"The film {i} was great and the plot was not dull at all."} for i in range(12))),
    "weak.jsonl": rows(*(pair(i, *(("great", "dull") if i % 2 else ("dull", "great"))) for i in range(40))),
    "list.yaml": b"- lr\n",
    "typo.yaml": b"batchsize: 8\n",
    "no.yaml": b"lr: [1\n",
    "file": b"precious",
    "old/run.json": b"{}",
    "warp_run/run.json": run_json("warp"),
    "half_run/run.json": b'{"script": ',
    "elder_run/run.json": run_json("rm", sigma_coefficient=1.0),
}

MISTAKES = [
    # flags
    ("warp", "--bacth-size 8", "unrecognized arguments: --bacth-size 8; did you mean --batch-size?"),
    ("warp", "--eta 1.5", "--eta must be between 0 and 1, not 1.5"),
    ("rm", "--lr fast", "--lr: invalid float value: 'fast'"),
    ("reinforce", "--num-generations 3", "gives a step 2 answers, no multiple of --num-generations"),
    ("reinforce", "--keep best --eval-every 9", "--keep best chooses among evaluations; set --eval-every to at most"),
    ("reinforce", "--baseline leave-one-out", "--baseline leave-one-out compares answers to one prompt"),
    ("reinforce", "--sigma advantage", "judge gives no σ; name an ordinal reward model"),
    ("rm", "--ties half", "--ties goes with --head ordinal only"),
    ("warp", "--device cuda:99", "--device cuda:99 is not available on this machine; try --device cpu"),
    ("rm", "--device banana", "--device banana is not available on this machine"),
    ("reinforce", "--lora-target-modules c_fc", "goes with LoRA only; set --lora-r"),
    ("rm", "--lora-alpha 16 --lora-dropout 0.2", "--lora-alpha goes with LoRA only; set --lora-r"),
    ("reinforce", "--lora-r 2 --lora-target-modules q_proj", "named q_proj; there are c_attn, c_fc, c_proj"),
    # the configuration file
    ("rm", "--config typo.yaml", "typo.yaml: unrecognized arguments: --batchsize=8; did you mean --batch-size?"),
    ("warp", "--config no.yaml", "--config no.yaml cannot be read"),
    ("warp", "--config list.yaml", "--config list.yaml must hold lines of the form 'option: value'"),
    # data
    ("warp", "--prompts none.jsonl", "none.jsonl: no such file"),
    ("rm", "--data owner/name", "owner/name: no file, and a hub data set needs pip install 'rlhf_min[data]'"),
    ("warp", "--prompts broken.jsonl", "broken.jsonl, line 2: not JSON"),
    ("evaluate", "--prompts titles.jsonl", "titles.jsonl, line 1: no field 'text'; a prompt needs 'prompt' (--columns"),
    ("rm", "--data good.jsonl", "labelled texts need both labels, 1 and 0"),
    ("warp", "--prompts long.jsonl", "long.jsonl, line 2: a prompt of"),
    ("warp", "--prompts reviews.jsonl --prompt-tokens 16", "a prompt of 16 tokens; raise --max-length"),
    ("warp", "--num-eval-prompts 12", "only 12 distinct prompts to hold some out and train on another"),
    ("evaluate", "--num-prompts 13", "only 12 distinct prompts that no policy was trained on; lower --num-prompts"),
    ("rm", "--batch-size 500", "lower --batch-size"),
    # models
    ("warp", "--policy owner/name", "owner/name: no such folder, "),
    ("warp", "--policy empty", "empty: no config.json in it or in its model/"),
    ("warp", "--policy cut", "cut cannot be loaded: "),
    ("warp", "--policy bare", "bare cannot be loaded: "),
    ("rm", "--base lacking", "lacking: its weights lack 1 tensors, such as transformer.h.0.attn.c_attn.weight"),
    ("warp", "--policy nan", "nan: transformer.wte.weight is not finite"),
    ("warp", "--policy mute", "mute: no tokenizer in it"),
    ("warp", "--policy wordy", "wordy: its tokenizer has 300 tokens, its model embeds 200"),
    ("warp", "--policy judge", "judge is a classifier, not a language model"),
    ("warp", "--reward-model policy", "no sequence classifier"),
    ("evaluate", "--judges moods", "moods: a classifier with the labels BAD, SO-SO, GOOD"),
    ("warp", "--max-length 65", "policy reads at most 64 tokens; lower --max-length 65"),
    ("warp", "--policy dora", "is not supported; only plain LoRA is"),
    ("warp", "--policy sick", "is not finite"),
    ("warp", "--policy misfit", "misfit: transformer.h.0.attn.c_attn does not fit the model"),
    ("warp", "--policy orphan", "orphan is an adapter on "),
    ("warp", "--reward-model functions.f", "functions.f: no such function; name a model folder"),
    ("warp", "--reward-model nosuch.f", "nosuch.f: no such function"),
    # folders of runs
    ("warp", "--out old", "--out old holds another run or other files"),
    ("warp", "--policy runs/toy/policy --out old", "--out old holds another run"),  # before the world is built
    ("rm", "--out file", "--out file cannot be made"),
    ("warp", "--out= --resume", "--resume needs --out"),
    ("warp", "--out warp_run --resume --lr 1", "--lr is 1e-05"),
    ("reinforce", "--out warp_run --resume", "warp_run holds a run of train_warp.py, not of train_reinforce.py"),
    ("rm", "--out half_run --resume", "half_run/run.json cannot be read"),
    ("rm", "--out elder_run --resume", "elder_run/run.json"),
    ("front", "--front empty", "--front empty: no "),
    ("evaluate", "--policies policy wide --match-kl 1", "--match-kl needs policies of one architecture"),
]
LATE = [  # what only the run itself finds out
    ("warp", "--reward-model functions.nan", "functions.nan must return 2 finite numbers, not 2: [nan, nan]"),
    ("reinforce", "--reward-model functions.few", "functions.few must return 2 finite numbers, not 1: [1.0]"),
    ("reinforce", "--reward-model functions.text", "functions.text raised ValueError: could not convert"),
    ("reinforce", "--reward-model functions.bad", "functions.bad raised IndexError: list index out of range"),
    ("reinforce", "--lr 1e20", "the run diverged; lower --lr"),
    ("rm", "--data weak.jsonl", "is not above 0.875, chance + 3 standard errors: no model saved"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_tokenizer):
    """Models, good and bad: their names say what they are."""
    folder = tmp_path_factory.mktemp("models")
    size = {"vocab_size": len(tiny_tokenizer), "n_positions": 64, "n_layer": 2, "n_embd": 16, "n_head": 2}
    moods = dict(enumerate(("BAD", "SO-SO", "GOOD")))
    for name, kind, changes in (
        ("policy", GPT2LMHeadModel, {}),
        ("wide", GPT2LMHeadModel, {"n_embd": 32}),
        ("wordy", GPT2LMHeadModel, {"vocab_size": 200}),
        ("judge", GPT2ForSequenceClassification, {"num_labels": 1, "pad_token_id": 1}),
        ("moods", GPT2ForSequenceClassification, {"id2label": moods, "pad_token_id": 1}),
    ):
        save_model(kind(GPT2Config(**(size | changes))), tiny_tokenizer, folder / name)
    for name, base in (("misfit", "wide"), ("orphan", "gone"), ("dora", "policy"), ("sick", "policy")):
        model = add_lora(GPT2LMHeadModel(GPT2Config(**size)), r=2, alpha=4)
        model.config._name_or_path = str(folder / base)
        model.transformer.h[0].attn.c_attn.lora_B.data.fill_(float("nan" if name == "sick" else 1))
        save_adapter(model, folder / name, tiny_tokenizer)
    config = folder / "dora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    for name in ("cut", "bare", "mute", "nan", "lacking"):
        shutil.copytree(folder / "policy", folder / name)
    os.truncate(folder / "cut" / "model.safetensors", 20_000)
    (folder / "bare" / "model.safetensors").unlink()
    for path in (folder / "mute").glob("tokenizer*"):
        path.unlink()
    for name, tensor in (("nan", "transformer.wte.weight"), ("lacking", "transformer.h.0.attn.c_attn.weight")):
        tensors = load_file(folder / name / "model.safetensors")
        tensors[tensor].fill_(float("nan")) if name == "nan" else tensors.pop(tensor)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    (folder / "empty").mkdir()
    before = snapshot(folder)
    yield folder
    assert snapshot(folder) == before


@pytest.fixture
def workplace(tmp_path, monkeypatch, models):
    """The working directory, with models and FILES; whoever builds the embedded world fails the test."""
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "functions", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    monkeypatch.setattr("rlhf_min.toy.write_world", lambda *arguments: pytest.fail("built the embedded world"))
    return tmp_path


def snapshot(folder):
    """{path: content} of everything below a folder."""
    paths = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def refusal(script, flags, capfd):
    """The one line on stderr with which a script exits, its code being 2."""
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script][0](command(script, flags))
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(("script", "flags", "fragment"), MISTAKES, ids=[f"{s} {f}" for s, f, _ in MISTAKES])
def test_a_mistake_is_one_line_and_nothing_is_written(workplace, capfd, recwarn, script, flags, fragment):
    """A mistake is exit code 2 and one line on stderr that names what to mend; no file is written or changed."""
    before = snapshot(workplace)
    assert fragment in refusal(script, flags, capfd)
    assert not recwarn.list  # a warning is a line, too
    assert snapshot(workplace) == before


@pytest.mark.parametrize(("script", "flags", "fragment"), LATE, ids=[f"{s} {f}" for s, f, _ in LATE])
def test_what_only_the_run_finds_out_is_one_line_too(workplace, capfd, script, flags, fragment):
    """The line is the same, no model is saved, and nothing is written beside the run's own folder."""
    before = snapshot(workplace)
    assert fragment in refusal(script, flags, capfd)
    after = snapshot(workplace)
    assert {name for name in after.keys() - before.keys() if name.split("/")[0] != "out"} == set()
    assert "out/run.json" in after
    assert not {"out/model", "out/summary.json"} & after.keys()
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("name", ["none", "./none", "/none", "runs/none", "a/b/none"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(workplace, monkeypatch, capfd, name):
    """What cannot be a hub name is a missing folder, whichever model it should be, and the hub is not asked."""
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("asked the hub"))
    flags = [("warp", "--policy"), ("reinforce", "--reward-model"), ("rm", "--base"), ("evaluate", "--policies")]
    for script, flag in [*flags, ("evaluate", "--judges j="), ("warp", "--judges j=")]:
        line = refusal(script, flag + name if "=" in flag else f"{flag} {name}", capfd)
        assert line.startswith(f"error: {name}: no such folder; name a run folder, a transformers folder or a hub name")


def test_a_hub_that_does_not_answer_is_one_line_within_seconds(workplace, capfd, monkeypatch):
    """Where nobody listens, a script says so within 10 seconds; transformers would retry for half a minute."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    assert "owner/name: no such folder" in refusal("rm", "--base owner/name", capfd)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("script, flags, offered", [
    ("warp", "--out old", True), ("warp", "--out policy --resume", False), ("evaluate", "--out old", False),
])  # fmt: skip
def test_resume_is_offered_where_it_helps(workplace, capfd, script, flags, offered):
    """Of a folder in use, the line offers --resume only to a script that has it and did not get it."""
    assert ("add --resume" in refusal(script, flags, capfd)) == offered


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "front"])
def test_the_flags_of_this_file_are_right(workplace, capfd, script):
    """Each mistake above is the only one: without it the script writes its summary, and nothing to stderr."""
    SCRIPTS[script][0](command(script, "--accept-weak" if script == "rm" else ""))
    assert (workplace / "out" / "summary.json").exists()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("defect", [RuntimeError, ValueError, KeyError, OSError])
def test_a_defect_keeps_its_traceback(capfd, defect):
    """A mistake becomes one line, whatever line breaks it has; what is not the user's mistake is raised as it is."""

    @one_line_errors
    def main(error):
        raise error

    with pytest.raises(SystemExit, match="2"):
        main(UserError("a file:\n  cannot be\tread"))
    assert capfd.readouterr().err == "error: a file: cannot be read\n"
    with pytest.raises(defect, match="ours"):
        main(defect("ours"))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("script", "module"), [("warp", train_warp), ("reinforce", train_reinforce)])
def test_a_defect_in_a_loop_keeps_its_traceback(workplace, monkeypatch, script, module):
    """A defect in a step leads back to the line of the loop that met it, past RunLog.running."""

    def broken(*_, **__):
        raise RuntimeError("ours")

    monkeypatch.setattr(module, "token_logprobs", broken)
    with pytest.raises(RuntimeError, match=r"^ours$") as error:
        SCRIPTS[script][0](command(script))
    assert [entry.name for entry in error.traceback][-2:] == ["train_policy", "broken"]
