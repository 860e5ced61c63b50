"""Judges: the same tokens in training and in scoring, the right token pooled, and what is refused."""

import json
import re
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, pipeline

import train_rm
from rlhf_min.data import Pair, Prompt, cut, encode_answer, encode_pairs, encode_prompt, load_pairs
from rlhf_min.pretrain import train_tokenizer
from rlhf_min.reward_model import (
    RewardFunction,
    RewardModel,
    classify,
    judge_answers,
    load_judge,
    load_judges_of_task,
    named_judges,
)
from rlhf_min.rollout import Rollout, load_policy, sample, uniform_numbers
from rlhf_min.support.batches import pad
from rlhf_min.support.errors import UserError
from rlhf_min.support.models import save_model
from rlhf_min.support.rows import write_jsonl

CPU, YES = torch.device("cpu"), torch.ones(3)
EOS = "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
QUESTION = [{"role": "user", "content": "Great film?"}]
PROMPTS = ["The film", "The plot was dull and the", "I"]
ANSWERS = [" was great fun.", " cast slept.", " slept and the film was long."]
RATINGS = [str(k) for k in range(1, 11)]
MODULES = count()
FAMILIES = {
    "GPT2": {"n_positions": 64, "n_layer": 1, "n_embd": 16, "n_head": 2},
    "Llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "DistilBert": {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 32},
}


def classifier(family, size, names=("reward",), **config):
    """A classifier of one block that has preferences, for `size` tokens, with the labels `names`."""
    config = FAMILIES[family] | {"vocab_size": size, "id2label": dict(enumerate(names)), **config}
    config = getattr(transformers, f"{family}Config")(initializer_range=0.3, **config)
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.fixture(scope="module")
def bert_tokenizer():
    """A word-level tokenizer that writes [CLS] ... [SEP], as BERT's does, and has no EOS."""
    words = "[PAD] [UNK] [CLS] [SEP] The film plot was dull great and the cast I slept fun long . a b c d".split()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


# Token ids


ENDED = [
    ("The film", " was great.", f"The film was great.{EOS}"),
    ("The film", f" was great.{EOS}", f"The film was great.{EOS}"),
    (QUESTION, "Great fun.", f"[user]Great film?[assistant]Great fun.{EOS}"),
]


@pytest.mark.parametrize(("prompt", "answer", "text"), ENDED)
def test_training_rows_equal_scoring_rows(tiny_tokenizer, monkeypatch, prompt, answer, text):
    """A pair is tokenised for training as its answers are for scoring, and EOS stands once, at the end."""
    monkeypatch.setattr(tiny_tokenizer, "chat_template", TEMPLATE)
    judge, seen = RewardModel(classifier("GPT2", 300), tiny_tokenizer), []
    ((chosen, rejected, _),), _ = encode_pairs([Pair(prompt, answer, " was dull.")], tiny_tokenizer, 64)
    monkeypatch.setattr(judge, "logits", lambda rows: seen.extend(rows) or torch.zeros(len(rows), 1))
    judge([prompt] * 2, [answer, " was dull."], YES)
    assert seen == [chosen, rejected]
    assert tiny_tokenizer.decode(chosen) == text


def test_an_answer_that_has_not_ended_gets_no_eos(tiny_tokenizer, monkeypatch):
    """The judge sees whether the answer ended, in plain text and in a conversation."""
    monkeypatch.setattr(tiny_tokenizer, "chat_template", TEMPLATE)
    for prompt in ("The film", QUESTION):
        ended, cut = (encode_answer(tiny_tokenizer, prompt, " was great", end) for end in (True, False))
        assert ended == [*cut, tiny_tokenizer.eos_token_id]
        assert cut[: len(encode_prompt(tiny_tokenizer, prompt))] == encode_prompt(tiny_tokenizer, prompt)


def test_the_template_alone_writes_special_tokens(bert_tokenizer, monkeypatch):
    """[CLS] and [SEP] of a rendered conversation are the template's; the tokenizer does not add its own."""
    monkeypatch.setattr(bert_tokenizer, "chat_template", "[CLS]{% for m in messages %}{{ m.content }}[SEP]{% endfor %}")
    ids = encode_answer(bert_tokenizer, [{"role": "user", "content": "The film"}], "was great")
    assert bert_tokenizer.decode(ids) == "[CLS] The film [SEP] was great [SEP]"


@pytest.mark.parametrize("ended", [True, False])
def test_a_long_prompt_leaves_the_answer(tiny_tokenizer, bert_tokenizer, ended):
    """What is too long loses its beginning: the answer, its end, and BERT's [CLS] and [SEP] are still there."""
    answer = " was great fun."
    ids = encode_answer(tiny_tokenizer, "The film was dull. " * 30 + "The film", answer, ended)
    ids = cut(tiny_tokenizer, ids, 20, "end")
    assert len(ids) == 20
    assert tiny_tokenizer.decode(ids).endswith(answer + (EOS if ended else ""))
    ids = cut(
        bert_tokenizer, encode_answer(bert_tokenizer, "The film was dull . " * 30, "great fun a b", ended), 10, "end"
    )
    assert bert_tokenizer.decode(ids) == "[CLS] film was dull . great fun a b [SEP]"


def test_pairs_that_do_not_fit(tiny_tokenizer, bert_tokenizer):
    """A labelled text is cut to its beginning; a pair with a prompt is dropped and counted, as are equal answers."""
    rows, _ = encode_pairs([Pair("", "a b c d " * 9, "a", may_be_cut=True)], bert_tokenizer, 5)
    assert [bert_tokenizer.decode(row) for row in rows[0][:2]] == ["[CLS] a b c [SEP]", "[CLS] a [SEP]"]
    pairs = [Pair("The film " * 30, "a", "b"), Pair("The film", "a", "a"), Pair("The film", "a", "b", margin=2.0)]
    rows, dropped = encode_pairs(pairs, tiny_tokenizer, 20)
    assert [margin for _, _, margin in rows] == [2.0]
    assert dropped == {"longer than 20 tokens": 1, "identical": 1}


def test_policy_and_judge_with_different_vocabularies(tiny_policy, tiny_tokenizer):
    """The judge gets text and tokenises it itself; ids of the policy's vocabulary never reach it."""
    other = train_tokenizer(["zebra quartz jumps over the lazy film was great"], 270)
    judge = RewardModel(classifier("GPT2", len(other)), other)
    prompts = [Prompt(tiny_tokenizer(text)["input_ids"], text) for text in PROMPTS]
    rollout = sample(tiny_policy, [prompt.tokens for prompt in prompts], uniform_numbers(3, 24, None), 1.0)
    assert rollout.tokens.max() >= 270
    scores, completions = judge_answers({"reward": judge}, tiny_tokenizer, prompts, rollout)
    ends = [[other.eos_token_id] * end for end in rollout.ended]
    ids = [other(prompt + text)["input_ids"] + end for prompt, text, end in zip(PROMPTS, completions, ends)]
    assert scores["reward"].tolist() == pytest.approx([judge.logits([row]).item() for row in ids], abs=1e-5)
    assert scores["sigma"].tolist() == [0.0] * 3


# Scores


@pytest.mark.parametrize("names", [["reward"], RATINGS], ids=["scalar", "ratings"])
@pytest.mark.parametrize("family", ["GPT2", "DistilBert"])
def test_a_judge_agrees_with_transformers(tmp_path, tiny_tokenizer, bert_tokenizer, family, names):
    """Reward and sigma are the logit and 0, or E and σ of the probabilities that transformers' pipeline gives."""
    tokenizer = tiny_tokenizer if family == "GPT2" else bert_tokenizer
    save_model(classifier(family, len(tokenizer), names), tokenizer, tmp_path)
    judge = load_judge(str(tmp_path), CPU)
    assert judge.max_length == judge.model.config.max_position_embeddings
    reward, sigma = judge(PROMPTS, ANSWERS, YES)
    assert (reward.shape, sigma.shape, reward.dtype, sigma.dtype) == ((3,), (3,), torch.float32, torch.float32)
    texts = [prompt + answer + (tokenizer.eos_token or "") for prompt, answer in zip(PROMPTS, ANSWERS)]
    kind = {} if judge.has_sigma else {"function_to_apply": "none"}
    rows = pipeline("text-classification", str(tmp_path), top_k=None, **kind)(texts)
    p = torch.tensor([[entry["score"] for name in names for entry in row if entry["label"] == name] for row in rows])
    k = torch.arange(1.0, 1 + len(names))
    torch.testing.assert_close(reward, p @ k, atol=1e-4, rtol=0)
    expected = (p @ k**2 - (p @ k) ** 2).sqrt() if judge.has_sigma else 0 * reward
    torch.testing.assert_close(sigma, expected, atol=1e-3, rtol=0)
    assert reward.std() > 0.01 and judge.has_sigma == (names == RATINGS) == (sigma.min() > 0.1)


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
@pytest.mark.parametrize("pad_token_id, own", [(None, True), (None, False), (1, True), (0, True)])
def test_decoder_classifiers_score_a_batch_like_single_answers(tmp_path, tiny_tokenizer, family, pad_token_id, own):
    """A batch is scored as transformers scores single answers, also where the tokenizer has no pad token of its own.

    A model whose pad token is EOS skips the EOS, as whoever trained it did; the others see it.
    """
    model = classifier(family, 300, eos_token_id=0, pad_token_id=pad_token_id)
    save_model(model, tiny_tokenizer, tmp_path)
    if not own:  # as GPT-2's
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": None}))
    judge, rewards = load_judge(str(tmp_path), CPU), {}
    assert judge.tokenizer.pad_token_id == (1 if own else 0)
    for ended in (True, False):
        rows = [tiny_tokenizer(p + a)["input_ids"] + [0] * ended for p, a in zip(PROMPTS, ANSWERS)]
        expected = [model(input_ids=torch.tensor([row])).logits.item() for row in rows]
        rewards[ended], _ = judge(PROMPTS, ANSWERS, ended * YES)
        assert rewards[ended].tolist() == pytest.approx(expected, abs=1e-5)
    changes = (rewards[True] - rewards[False]).abs()
    assert changes.max() < 1e-5 if pad_token_id == 0 else changes.min() > 1e-3


def test_batches_and_dropout_do_not_change_scores(tiny_tokenizer):
    """Each answer has the score it has alone, long or empty, whatever is computed together; dropout is off."""
    model = classifier("GPT2", 300, RATINGS).train()
    prompts, answers = [*PROMPTS, "", "The film was. " * 40], [*ANSWERS, "", " Fun."]
    judge, ended = RewardModel(model, tiny_tokenizer), torch.tensor([1, 0, 1, 0, 1])
    together = torch.stack(judge(prompts, answers, ended))  # (2, B)
    assert together.isfinite().all() and len({*together[0].tolist()}) == 5
    for i in range(5):
        alone = torch.stack(judge(prompts[i : i + 1], answers[i : i + 1], ended[i : i + 1]))  # (2, 1)
        torch.testing.assert_close(alone, together[:, i : i + 1], atol=1e-4, rtol=0)


# Training


@pytest.mark.parametrize("names, head", [([], "scalar"), ([], "ordinal"), (RATINGS, "scalar"), (["a"], "ordinal")])
def test_a_new_head_is_a_judges_head(tmp_path, tiny_policy, tiny_tokenizer, names, head):
    """Any base, with another head or with none, gets one reward, or the ratings "1".."10", and is then a judge."""
    save_model(classifier("GPT2", 300, names) if names else tiny_policy, tiny_tokenizer, tmp_path / "base")
    options = train_rm.RewardModelOptions(base=str(tmp_path / "base"), head=head)
    model, tokenizer = train_rm.load_base(options, CPU)
    assert model.score.weight.shape == (10 if head == "ordinal" else 1, 16)
    save_model(model, tokenizer, tmp_path / "rm")
    judge = load_judge(str(tmp_path / "rm"), CPU)
    assert judge.has_sigma == (head == "ordinal")
    expected = RewardModel(model, tokenizer)(PROMPTS, ANSWERS, YES)
    torch.testing.assert_close(judge(PROMPTS, ANSWERS, YES), expected, atol=1e-5, rtol=0)


def test_the_base_gets_a_pad_token_of_its_own(tmp_path, tiny_policy):
    """Where pad is EOS, the reward model gets a pad token, so that transformers' own pooling sees the EOS, too."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    save_model(tiny_policy, PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0"), tmp_path)
    model, tokenizer = train_rm.load_base(train_rm.RewardModelOptions(base=str(tmp_path)), CPU)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, model.config.pad_token_id) == (0, 300, 300)
    rows = [encode_answer(tokenizer, prompt, " w8 w9") for prompt in ("w5", "w5 w6 w7")]
    assert rows == [[5, 8, 9, 0], [5, 6, 7, 8, 9, 0]]
    batch = pad(rows, tokenizer.pad_token_id, CPU)
    with torch.no_grad():
        ours, theirs = classify(model.eval(), *batch), model(input_ids=batch[0], attention_mask=batch[1]).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


FLAGS = ["--data", "pairs.jsonl", "--base", "base", "--batch-size", "15", "--epochs", "3", "--lr", "1e-2",
         "--warmup-steps", "0", "--device", "cpu", "--out", "rm"]  # fmt: skip


@pytest.fixture
def in_folder(tmp_path, monkeypatch, tiny_policy, tiny_tokenizer):
    """Work in a new folder with a base, 60 pairs and 60 others."""
    monkeypatch.chdir(tmp_path)
    save_model(tiny_policy, tiny_tokenizer, "base")
    answers = [{"chosen": f" was great fun. {i}", "rejected": f" was dull. {i}"} for i in range(120)]
    rows = [{"prompt": f"The film{' ' * (i % 9)}", **pair} for i, pair in enumerate(answers)]
    write_jsonl("pairs.jsonl", rows[:60])
    write_jsonl("eval.jsonl", rows[60:])


@pytest.mark.parametrize("head", [["scalar"], ["ordinal"], ["ordinal", "--ties", "half"]], ids=" ".join)
def test_a_reward_model_learns_and_is_saved_as_it_was_validated(in_folder, head):
    """On honest labels accuracy is above chance, the saved judge prefers what was chosen, and has the same metrics."""
    train_rm.main([*FLAGS, "--head", *head, "--eval-data", "eval.jsonl"])
    summary = json.loads(Path("rm", "summary.json").read_text())
    assert (summary["train_pairs"], summary["eval_pairs"]) == (60, 60)
    assert summary["eval_accuracy"] > 0.95
    judge = load_judge("rm", CPU)
    good, bad = judge(["The film"] * 2, [" was great fun. 3", " was dull. 3"], YES)[0]
    assert good > bad + 0.5
    rows, _ = encode_pairs(load_pairs("eval.jsonl")[0], judge.tokenizer, 64)
    options = train_rm.RewardModelOptions(precision="fp32", head=head[0], ties=head[-1] if head[1:] else "strict")
    again = train_rm.evaluate_pairs(judge.model, rows, judge.tokenizer, options)
    assert {name: summary[name] for name in again} == pytest.approx(again, abs=1e-5)


# What is no judge


@pytest.mark.parametrize("names", ["NEGATIVE POSITIVE", "LABEL_0 LABEL_1", "0 1 2 3 4", "3 2 1", ""])
def test_what_is_no_judge_is_refused(tmp_path, tiny_policy, tiny_tokenizer, names):
    """A sentiment classifier has two labels; which would be the reward? A language model would get a random head."""
    names = names.split()
    save_model(classifier("GPT2", 300, names) if names else tiny_policy, tiny_tokenizer, tmp_path)
    found = f"a classifier with the labels {', '.join(names[:3])}, ...; a reward model has one label"
    with pytest.raises(UserError, match=re.escape(found) if names else "no sequence classifier"):
        load_judge(str(tmp_path), CPU)


@pytest.mark.parametrize("spec", ["no_such_module.f", "rlhf_min.toy.no_such_name", "rlhf_min.toy.FOLDER", "..f", "no"])
def test_a_judge_that_is_not_there(spec):
    """A module, function or folder that does not exist is named in one line."""
    with pytest.raises(UserError, match=f"{spec}: no such f(unction|older)"):
        load_judge(spec, CPU)


def test_judges_by_name():
    """A judge is called as it is written before the equals sign, else by the last part of what it is, each once."""
    gold = "rlhf_min.toy.gold_judge"
    assert named_judges([f"gold={gold}", gold, "runs/rm/"]) == {"gold": gold, "gold_judge": gold, "rm": "runs/rm/"}
    for name in ("kl", "length", "ended", "completion", "prompt", "eta", "policy", "sigma", "gold_se", "eos_rate", ""):
        with pytest.raises(UserError, match="is taken or no name"):
            named_judges([f"{name}={gold}"])
    with pytest.raises(UserError, match="'gold_judge' is taken"):
        named_judges([gold, gold])


# Functions


def function_judge(folder, body, monkeypatch):
    """A judge from a new module beside the user's prompt with `def f(prompts, completions, **columns)` of this body."""
    name = f"reward_functions_{next(MODULES)}"  # a module is imported once, so every test needs its own
    (folder / f"{name}.py").write_text(f"value = 3\ndef f(prompts, completions, **columns):\n    {body}\n")
    monkeypatch.chdir(folder)
    return load_judge(f"{name}.f", CPU), name


def test_a_function_is_a_judge(tmp_path, monkeypatch):
    """A function of the working directory gets prompts and completions by name; sigma is 0, sys.path as it was."""
    before = list(sys.path)
    body = "return [len(p) + 10 * len(c) for p, c in zip(prompts, completions)]"
    judge, _ = function_judge(tmp_path, body, monkeypatch)
    reward, sigma = judge(["a", "bb"], ["", "c"], torch.tensor([True, False]))
    assert (reward.tolist(), sigma.tolist(), reward.dtype) == ([1.0, 12.0], [0.0, 0.0], torch.float32)
    assert sys.path == before and judge.is_function and not judge.has_sigma


@pytest.mark.parametrize("body, fragment", [
    ("return [float('nan'), 1.0]", "must return 2 finite numbers"),
    ("return [1.0, 1e39]", "must return 2 finite numbers"),  # finite in Python, infinite in float32
    ("return (1.0 for _ in range(3))", "must return 2 finite numbers, not 3"),
    ("return dict.fromkeys([1.0, 2.0])", "must return 2 finite numbers, not 2: {1.0"),
    ("return None", "raised TypeError: 'NoneType' object is not iterable (it is called with prompts, comp"),
    ("return [1 / 0]", "raised ZeroDivisionError: division by zero ("),
])  # fmt: skip
def test_what_a_reward_function_may_not_do(tmp_path, monkeypatch, body, fragment):
    """A function returns one finite number per answer, or a sentence names it, and the line where it failed."""
    judge, name = function_judge(tmp_path, body, monkeypatch)
    with pytest.raises(UserError, match=re.escape(fragment)) as error:
        judge(["a", "b"], ["c", "d"], YES[:2])
    assert f"{name}.f" in str(error.value)
    assert "1 / 0" not in body or f"{name}.py, line 3)" in str(error.value)


# What people bring


def rollout_of(tokenizer, prompts, answers):
    """(prompts, Rollout) of texts, each answer without its EOS."""
    pairs = zip(prompts, answers)
    rows = [(encode_prompt(tokenizer, text), tokenizer(answer)["input_ids"]) for text, answer in pairs]
    tokens, _ = pad([row[0] for row in rows], 1, CPU, side="left")
    completions, mask = pad([row[1] for row in rows], 1, CPU)
    both, real = torch.cat([tokens, completions], dim=1), torch.cat([tokens != 1, mask], dim=1)
    return Rollout(both, real, mask, torch.zeros(len(rows), dtype=torch.bool))


def test_a_function_gets_what_trl_gives(tiny_tokenizer, monkeypatch):
    """Columns, token ids, messages where prompts are messages; None counts 0; async runs; it takes what it names."""
    monkeypatch.setattr(tiny_tokenizer, "chat_template", TEMPLATE)
    rollout, seen = rollout_of(tiny_tokenizer, [QUESTION, "The film"], [" fun", " was dull"]), {}

    async def whole(prompts, completions, solution, **columns):
        seen.update(columns, solution=solution, completions=completions)
        prompts[0].append("changed")  # its own copy
        return [None, 2.0]

    judges = {"a": RewardFunction(whole, "whole", CPU)}
    judges["b"] = RewardFunction(lambda completion_ids: [len(ids) for ids in completion_ids], "ids", CPU)
    prompts = [Prompt([0], QUESTION, {"solution": "x", "ended": 1}), Prompt([0], "The film", {"level": 3})]
    rewards, _ = judge_answers(judges, tiny_tokenizer, prompts, rollout)
    ids = [tiny_tokenizer(text)["input_ids"] for text in (" fun", " was dull")]
    assert seen == {"solution": ["x", None], "level": [None, 3], "ended": [1, None], "completion_ids": ids,
                    "completions": [[{"role": "assistant", "content": " fun"}], " was dull"]}  # fmt: skip
    assert prompts[0].text == QUESTION and len(QUESTION) == 1
    assert rewards["a"].tolist() == [0.0, 2.0] and rewards["b"].tolist() == [len(row) for row in ids]


def test_several_rewards_are_added_up(tiny_tokenizer, tmp_path, monkeypatch):
    """R = 2 · size − ½ · words, each part is a column of its own, too; as many weights as parts are needed."""
    body = "def size(completions): return [len(c) for c in completions]\n"
    (tmp_path / "parts.py").write_text(body + "def words(completions): return [len(c.split()) for c in completions]\n")
    monkeypatch.chdir(tmp_path)
    specs = ["parts.size", "parts.words"]
    judges = load_judges_of_task(specs, ["2", "-0.5"], ["other=parts.words"], CPU)
    assert [*judges] == ["size", "words", "reward", "other"] and not judges["reward"].has_sigma
    prompts = [Prompt([0], "The film"), Prompt([0], "I")]
    rollout = rollout_of(tiny_tokenizer, ["The film", "I"], [" was dull", " slept"])
    rewards, _ = judge_answers(judges, tiny_tokenizer, prompts, rollout)
    assert rewards["reward"].tolist() == [2 * 9 - 0.5 * 2, 2 * 6 - 0.5 * 1] and rewards["words"].tolist() == [2, 1]
    assert rewards["sigma"].tolist() == [0, 0]
    for weights in (["1"], ["1", "x"], ["1", "nan"]):
        with pytest.raises(UserError, match="--reward-weights: 2 numbers are needed"):
            load_judges_of_task(specs, weights, [], CPU)
    with pytest.raises(UserError, match="no name, the last part of a folder, is reward"):
        load_judges_of_task(specs, [], ["reward=parts.words"], CPU)  # it would take the place of the sum


def test_a_label_of_a_classifier_is_a_reward(tmp_path, tiny_tokenizer):
    """folder:LABEL is the logit of that label, without a σ; another label is refused with those that there are."""
    model = classifier("GPT2", 300, ["bad", "good"], pad_token_id=1)
    save_model(model, tiny_tokenizer, tmp_path / "m")
    judge = load_judge(f"{tmp_path}/m:good", CPU)
    reward, sigma = judge(PROMPTS, ANSWERS, YES)
    rows = [encode_answer(tiny_tokenizer, *pair) for pair in zip(PROMPTS, ANSWERS)]
    logits = [model(torch.tensor([row])).logits[0, 1].item() for row in rows]
    assert reward.tolist() == pytest.approx(logits, abs=1e-5) and sigma.tolist() == [0, 0, 0] and not judge.has_sigma
    with pytest.raises(UserError, match="m:GOOD: no such label; it has bad, good"):
        load_judge(f"{tmp_path}/m:GOOD", CPU)


def test_a_judge_reads_what_it_was_trained_on(in_folder, capsys):
    """--max-length is saved with the model; a judge that cuts texts says so, once."""
    train_rm.main([*FLAGS, "--eval-data", "eval.jsonl", "--max-length", "24"])
    judge = load_judge("rm", CPU)
    assert judge.max_length == 24
    scores = [judge([text] * 2, [" was great."] * 2, torch.ones(2))[0] for text in ("The film", "The film " * 30)]
    error = capsys.readouterr().err
    assert "reads 24 tokens: 2 of 2 texts lose their beginning" in error and error.count("lose") == 1
    row = cut(judge.tokenizer, encode_answer(judge.tokenizer, "The film " * 30, " was great."), 24, "end")
    assert len(row) == 24 and scores[1][0].item() == pytest.approx(judge.logits([row]).item(), abs=1e-5)


UNUSABLE = {
    "T5": {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 1},
    "Bart": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    "XLNet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16},
}


@pytest.mark.parametrize("family", UNUSABLE)
def test_classifiers_that_pool_otherwise_are_refused_by_name(tmp_path, tiny_tokenizer, family):
    config = getattr(transformers, f"{family}Config")(vocab_size=300, num_labels=1, pad_token_id=1, eos_token_id=0,
                                                      **UNUSABLE[family])  # fmt: skip
    save_model(AutoModelForSequenceClassification.from_config(config), tiny_tokenizer, tmp_path / "m")
    with pytest.raises(UserError, match=f"models of type {family.lower()} cannot be used, in batches: "):
        load_judge(str(tmp_path / "m"), CPU)


def test_a_policy_that_reads_padding_is_refused(tmp_path, tiny_policy, tiny_tokenizer, monkeypatch):
    """What stands before a prompt must not change its answer: RWKV has no mask, which this forward stands for."""
    save_model(tiny_policy, tiny_tokenizer, tmp_path / "m")
    load_policy(str(tmp_path / "m"), CPU, 32)
    forward = type(tiny_policy).forward
    blind = lambda self, input_ids, attention_mask=None, **kwargs: forward(self, input_ids, **kwargs)
    monkeypatch.setattr(type(tiny_policy), "forward", blind)
    with pytest.raises(UserError, match="models of type gpt2 cannot be used, in batches: it reads padding"):
        load_policy(str(tmp_path / "m"), CPU, 32)
