"""transformers, PEFT and TRL read what the scripts write, and the scripts what those write: the same numbers."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import evaluate
import train_reinforce
import train_rm
import train_warp
from rlhf_min import toy
from rlhf_min.reward_model import load_judge
from rlhf_min.rollout import decode_completions, load_policy, sample, uniform_numbers
from rlhf_min.support.batches import pad
from rlhf_min.support.rows import read_rows, write_jsonl
from tests.test_reward_model import EOS, TEMPLATE

BASE = f"{toy.POLICY}/model"
ROWS = [list(range(2, 20)), list(range(40, 45)), list(range(300, 311)), [7]]  # any tokens, of four lengths
PROMPTS = ["This comedy is about a pilot who", "This drama is about a widow who hides a secret.", "This"]
ANSWERS = [" builds a boat. The plot was dull.", " I loved every minute. The cast was superb.", " western."]
TEXTS = [prompt + answer + EOS for prompt, answer in zip(PROMPTS, ANSWERS)]
POLICY = "--batch-size 4 --max-length 16 --num-eval-prompts 4 --steps 1"
REWARD_MODEL = "--epochs 1 --accept-weak --max-length 64 --batch-size 8 --data sixteen.jsonl"
SMALL = {train_warp: f"{POLICY} --iterations 1 --runs 1", train_reinforce: POLICY, train_rm: REWARD_MODEL}
RUNS = {
    "warp": (train_warp, "--lr 1e-2 --runs 2"),
    "lora-warp": (train_warp, "--lr 1e-2 --lora-r 2"),
    "reinforce": (train_reinforce, "--lr 1e-2"),
    "lora-reinforce": (train_reinforce, "--lr 1e-2 --lora-r 2"),
    "scalar": (train_rm, "--lr 1e-2 --lora-r 2"),
    "ordinal": (train_rm, "--lr 1e-2 --lora-r 2 --head ordinal --lora-dropout 0.5"),
}
UNCHANGED = " --lr 0"  # a run that learns nothing writes what it has read
TRL = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
TRL |= {"save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-3}


@torch.no_grad()
def logits(model):
    """What a model of any library computes for ROWS, right-padded: a row of logits per token, or per text."""
    training = model.training
    tokens, attention_mask = pad(ROWS, 1, "cpu")
    found = model.eval()(input_ids=tokens, attention_mask=attention_mask)[0]
    model.train(training)
    return found[attention_mask] if found.dim() == 3 else found


@torch.no_grad()
def reward(model, tokenizer, texts, **padding):
    """Rewards (B,) of a classifier as transformers computes them, a text at a time, or all in a padded batch."""
    batches = [texts] if padding else [[text] for text in texts]
    model.eval()
    return torch.cat([model(**tokenizer(batch, return_tensors="pt", **padding)).logits[:, 0] for batch in batches])


def judge(name, ended=(True, True, True)):
    """Our (reward, sigma) of the three answers."""
    return load_judge(name, "cpu")(PROMPTS, ANSWERS, torch.tensor(ended))


def close(got, expected, atol=1e-5):
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)


def run(script, flags, out):
    """A small run in runs/interchange/`out`: its folder, and the logits of everything it saved, just before it did."""
    before = {}

    def recording(save, model, *arguments):
        (folder,) = (argument for argument in arguments if isinstance(argument, Path))
        before[folder.name] = logits(model)
        return save(model, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("save_model", "save_adapter"):
            patch.setattr(script, name, partial(recording, getattr(script, name)))
        patch.setattr("rlhf_min.support.plots.draw", lambda *args: None)
        write_jsonl("sixteen.jsonl", pairs_of_the_world(16))
        script.main([*f"{SMALL[script]} {flags}".split(), "--out", f"runs/interchange/{out}"])
    return f"runs/interchange/{out}", before


def pairs_of_the_world(count):
    """The first of its preference pairs, with TRL's columns only."""
    rows = read_rows(toy.TRAIN_PAIRS)[:count]
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


@pytest.fixture(scope="module")
def runs(world):
    """A run of every script, with and without adapters: {name: what `run` returns}."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        return {name: run(script, flags, out=name) for name, (script, flags) in RUNS.items()}


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def trl():
    return pytest.importorskip("trl")


# What the scripts write


@pytest.mark.parametrize("name", ["warp/model", "warp/merged", "lora-warp/merged", "reinforce/model"])
def test_transformers_reads_policies(runs, in_world, name):
    """AutoModelForCausalLM computes with model/ and merged/ what the policy in the run's memory did."""
    run, folder = name.split("/")
    theirs = logits(AutoModelForCausalLM.from_pretrained(f"runs/interchange/{name}"))
    close(theirs, runs[run][1][folder])
    assert (theirs - logits(load_policy(BASE, "cpu", 64)[0])).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["warp/merged", "reinforce/model"])
def test_the_pipeline_continues_a_prompt_as_we_do(runs, in_world, name):
    """The greedy text of pipeline("text-generation"), a padded batch, is that of sample near temperature 0."""
    folder = f"runs/interchange/{name}"
    policy, tokenizer = load_policy(folder, "cpu", 64)
    generate = pipeline("text-generation", folder, batch_size=3)
    assert (generate.tokenizer.eos_token, generate.tokenizer.padding_side) == (EOS, "left")
    theirs = [row[0]["generated_text"] for row in generate(PROMPTS, do_sample=False, max_new_tokens=20)]
    for prompt, text in zip(PROMPTS, theirs):
        tokens = tokenizer(prompt)["input_ids"]
        rollout = sample(policy, [tokens], uniform_numbers(1, len(tokens) + 20, torch.Generator()), 1e-6)
        assert decode_completions(tokenizer, rollout) == [text.removeprefix(prompt)]
    assert max(map(len, theirs)) > 60


@pytest.mark.filterwarnings("error::UserWarning")  # PEFT only warns of tensors that it misses
@pytest.mark.parametrize("name", ["lora-warp/model", "lora-warp/merged", "lora-reinforce/model"])
def test_peft_reads_adapters_of_policies(runs, in_world, peft, name):
    """By either of PEFT's doors an adapter on its base computes what the run did, and what its model/ does."""
    adapter = f"runs/interchange/{name}_adapter" if "warp" in name else "runs/interchange/lora-reinforce/adapter"
    expected = runs[name.split("/")[0]][1][adapter.rpartition("/")[2]]
    base = AutoModelForCausalLM.from_pretrained(BASE)
    assert (logits(base) - expected).abs().max() > 1e-3
    close(logits(AutoModelForCausalLM.from_pretrained(f"runs/interchange/{name}")), expected)
    close(logits(peft.AutoPeftModelForCausalLM.from_pretrained(adapter)), expected)
    close(logits(peft.PeftModel.from_pretrained(base, adapter)), expected)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("head, labels", [("scalar", 1), ("ordinal", 10)])
def test_peft_reads_adapters_of_reward_models(runs, in_world, peft, head, labels):
    """With the head that the run trained, PEFT's model of adapter/ scores as the run's did, dropout off."""
    folder, before = runs[head]
    close(before["adapter"], before["model"])
    close(logits(AutoModelForSequenceClassification.from_pretrained(f"{folder}/model")), before["model"])
    door = peft.AutoPeftModelForSequenceClassification
    close(logits(door.from_pretrained(f"{folder}/adapter", num_labels=labels)), before["model"])
    base = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=labels)
    close(logits(peft.PeftModel.from_pretrained(base, f"{folder}/adapter")), before["model"])


@pytest.mark.parametrize("name", [toy.REWARD_MODEL, "runs/interchange/scalar"])
def test_transformers_gives_the_reward_of_a_scalar_reward_model(runs, in_world, name):
    """One text or a right-padded batch, model or pipeline: our reward, because pad is a token of its own."""
    expected, sigma = judge(name)
    assert expected.std() > 0.01 and not sigma.any()
    model = AutoModelForSequenceClassification.from_pretrained(f"{name}/model")
    tokenizer = AutoTokenizer.from_pretrained(f"{name}/model")
    assert tokenizer.padding_side == "right" and tokenizer.pad_token != tokenizer.eos_token
    close(reward(model, tokenizer, TEXTS), expected)
    close(reward(model, tokenizer, TEXTS, padding=True), expected)
    rows = pipeline("text-classification", f"{name}/model", function_to_apply="none", batch_size=3)(TEXTS)
    assert [row["score"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("name", [toy.ORDINAL_REWARD_MODEL, "runs/interchange/ordinal"])
def test_the_pipeline_gives_the_ratings_of_an_ordinal_reward_model(runs, in_world, name):
    """pipeline("text-classification", top_k=None) gives "1" to "10" the probabilities of our mean and sigma."""
    mean, sigma = judge(name)
    rows = pipeline("text-classification", f"{name}/model", top_k=None, batch_size=3)(TEXTS)
    probabilities = [{int(label["label"]): label["score"] for label in row} for row in rows]
    assert all(sorted(row) == list(range(1, 11)) for row in probabilities)
    theirs = [sum(k * row[k] for k in row) for row in probabilities]
    spread = [sum((k - m) ** 2 * row[k] for k in row) ** 0.5 for row, m in zip(probabilities, theirs)]
    assert mean.tolist() == pytest.approx(theirs, abs=1e-4) and mean.std() > 0.01
    assert sigma.tolist() == pytest.approx(spread, abs=1e-4) and sigma.min() > 0.1


# TRL with what the scripts write


def rloo(trl, folder, reward_funcs, messages=False, steps=1, **arguments):
    """TRL's RLOOTrainer on the toy policy with these judges; its prompts are reviews that soon end."""
    settings = {"num_generations": 2, "per_device_train_batch_size": 8, "max_completion_length": 12, "max_steps": steps}
    prompts = [row["prompt"] + row["chosen"] for row in pairs_of_the_world(8)]
    prompts = [{"prompt": [{"role": "user", "content": prompt}] if messages else prompt} for prompt in prompts]
    prompts = pytest.importorskip("datasets").Dataset.from_list(prompts)
    config = trl.RLOOConfig(str(folder), **TRL, **settings)
    return trl.RLOOTrainer(BASE, reward_funcs, config, train_dataset=prompts, **arguments)


def as_function(spec):
    """(f, calls): a judge of ours as TRL's reward function, and what it returned.

    TRL appends no EOS to a prompt and completion of plain text, whether or not the answer had one: `reward` is as for
    an answer that has not ended, `closed` with an EOS where there was one. Messages go through the chat template, which
    ends them all.
    """
    judge, calls = load_judge(spec, "cpu"), []

    def ours(prompts, completions, completion_ids, **columns):
        messages = isinstance(prompts[0], list)
        texts = [completion[0]["content"] if messages else completion for completion in completions]
        rewards = judge(prompts, texts, torch.full([len(prompts)], messages))[0]
        ended = torch.tensor([judge.tokenizer.eos_token_id in ids for ids in completion_ids])
        calls.append({"reward": rewards, "closed": judge(prompts, texts, ended)[0], "ended": ended})
        return rewards.tolist()

    return ours, calls


def test_trl_takes_our_reward_model_by_its_path(tmp_path, in_world, trl):
    """RLOOTrainer's rewards are ours, answer by answer and in its log; what it trained is a policy to us."""
    ours, calls = as_function(toy.REWARD_MODEL)
    trainer = rloo(trl, tmp_path, [f"{toy.REWARD_MODEL}/model", ours], steps=2)
    scores = []
    trainer.reward_funcs[0].register_forward_hook(lambda *call: scores.append(call[-1].logits[:, 0].clone()))
    trainer.train()
    log = [row for row in trainer.state.log_history if "reward" in row]
    assert len(calls) == 2
    for row, theirs, call in zip(log, scores, calls, strict=True):
        close(theirs, call["reward"], atol=1e-4)
        for name in ("model", "ours"):
            assert row[f"rewards/{name}/mean"] == pytest.approx(theirs.mean().item(), abs=1e-4)
        assert theirs.std() > 0.01
    closed, rewards, ended = (torch.cat([call[name] for call in calls]) for name in ("closed", "reward", "ended"))
    assert ended.any() and not ended.all()
    assert torch.equal((closed - rewards).abs() > 1e-4, ended)  # the EOS that TRL leaves out counts
    trainer.save_model(str(tmp_path / "trained"))
    policy, _ = load_policy(str(tmp_path / "trained"), "cpu", 64)
    close(logits(policy), logits(trainer.model))
    assert (logits(policy) - logits(load_policy(BASE, "cpu", 64)[0])).abs().max() > 1e-3


def test_trl_takes_our_reward_model_as_an_object_for_messages(tmp_path, in_world, trl):
    """A conversation goes through the judge's chat template in TRL as in ours, with one EOS: the same rewards."""
    path, tokenizer = str(tmp_path / "judge"), AutoTokenizer.from_pretrained(f"{toy.REWARD_MODEL}/model")
    AutoModelForSequenceClassification.from_pretrained(f"{toy.REWARD_MODEL}/model").save_pretrained(path)
    policy_tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = policy_tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    model, (ours, calls) = AutoModelForSequenceClassification.from_pretrained(path), as_function(path)
    scores = []
    model.register_forward_hook(lambda *call: scores.append(call[-1].logits[:, 0].clone()))
    rloo(trl, tmp_path / "log", [model, ours], messages=True, processing_class=policy_tokenizer).train()
    assert len(calls) == 1 and calls[0]["reward"].std() > 0.01
    close(scores[0], calls[0]["reward"], atol=1e-4)


def test_trl_takes_an_ordinal_reward_model_as_a_function_only(tmp_path, in_world, trl):
    """By its path TRL refuses ten ratings; wrapped as a function, our judge gives TRL the mean rating."""
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        rloo(trl, tmp_path, f"{toy.ORDINAL_REWARD_MODEL}/model")
    ours, calls = as_function(toy.ORDINAL_REWARD_MODEL)
    trainer = rloo(trl, tmp_path, ours)
    trainer.train()
    rating = trainer.state.log_history[0]["reward"]
    assert 1 < rating < 10 and rating == pytest.approx(calls[0]["reward"].mean().item(), abs=1e-4)


# What the scripts read


def check_reward_model(name, model, tokenizer, base=True):
    """Assert that our judge, and train_rm --base `name`, have the reward that transformers gives, head included."""
    expected = reward(model, tokenizer, [text.removesuffix(EOS) for text in TEXTS[:1]] + TEXTS[1:])
    close(judge(name, ended=(False, True, True))[0], expected, atol=1e-4)
    assert expected.std() > 1e-3
    if base:
        folder, _ = run(train_rm, f"--base {name}{UNCHANGED}", out=f"from-{Path(name).parent.name}")
        close(judge(folder)[0], reward(model, tokenizer, TEXTS))


def peft_adapter(peft, folder, auto_class, labels, **config):
    """An adapter of PEFT's own on the toy policy, with a B that is not 0, saved in `folder`; returns its model."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=3, lora_alpha=2, init_lora_weights=False, **config)
    model = peft.get_peft_model(auto_class.from_pretrained(BASE, **labels), config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_peft_is_a_policy(tmp_path, in_world, peft, rslora):
    """Each script that takes a policy takes W + ΔW of PEFT's adapter: logits, and KL to the base, are PEFT's."""
    adapter, config = str(tmp_path / "adapter"), {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    config["use_rslora"] = rslora
    model = peft_adapter(peft, adapter, AutoModelForCausalLM, {}, **config)
    for script in (train_reinforce, train_warp):
        folder, _ = run(script, f"--policy {adapter}{UNCHANGED}", out=f"{script.__name__}-on-peft-{rslora}")
        close(logits(AutoModelForCausalLM.from_pretrained(f"{folder}/model")), logits(model))
    merged, out = str(tmp_path / "merged"), f"runs/interchange/compared-{rslora}"
    model.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(merged)
    evaluate.main(["--policies", BASE, adapter, merged, "--num-prompts", "8", "--max-length", "16", "--out", out])
    base, adapted, dense = json.loads(Path(out, "summary.json").read_text())["rows"]
    assert base["kl"] == 0 and adapted["kl"] > 0.01
    assert adapted["kl"] == pytest.approx(dense["kl"], abs=1e-4)
    assert adapted["gold"] == pytest.approx(dense["gold"], abs=1e-6)


def test_an_adapter_of_peft_is_a_reward_model(tmp_path, in_world, peft):
    """A SEQ_CLS adapter brings its head along: our reward is PEFT's, and that of train_rm's base, too."""
    adapter, config = str(tmp_path / "adapter"), {"task_type": "SEQ_CLS", "target_modules": ["c_attn"]}
    model = peft_adapter(peft, adapter, AutoModelForSequenceClassification, {"num_labels": 1}, **config)
    check_reward_model(adapter, model, AutoTokenizer.from_pretrained(BASE))


def train_reward_model(trl, folder, base, peft_config=None):
    """(model, tokenizer) after two steps of TRL's RewardTrainer from `base`, saved in `folder`."""
    arguments = trl.RewardConfig(f"{folder}-log", **TRL, per_device_train_batch_size=4, max_steps=2)
    pairs = pytest.importorskip("datasets").Dataset.from_list(pairs_of_the_world(8))
    trainer = trl.RewardTrainer(base, arguments, train_dataset=pairs, peft_config=peft_config)
    trainer.train()
    trainer.save_model(folder)
    return trainer.model, trainer.processing_class


@pytest.mark.parametrize("with_adapter", [False, True], ids=["full", "peft"])
def test_a_reward_model_of_trl_is_one_of_ours(tmp_path, in_world, trl, peft, with_adapter):
    """What RewardTrainer saved gives the reward that the trainer's model does, as judge and as base."""
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["c_attn"]) if with_adapter else None
    check_reward_model(str(tmp_path / "trl"), *train_reward_model(trl, str(tmp_path / "trl"), BASE, config))


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 96}
NAMES = {"eos": EOS, "bos": "<s>", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]"}
SPECIAL = {  # GPT-2 has no pad token, Llama begins with a BOS, BERT has [CLS] ... [SEP]
    "GPT2LMHeadModel": ("$A", ["eos"]),
    "LlamaForCausalLM": ("<s> $A", ["eos", "bos"]),
    "BertForSequenceClassification": ("[CLS] $A [SEP]", ["pad", "cls", "sep"]),
}
language_models = pytest.mark.parametrize("kind", [*SPECIAL][:2])


@pytest.fixture
def plain(in_world, tmp_path):
    """Make a folder of transformers' own save_pretrained, in pieces: (its name, the model in memory, the tokenizer)."""

    def make(kind):
        torch.manual_seed(4)
        template, names = SPECIAL[kind]
        names = {f"{name}_token": NAMES[name] for name in names}
        backend = AutoTokenizer.from_pretrained(BASE).backend_tokenizer
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
        ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in template.split() if name != "$A"]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=ids)
        sizes = SIZES | {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        sizes |= {"num_labels": 1} if "Sequence" in kind else {}
        config = getattr(transformers, kind).config_class(vocab_size=len(tokenizer), initializer_range=0.2, **sizes)
        model = getattr(transformers, kind)(config).eval()
        model.save_pretrained(str(tmp_path / "plain"), max_shard_size="40KB")
        tokenizer.save_pretrained(str(tmp_path / "plain"))
        return str(tmp_path / "plain"), model, tokenizer

    return make


@language_models
def test_a_plain_language_model_is_a_policy_and_a_base(plain, peft, kind):
    """A run that learns nothing writes what transformers had saved; a base gets a pad token, so that batches are right.

    transformers and PEFT score batches as our judge does.
    """
    name, model, _ = plain(kind)
    for script, flags in ((train_reinforce, " --lora-r 2"), (train_warp, "")):
        folder, _ = run(script, f"--policy {name}{UNCHANGED}{flags}", out=f"{script.__name__}-on-{kind}")
        close(logits(AutoModelForCausalLM.from_pretrained(f"{folder}/model")), logits(model))
    folder, _ = run(train_rm, f"--base {name}{UNCHANGED} --lora-r 2", out=f"rm-of-{kind}")
    close(logits(transformers.AutoModel.from_pretrained(f"{folder}/model")), logits(model.base_model))
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/adapter")
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(f"{folder}/adapter", num_labels=1)
    theirs.config.pad_token_id = tokenizer.pad_token_id  # the base's config has none, and an adapter none at all
    for scorer in (AutoModelForSequenceClassification.from_pretrained(f"{folder}/model"), theirs):
        close(reward(scorer, tokenizer, TEXTS, padding=True), judge(folder)[0])
    assert judge(folder)[0].std() > 1e-3


def test_a_reward_model_of_trl_whose_pad_token_is_eos(tmp_path, plain, trl):
    """Of a tokenizer without a pad token TRL makes pad = EOS, and trains the token before: so must we read it."""
    model, tokenizer = train_reward_model(trl, str(tmp_path / "trl"), plain("LlamaForCausalLM")[0])
    assert model.config.pad_token_id == tokenizer.eos_token_id
    check_reward_model(str(tmp_path / "trl"), model, tokenizer, base=False)


@language_models
def test_an_adapter_of_peft_with_a_new_token_is_a_policy(tmp_path, plain, peft, kind):
    """Embeddings that were resized are in PEFT's adapter, under both names if tied: logits agree."""
    name, _, tokenizer = plain(kind)
    tokenizer.add_special_tokens({"pad_token": "<|new|>"})
    base = AutoModelForCausalLM.from_pretrained(name)
    base.resize_token_embeddings(len(tokenizer))
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    for part in (model, tokenizer):
        part.save_pretrained(str(tmp_path / "adapter"))
    close(logits(load_policy(str(tmp_path / "adapter"), "cpu", 64)[0]), logits(model))


def test_a_plain_encoder_is_a_reward_model(plain):
    """A BERT with one label and a tokenizer of its own judges answers as transformers does."""
    name, model, tokenizer = plain("BertForSequenceClassification")
    expected = reward(model, tokenizer, [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS)])
    close(judge(name)[0], expected)
    assert expected.std() > 1e-3
