"""transformers, PEFT and TRL read what the scripts write, and the scripts what those write: the same numbers."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

import evaluate
import train_reinforce
import train_rm
import train_warp
from rlhf_min import toy
from rlhf_min.batches import pad
from rlhf_min.data import read_rows, write_jsonl
from rlhf_min.models import load_policy
from rlhf_min.reward_model import load_judge
from rlhf_min.rollout import decode_completions, sample

BASE = f"{toy.POLICY}/model"
EOS = "<|endoftext|>"
ROWS = [list(range(2, 20)), list(range(40, 45)), list(range(300, 311)), [7]]  # any tokens, of four lengths
PROMPTS = ["This comedy is about a pilot who", "This drama is about a widow who hides a secret.", "This"]
ANSWERS = [" builds a boat. The plot was dull.", " I loved every minute. The cast was superb.", " western."]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
WARP = ["--batch-size", "4", "--max-length", "16", "--num-eval-prompts", "4", "--steps", "1"]
ONE_RUN = ["--iterations", "1", "--runs", "1"]
REWARD_MODEL = ["--epochs", "1", "--accept-weak", "--max-length", "64", "--batch-size", "8", "--data", "sixteen.jsonl"]
SMALL = {train_warp: WARP, train_reinforce: WARP, train_rm: REWARD_MODEL}
UNCHANGED = ["--lr", "0"]  # a run that learns nothing writes what it has read
RUNS = {
    "warp": (train_warp, ["--lr", "1e-2"]),
    "lora-warp": (train_warp, ["--lr", "1e-2", "--lora-r", "2", *ONE_RUN]),
    "reinforce": (train_reinforce, ["--lr", "1e-2"]),
    "lora-reinforce": (train_reinforce, ["--lr", "1e-2", "--lora-r", "2"]),
    "scalar": (train_rm, ["--lora-r", "2", "--lr", "1e-2"]),
    "ordinal": (train_rm, ["--lora-r", "2", "--lr", "1e-2", "--head", "ordinal", "--lora-dropout", "0.5"]),
}


@torch.no_grad()
def logits(model):
    """What a model of any library computes for ROWS, right-padded: a row of logits per token, or per text."""
    training = model.training
    tokens, attention_mask = pad(ROWS, 1, "cpu")
    found = model.eval()(input_ids=tokens, attention_mask=attention_mask)[0]
    model.train(training)
    return found[attention_mask] if found.dim() == 3 else found


@torch.no_grad()
def reward(model, tokenizer, texts):
    """(B, K) logits of a classifier as transformers computes them, a text at a time: no padding."""
    return torch.cat([model.eval()(**tokenizer(text, return_tensors="pt")).logits for text in texts])


def close(got, expected, atol=1e-5):
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)


def run(script, *flags, out):
    """A small run in runs/interchange/`out`: its folder, and the logits of everything it saved, just before it did."""
    folder, before = f"runs/interchange/{out}", {}

    def recording(save):
        def wrapped(model, *arguments):
            (folder,) = (argument for argument in arguments if isinstance(argument, Path))
            before[folder.name] = logits(model)
            return save(model, *arguments)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("save_model", "save_adapter"):
            patch.setattr(script, name, recording(getattr(script, name)))
        patch.setattr("rlhf_min.plots._pyplot", lambda: None)
        write_jsonl("sixteen.jsonl", pairs_of_the_world(16))
        script.main([*SMALL[script], *flags, "--out", folder])
    return folder, before


def pairs_of_the_world(count):
    """The first of its preference pairs, with TRL's columns only."""
    rows = [row for _, row in read_rows(toy.TRAIN_PAIRS)][:count]
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


@pytest.fixture(scope="module")
def runs(world):
    """A run of every script, with and without adapters: {name: what `run` returns}."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        return {name: run(script, *flags, out=name) for name, (script, flags) in RUNS.items()}


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def trl():
    pytest.importorskip("datasets")
    return pytest.importorskip("trl")


# What the scripts write


@pytest.mark.parametrize("name", ["warp/model", "warp/merged", "lora-warp/merged", "reinforce/model"])
def test_transformers_reads_policies(runs, in_world, name):
    """T48: AutoModelForCausalLM computes with model/ and merged/ what the policy in the run's memory did."""
    _, before = runs[name.split("/")[0]]
    theirs = AutoModelForCausalLM.from_pretrained(f"runs/interchange/{name}")
    close(logits(theirs), before[name.split("/")[1]])
    assert (logits(theirs) - logits(load_policy(BASE, "cpu", 64)[0])).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["warp/model", "reinforce/model"])
def test_the_pipeline_continues_a_prompt_as_we_do(runs, in_world, name):
    """T3, T56: the greedy text of pipeline("text-generation"), a padded batch, is that of sample near temperature 0."""
    folder = f"runs/interchange/{name}"
    policy, tokenizer = load_policy(folder, "cpu", 64)
    generate = pipeline("text-generation", folder, batch_size=3)
    assert (generate.tokenizer.eos_token, generate.tokenizer.padding_side) == (EOS, "left")
    theirs = [row[0]["generated_text"] for row in generate(PROMPTS, do_sample=False, max_new_tokens=20)]
    prompts = tokenizer(PROMPTS)["input_ids"]
    width = max(map(len, prompts)) + 20
    rollout = sample(policy, prompts, width, 1e-6, tokenizer.eos_token_id, tokenizer.pad_token_id, torch.Generator())
    ours = decode_completions(tokenizer, rollout)
    assert [text.removeprefix(prompt) for prompt, text in zip(PROMPTS, theirs)] == ours
    assert max(map(len, ours)) > 20


@pytest.mark.filterwarnings("error::UserWarning")  # PEFT only warns of tensors that it misses
@pytest.mark.parametrize("name", ["lora-warp/model", "lora-warp/merged", "lora-reinforce/model"])
def test_peft_reads_adapters_of_policies(runs, in_world, peft, name):
    """T63: by either of PEFT's doors an adapter on its base computes what the run did, and what its model/ does."""
    _, before = runs[name.split("/")[0]]
    adapter = f"runs/interchange/{name}_adapter" if "warp" in name else "runs/interchange/lora-reinforce/adapter"
    base = AutoModelForCausalLM.from_pretrained(BASE)
    expected = before[adapter.rpartition("/")[2]]
    assert (logits(base) - expected).abs().max() > 1e-3
    close(logits(AutoModelForCausalLM.from_pretrained(f"runs/interchange/{name}")), expected)
    close(logits(peft.AutoPeftModelForCausalLM.from_pretrained(adapter)), expected)
    close(logits(peft.PeftModel.from_pretrained(base, adapter)), expected)


@pytest.mark.filterwarnings("error::UserWarning")  # PEFT only warns of tensors that it misses
@pytest.mark.parametrize("head", ["scalar", "ordinal"])
def test_peft_reads_adapters_of_reward_models(runs, in_world, peft, head):
    """T64: with the head that the run trained, PEFT's model of adapter/ scores as the run's did, dropout off."""
    folder, before = runs[head]
    labels = {"num_labels": 1 if head == "scalar" else 10}
    close(before["adapter"], before["model"])
    close(logits(AutoModelForSequenceClassification.from_pretrained(f"{folder}/model")), before["model"])
    door = peft.AutoPeftModelForSequenceClassification
    close(logits(door.from_pretrained(f"{folder}/adapter", **labels)), before["model"])
    base = AutoModelForSequenceClassification.from_pretrained(BASE, **labels)
    close(logits(peft.PeftModel.from_pretrained(base, f"{folder}/adapter")), before["model"])


@pytest.mark.parametrize("name", [toy.REWARD_MODEL, "runs/interchange/scalar"])
def test_transformers_gives_the_reward_of_a_scalar_reward_model(runs, in_world, name):
    """T20, T67: one text or a right-padded batch, model or pipeline: our reward, because pad is a token of its own."""
    expected, sigma = load_judge(name, "cpu")(PROMPTS, ANSWERS, [True] * 3)
    assert expected.std() > 0.01 and not sigma.any()
    texts = [prompt + answer + EOS for prompt, answer in zip(PROMPTS, ANSWERS)]
    model = AutoModelForSequenceClassification.from_pretrained(f"{name}/model")
    tokenizer = AutoTokenizer.from_pretrained(f"{name}/model")
    assert tokenizer.padding_side == "right" and tokenizer.pad_token != tokenizer.eos_token
    close(reward(model, tokenizer, texts)[:, 0], expected)
    with torch.no_grad():
        close(model(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0], expected)
    rows = pipeline("text-classification", f"{name}/model", function_to_apply="none", batch_size=3)(texts)
    assert [row["score"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("name", [toy.ORDINAL_REWARD_MODEL, "runs/interchange/ordinal"])
def test_the_pipeline_gives_the_ratings_of_an_ordinal_reward_model(runs, in_world, name):
    """T32: pipeline("text-classification", top_k=None) gives "1" to "10" the probabilities of our mean and sigma."""
    mean, sigma = load_judge(name, "cpu")(PROMPTS, ANSWERS, [True] * 3)
    texts = [prompt + answer + EOS for prompt, answer in zip(PROMPTS, ANSWERS)]
    rows = pipeline("text-classification", f"{name}/model", top_k=None, batch_size=3)(texts)
    probabilities = [{int(label["label"]): label["score"] for label in row} for row in rows]
    assert all(sorted(row) == list(range(1, 11)) for row in probabilities)
    theirs = [sum(k * row[k] for k in row) for row in probabilities]
    spread = [sum((k - m) ** 2 * row[k] for k in row) ** 0.5 for row, m in zip(probabilities, theirs)]
    assert mean.tolist() == pytest.approx(theirs, abs=1e-4) and mean.std() > 0.01
    assert sigma.tolist() == pytest.approx(spread, abs=1e-4) and sigma.min() > 0.1


# TRL with what the scripts write


COMMON = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
          "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-3}  # fmt: skip


def rloo(trl, folder, reward_funcs, messages=False, steps=1, **arguments):
    """TRL's RLOOTrainer on the toy policy with these judges; its prompts are reviews that soon end."""
    import datasets

    settings = {"num_generations": 2, "per_device_train_batch_size": 8, "max_completion_length": 12, "max_steps": steps}
    prompts = [row["prompt"] + row["chosen"] for row in pairs_of_the_world(8)]
    if messages:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    prompts = datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    config = trl.RLOOConfig(str(folder), **COMMON, **settings)
    return trl.RLOOTrainer(BASE, reward_funcs, config, train_dataset=prompts, **arguments)


def as_function(spec):
    """(f, calls): a judge of ours as TRL's reward function, and what it was called with and returned.

    TRL appends no EOS to a prompt and completion of plain text, whether or not the answer had one: `reward` is as for
    an answer that has not ended, `closed` with an EOS where there was one. Messages go through the chat template, which
    ends them all.
    """
    judge, calls = load_judge(spec, "cpu"), []

    def ours(prompts, completions, completion_ids, **columns):
        messages = isinstance(prompts[0], list)
        texts = [completion[0]["content"] if messages else completion for completion in completions]
        rewards = judge(prompts, texts, [messages] * len(prompts))[0]
        ended = [judge.tokenizer.eos_token_id in ids for ids in completion_ids]
        calls.append({"reward": rewards, "closed": judge(prompts, texts, ended)[0], "ended": ended})
        return rewards.tolist()

    return ours, calls


def record_scores(model):
    """A list that will hold the rewards (B,) of every batch that a classifier is called with."""
    scores = []
    model.register_forward_hook(lambda module, inputs, output: scores.append(output.logits[:, 0].clone()))
    return scores


def test_trl_takes_our_reward_model_by_its_path(tmp_path, in_world, trl):
    """T20, T67: RLOOTrainer's rewards are ours, answer by answer and in its log; what it trained is a policy to us."""
    ours, calls = as_function(toy.REWARD_MODEL)
    trainer = rloo(trl, tmp_path, [f"{toy.REWARD_MODEL}/model", ours], steps=2)
    scores = record_scores(trainer.reward_funcs[0])
    trainer.train()
    log = [row for row in trainer.state.log_history if "reward" in row]
    for row, theirs, call in zip(log, scores, calls, strict=True):
        close(theirs, call["reward"], atol=1e-4)
        for name, figure in (("mean", theirs.mean()), ("std", theirs.std())):
            assert row[f"rewards/model/{name}"] == pytest.approx(row[f"rewards/ours/{name}"], abs=1e-4)
            assert row[f"rewards/model/{name}"] == pytest.approx(figure.item(), abs=1e-4)
        assert theirs.std() > 0.01
    assert len(calls) == 2
    ended = [end for call in calls for end in call["ended"]]
    differs = [bool(x) for call in calls for x in (call["closed"] - call["reward"]).abs() > 1e-4]
    assert 0 < sum(ended) < len(ended) and differs == ended  # the EOS that TRL leaves out counts
    trainer.save_model(str(tmp_path / "trained"))
    policy, _ = load_policy(str(tmp_path / "trained"), "cpu", 64)
    close(logits(policy), logits(trainer.model))
    assert (logits(policy) - logits(load_policy(BASE, "cpu", 64)[0])).abs().max() > 1e-3


def test_trl_takes_our_reward_model_as_an_object_for_messages(tmp_path, in_world, trl):
    """T19: a conversation goes through the judge's chat template in TRL as in ours, with one EOS: the same rewards."""
    model, tokenizer = (kind.from_pretrained(f"{toy.REWARD_MODEL}/model")
                        for kind in (AutoModelForSequenceClassification, AutoTokenizer))  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    for part in (model, tokenizer):
        part.save_pretrained(str(tmp_path / "judge"))
    model = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "judge"))
    ours, calls = as_function(str(tmp_path / "judge"))
    policy_tokenizer = AutoTokenizer.from_pretrained(BASE)
    policy_tokenizer.chat_template = TEMPLATE
    scores = record_scores(model)
    rloo(trl, tmp_path / "log", [model, ours], messages=True, processing_class=policy_tokenizer).train()
    assert len(calls) == 1 and calls[0]["reward"].std() > 0.01
    close(scores[0], calls[0]["reward"], atol=1e-4)


def test_trl_takes_an_ordinal_reward_model_as_a_function_only(tmp_path, in_world, trl):
    """T32: by its path TRL refuses ten ratings; wrapped as a function, our judge gives TRL the mean rating."""
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        rloo(trl, tmp_path, f"{toy.ORDINAL_REWARD_MODEL}/model")
    ours, calls = as_function(toy.ORDINAL_REWARD_MODEL)
    trainer = rloo(trl, tmp_path, ours)
    trainer.train()
    rating = trainer.state.log_history[0]["reward"]
    assert 1 < rating < 10 and rating == pytest.approx(calls[0]["reward"].mean().item(), abs=1e-4)


# What the scripts read


def judged(patch, *flags, out):
    """The columns of train_reinforce's held-out answers, `reward` among them: what its judge made of each."""
    judge_policy, seen = train_reinforce.judge_policy, []

    def recording(*arguments):
        seen.append(judge_policy(*arguments))
        return seen[-1]

    patch.setattr(train_reinforce, "judge_policy", recording)
    run(train_reinforce, *flags, "--temperature", "1.5", "--max-length", "28", "--num-eval-prompts", "24", out=out)
    assert 0 < sum(seen[-1]["ended"]) < 24
    return seen[-1]


def texts_of(columns, tokenizer):
    """The texts that the judge read: with an EOS where the answer has ended and the tokenizer has one."""
    ends = [tokenizer.eos_token or "" if ended else "" for ended in columns["ended"]]
    return [prompt + answer + end for prompt, answer, end in zip(columns["prompt"], columns["completion"], ends)]


def check_reward_model(patch, name, model, tokenizer):
    """Assert that --reward-model `name` gives the answers of a run the reward that transformers gives them."""
    columns = judged(patch, "--reward-model", name, out=f"judged-by-{Path(name).parent.name}")
    expected = reward(model, tokenizer, texts_of(columns, tokenizer))[:, 0]
    assert columns["reward"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert expected.std() > 1e-3


def check_reward_base(name, model, tokenizer):
    """Assert that train_rm --base `name` begins with the reward that transformers gives, head included."""
    folder, _ = run(train_rm, "--base", name, *UNCHANGED, out=f"from-{Path(name).parent.name}")
    texts = [prompt + answer + EOS for prompt, answer in zip(PROMPTS, ANSWERS)]
    expected = reward(model, tokenizer, texts)[:, 0]
    close(load_judge(folder, "cpu")(PROMPTS, ANSWERS, [True] * 3)[0], expected)
    assert expected.std() > 1e-3


@pytest.fixture
def peft_adapter(in_world, tmp_path, peft):
    """Make an adapter of PEFT's own on the toy policy, with a B that is not 0: (its name, the model in memory)."""

    def make(auto_class, **config):
        torch.manual_seed(3)
        labels = {"num_labels": 1} if auto_class is AutoModelForSequenceClassification else {}
        base = auto_class.from_pretrained(BASE, **labels)
        config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **config)
        model = peft.get_peft_model(base, config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(0.3)
        model.save_pretrained(str(tmp_path / "adapter"))
        return str(tmp_path / "adapter"), model

    return make


def test_an_adapter_of_peft_is_a_policy(tmp_path, peft_adapter):
    """T63: each script that takes a policy takes W + ΔW of PEFT's adapter: logits, and KL to the base, are PEFT's."""
    adapter, model = peft_adapter(AutoModelForCausalLM, task_type="CAUSAL_LM", target_modules="all-linear")
    expected = logits(model)
    for script, flags in ((train_reinforce, []), (train_warp, ONE_RUN)):
        folder, _ = run(script, "--policy", adapter, *flags, *UNCHANGED, out=f"{script.__name__}-on-peft")
        close(logits(AutoModelForCausalLM.from_pretrained(f"{folder}/model")), expected)
    merged = str(tmp_path / "merged")
    model.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(merged)
    out = "runs/interchange/compared"
    evaluate.main(["--policies", BASE, adapter, merged, "--num-prompts", "8", "--max-length", "16", "--out", out])
    base, adapted, dense = json.loads(Path(out, "summary.json").read_text())["rows"]
    assert base["kl"] == 0 and adapted["kl"] > 0.01
    assert adapted["kl"] == pytest.approx(dense["kl"], abs=1e-4)
    assert adapted["gold"] == pytest.approx(dense["gold"], abs=1e-6)


def test_an_adapter_of_peft_is_a_reward_model(peft_adapter, monkeypatch):
    """T64: a SEQ_CLS adapter brings its head along: the reward in a run is PEFT's, and that of train_rm's base, too."""
    adapter, model = peft_adapter(AutoModelForSequenceClassification, task_type="SEQ_CLS", target_modules=["c_attn"])
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    check_reward_model(monkeypatch, adapter, model, tokenizer)
    check_reward_base(adapter, model, tokenizer)


def train_reward_model(trl, folder, base, peft_config=None):
    """Two steps of TRL's RewardTrainer from `base`, saved in `folder`; returns the trainer."""
    import datasets

    arguments = trl.RewardConfig(f"{folder}-log", **COMMON, per_device_train_batch_size=4, max_steps=2)
    pairs = datasets.Dataset.from_list(pairs_of_the_world(8))
    trainer = trl.RewardTrainer(base, arguments, train_dataset=pairs, peft_config=peft_config)
    trainer.train()
    trainer.save_model(folder)
    return trainer


@pytest.mark.parametrize("with_adapter", [False, True], ids=["full", "peft"])
def test_a_reward_model_of_trl_is_one_of_ours(tmp_path, in_world, trl, peft, monkeypatch, with_adapter):
    """T19, T64: what RewardTrainer saved gives the reward that the trainer's model does, as judge and as base."""
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["c_attn"]) if with_adapter else None
    trainer = train_reward_model(trl, str(tmp_path / "trl"), BASE, config)
    check_reward_model(monkeypatch, str(tmp_path / "trl"), trainer.model, trainer.processing_class)
    check_reward_base(str(tmp_path / "trl"), trainer.model, trainer.processing_class)


def bare_tokenizer(bos=False, ends=False):
    """The toy tokenizer as others have theirs: no pad token as GPT-2, with a BOS as Llama, [CLS] ... [SEP] as BERT."""
    backend = AutoTokenizer.from_pretrained(BASE).backend_tokenizer
    if ends:
        names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        names = {"eos_token": EOS} | ({"bos_token": "<s>"} if bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    if bos or ends:
        around = [name for name in ("<s>", "[CLS]", "[SEP]") if name in tokenizer.get_vocab()]
        template = "[CLS] $A [SEP]" if ends else "<s> $A"
        ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in around]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=ids)
    return tokenizer


def gpt2():
    tokenizer = bare_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=96, n_layer=2, n_embd=32, n_head=2,
                        bos_token_id=0, eos_token_id=0, initializer_range=0.2)  # fmt: skip
    return GPT2LMHeadModel(config), tokenizer


def llama():
    tokenizer = bare_tokenizer(bos=True)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96,
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=0, initializer_range=0.2)  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def bert():
    tokenizer = bare_tokenizer(ends=True)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                        num_attention_heads=2, max_position_embeddings=96, num_labels=1, initializer_range=0.2,
                        pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    return BertForSequenceClassification(config), tokenizer


@pytest.fixture
def plain(in_world, tmp_path):
    """Make a folder of transformers' own save_pretrained: (its name, the model in memory, the tokenizer)."""

    def make(build):
        torch.manual_seed(4)
        model, tokenizer = build()
        for part in (model, tokenizer):
            part.save_pretrained(str(tmp_path / "plain"), **({"max_shard_size": "40KB"} if part is model else {}))
        return str(tmp_path / "plain"), model.eval(), tokenizer

    return make


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_plain_language_model_is_a_policy(plain, build):
    """T48: a run that learns nothing writes what transformers had saved, in pieces and without a pad token."""
    name, model, _ = plain(build)
    for script, flags in ((train_reinforce, ["--lora-r", "2"]), (train_warp, ONE_RUN)):
        out = f"{script.__name__}-on-{build.__name__}"
        folder, _ = run(script, "--policy", name, *flags, *UNCHANGED, out=out)
        close(logits(AutoModelForCausalLM.from_pretrained(f"{folder}/model")), logits(model))


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_plain_language_model_is_the_base_of_a_reward_model(plain, peft, build):
    """T64, T67: the backbone stays, a pad token is added, and transformers and PEFT score batches as our judge does."""
    name, model, _ = plain(build)
    folder, _ = run(train_rm, "--base", name, *UNCHANGED, "--lora-r", "2", out=f"rm-of-{build.__name__}")
    close(logits(AutoModel.from_pretrained(f"{folder}/model")), logits(model.base_model))
    expected = load_judge(folder, "cpu")(PROMPTS, ANSWERS, [True] * 3)[0]
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/adapter")
    texts = [prompt + answer + EOS for prompt, answer in zip(PROMPTS, ANSWERS)]
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(f"{folder}/adapter", num_labels=1)
    theirs.config.pad_token_id = tokenizer.pad_token_id  # the base's config has none, and an adapter none at all
    for scorer in (AutoModelForSequenceClassification.from_pretrained(f"{folder}/model"), theirs):
        with torch.no_grad():
            close(scorer.eval()(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0], expected)
    assert expected.std() > 1e-3


def test_a_reward_model_of_trl_whose_pad_token_is_eos(tmp_path, plain, trl, monkeypatch):
    """T67: of a tokenizer without a pad token TRL makes pad = EOS, and trains the token before: so must we read it."""
    name, _, _ = plain(llama)
    trainer = train_reward_model(trl, str(tmp_path / "trl"), name)
    assert trainer.model.config.pad_token_id == trainer.processing_class.eos_token_id
    check_reward_model(monkeypatch, str(tmp_path / "trl"), trainer.model, trainer.processing_class)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_an_adapter_of_peft_with_a_new_token_is_a_policy(tmp_path, plain, peft, build):
    """T48, T63: embeddings that were resized are in PEFT's adapter, under both names if tied: logits agree."""
    name, _, tokenizer = plain(build)
    tokenizer.add_special_tokens({"pad_token": "<|new|>"})
    base = AutoModelForCausalLM.from_pretrained(name)
    base.resize_token_embeddings(len(tokenizer))
    targets = ["c_attn"] if build is gpt2 else ["q_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    for part in (model, tokenizer):
        part.save_pretrained(str(tmp_path / "adapter"))
    close(logits(load_policy(str(tmp_path / "adapter"), "cpu", 64)[0]), logits(model))


def test_a_plain_encoder_is_a_reward_model(plain, monkeypatch):
    """T66, T68: a BERT with one label and a tokenizer of its own judges a run's answers as transformers does."""
    check_reward_model(monkeypatch, *plain(bert))
