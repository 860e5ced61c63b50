"""Judges: the same tokens in training and in scoring, the right token pooled, and what is refused."""

import json
import re
import sys
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import train_rm
from rlhf_min.data import Pair, encode_prompt, load_pairs, load_prompts, pad
from rlhf_min.errors import UserError
from rlhf_min.evaluation import judge_policy
from rlhf_min.models import save_model
from rlhf_min.pretrain import train_tokenizer
from rlhf_min.reward_model import RewardModel, classify, encode_answer, load_judge

CPU = torch.device("cpu")
EOS = "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
QUESTION = [{"role": "user", "content": "Great film?"}]
PROMPTS = ["The film", "The plot was dull and the", "I"]
ANSWERS = [" was great fun.", " cast slept.", " slept and the film was long."]
MODULES = count()


def gpt2(vocab_size, num_labels=1, **config):
    """A GPT-2 classifier of one block that has preferences."""
    config = GPT2Config(vocab_size=vocab_size, n_positions=64, n_layer=1, n_embd=16, n_head=2, num_labels=num_labels,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.3, **config)  # fmt: skip
    return GPT2ForSequenceClassification(config).eval()


def llama(vocab_size, **config):
    """A Llama classifier of one block."""
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=64, num_labels=1, initializer_range=0.3,
                         **config)  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def bert_tokenizer():
    """A word-level tokenizer that writes [CLS] ... [SEP], as BERT's does, and has no EOS."""
    words = "The film plot was dull great and the cast I slept fun long . a b c d".split()
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def scored_rows(judge, *arguments):
    """The rows of token ids that a RewardModel scores for these arguments."""
    seen = []
    judge.score = lambda rows: seen.extend(rows) or torch.zeros(len(rows))
    judge(*arguments)
    del judge.score
    return seen


@pytest.mark.parametrize("completion", [" was great.", " was great." + EOS, "  spaces ", ""])
def test_training_rows_equal_scoring_rows(tiny_tokenizer, completion):
    """T19: a pair is tokenised for training as its answers are for scoring, and EOS stands once, at the end."""
    judge = RewardModel(gpt2(len(tiny_tokenizer)), tiny_tokenizer, max_length=64)
    ((chosen, rejected),), _ = train_rm.encode_pairs(
        [Pair("The film", completion, " was dull.", True)], tiny_tokenizer, 64
    )
    assert scored_rows(judge, ["The film"] * 2, [completion, " was dull."], [True, True]) == [chosen, rejected]
    assert chosen.count(tiny_tokenizer.eos_token_id) == 1
    assert chosen[-1] == tiny_tokenizer.eos_token_id


def test_training_rows_equal_scoring_rows_for_conversations(tiny_tokenizer, monkeypatch):
    """T19: a conversation goes through the judge's template once: one [user], one [assistant], one EOS."""
    monkeypatch.setattr(tiny_tokenizer, "chat_template", TEMPLATE)
    judge = RewardModel(gpt2(len(tiny_tokenizer)), tiny_tokenizer, max_length=64)
    ((chosen, rejected),), _ = train_rm.encode_pairs([Pair(QUESTION, "Great fun.", "Dull.", True)], tiny_tokenizer, 64)
    assert scored_rows(judge, [QUESTION] * 2, ["Great fun.", "Dull."], [True, True]) == [chosen, rejected]
    assert tiny_tokenizer.decode(chosen) == f"[user]Great film?[assistant]Great fun.{EOS}"


def test_the_template_alone_writes_special_tokens(bert_tokenizer, monkeypatch):
    """T19: [CLS] and [SEP] of a rendered conversation are the template's; the tokenizer does not add its own."""
    template = "[CLS]{% for m in messages %}{{ m.content }}[SEP]{% endfor %}"
    monkeypatch.setattr(bert_tokenizer, "chat_template", template)
    messages = [{"role": "user", "content": "The film"}]
    assert bert_tokenizer.decode(encode_prompt(bert_tokenizer, messages)) == "[CLS] The film [SEP]"
    ids = encode_answer(bert_tokenizer, messages, "was great")
    assert bert_tokenizer.decode(ids) == "[CLS] The film [SEP] was great [SEP]"


def test_an_answer_that_has_not_ended_gets_no_eos(tiny_tokenizer, monkeypatch):
    """T22: the judge sees whether the answer ended, in plain text and in a conversation."""
    eos = tiny_tokenizer.eos_token_id
    ended, cut = (encode_answer(tiny_tokenizer, "The film", " was great", end) for end in (True, False))
    assert ended == [*cut, eos]
    monkeypatch.setattr(tiny_tokenizer, "chat_template", TEMPLATE)
    cut = encode_answer(tiny_tokenizer, QUESTION, "Great", ended=False)
    assert tiny_tokenizer.decode(cut) == "[user]Great film?[assistant]Great"
    assert encode_answer(tiny_tokenizer, QUESTION, "Great") == [*cut, eos]
    assert cut[: len(encode_prompt(tiny_tokenizer, QUESTION))] == encode_prompt(tiny_tokenizer, QUESTION)


def test_conversations_need_a_template(tiny_tokenizer):
    """A judge without a chat template cannot read messages, and says so; so does a template that refuses them."""
    with pytest.raises(UserError, match="no chat template"):
        encode_answer(tiny_tokenizer, QUESTION, "Great")
    tiny_tokenizer.chat_template = "{{ raise_exception('no\nsystem role') }}"
    try:
        with pytest.raises(UserError, match="refuses a conversation"):
            encode_answer(tiny_tokenizer, QUESTION, "Great")
    finally:
        tiny_tokenizer.chat_template = None


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("pad_id", [0, 1, 299])
def test_the_last_real_token_is_pooled(build, pad_id):
    """T20: the score depends on the last real token, not on how many pads of which id stand behind it."""
    model, row = build(300), [5, 6, 7, 0]  # ends in EOS, id 0, which may be the pad token, too
    with torch.no_grad():
        alone = classify(model, *pad([row], 1, CPU))[0]
        padded = classify(model, *pad([row, [5] * 20], pad_id, CPU))[0]
        changed = classify(model, *pad([[5, 6, 7, 8], [5] * 20], pad_id, CPU))[0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)
    assert (changed - alone).abs() > 1e-3


@pytest.mark.parametrize("ended", [True, False])
def test_a_long_prompt_leaves_the_answer(tiny_tokenizer, ended):
    """T21: what is too long loses its beginning: the whole answer is still there, and its EOS."""
    answer = " was great fun."
    ids = encode_answer(tiny_tokenizer, "The film was dull. " * 30 + "The film", answer, ended, max_length=20)
    assert len(ids) == 20
    assert tiny_tokenizer.decode(ids).endswith(answer + (EOS if ended else ""))


@pytest.mark.parametrize("ended", [True, False])
def test_a_long_prompt_leaves_the_answer_between_cls_and_sep(bert_tokenizer, ended):
    """T21: with BERT's tokens [CLS] stays first and [SEP] last, once each, and the answer's words stay before it."""
    ids = encode_answer(bert_tokenizer, "The film was dull . " * 30, "great fun a b", ended, max_length=10)
    assert bert_tokenizer.decode(ids) == "[CLS] film was dull . great fun a b [SEP]"
    assert len(ids) == 10


def test_a_long_labelled_text_keeps_its_beginning(tiny_tokenizer, bert_tokenizer):
    """T21: a labelled text has no prompt; its beginning stands for it, and then it has not ended."""
    text = "The film was great fun. " * 30
    rows, dropped = train_rm.encode_pairs([Pair("", text, "I slept.", True)], tiny_tokenizer, 12)
    assert rows[0][0] == tiny_tokenizer(text)["input_ids"][:12]
    assert rows[0][1] == [*tiny_tokenizer("I slept.")["input_ids"], tiny_tokenizer.eos_token_id]
    assert not dropped
    rows, _ = train_rm.encode_pairs([Pair("", "a b c d " * 9, "a", True)], bert_tokenizer, 5)
    assert [bert_tokenizer.decode(row) for row in rows[0]] == ["[CLS] a b c [SEP]", "[CLS] a [SEP]"]


def test_pairs_that_do_not_fit_are_dropped_and_counted(tiny_tokenizer):
    """T21: a pair with a prompt that is too long is dropped, not cut, and so is one whose answers are the same."""
    pairs = [
        Pair(prompt, "a", other, False)
        for prompt, other in (("The film " * 30, "b"), ("The film", "a"), ("The film", "b"))
    ]
    rows, dropped = train_rm.encode_pairs(pairs, tiny_tokenizer, 20)
    assert len(rows) == 1
    assert dict(dropped) == {"longer than 20 tokens": 1, "identical": 1}


def test_policy_and_judge_with_different_vocabularies(tmp_path, tiny_policy, tiny_tokenizer):
    """T66: the judge gets text and tokenises it itself; ids of the policy's vocabulary never reach it."""
    other = train_tokenizer(["zebra quartz jumps over the lazy film was great"], 270)
    judge = RewardModel(gpt2(len(other)), other, max_length=64)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    prompts = load_prompts(str(tmp_path / "p.jsonl"), tiny_tokenizer, 3, 24)
    options = SimpleNamespace(temperature=1.0, max_length=24, batch_size=2, precision="fp32", seed=0)
    columns = judge_policy(tiny_policy, tiny_tokenizer, prompts, {"reward": judge}, options)
    ids = [other(p + c)["input_ids"] + [other.eos_token_id] * e
           for p, c, e in zip(PROMPTS, columns["completion"], columns["ended"])]  # fmt: skip
    assert columns["reward"] == pytest.approx([judge.score([row]).item() for row in ids], abs=1e-5)
    assert max(max(tiny_tokenizer(p + c)["input_ids"]) for p, c in zip(PROMPTS, columns["completion"])) >= 270


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("pad_token_id", [None, 0, 1], ids=["pad None", "pad = EOS", "own pad"])
def test_decoder_classifiers_score_a_batch_like_single_answers(tmp_path, tiny_tokenizer, build, pad_token_id):
    """T67: a GPT-2 or Llama judge scores a batch as it scores singles, and sees EOS, whatever its config calls pad."""
    save_model(build(len(tiny_tokenizer), eos_token_id=0, pad_token_id=pad_token_id), tiny_tokenizer, tmp_path)
    judge = load_judge(str(tmp_path), CPU)
    batch, sigma = judge(PROMPTS, ANSWERS, torch.tensor([True, False, True]))
    single = [judge([p], [a], [e])[0].item() for p, a, e in zip(PROMPTS, ANSWERS, (True, False, True))]
    assert batch.tolist() == pytest.approx(single, abs=1e-5)
    assert sigma.tolist() == [0.0, 0.0, 0.0]
    other_end, _ = judge(PROMPTS, ANSWERS, torch.tensor([False, True, False]))
    assert (other_end - batch).abs().min() > 1e-3


def test_a_judge_without_a_pad_token_in_its_tokenizer(tmp_path, tiny_tokenizer):
    """T67: with a tokenizer that has EOS only, as GPT-2's own, a batch is scored like single answers, EOS included."""
    save_model(gpt2(len(tiny_tokenizer), eos_token_id=0), tiny_tokenizer, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    judge = load_judge(str(tmp_path), CPU)
    assert judge.tokenizer.pad_token_id == judge.tokenizer.eos_token_id == 0
    ended, _ = judge(PROMPTS, ANSWERS, [True] * 3)
    assert ended.tolist() == pytest.approx([judge([p], [a], [1])[0].item() for p, a in zip(PROMPTS, ANSWERS)], abs=1e-5)
    assert (judge(PROMPTS, ANSWERS, [False] * 3)[0] - ended).abs().min() > 1e-3


def test_batch_size_does_not_change_scores(tiny_tokenizer):
    """T20: more answers than the judge takes at a time are scored in parts, in order."""
    model = gpt2(len(tiny_tokenizer))
    rewards = [RewardModel(model, tiny_tokenizer, 64, size)(PROMPTS, ANSWERS, [1] * 3)[0] for size in (64, 2, 1)]
    for other in rewards[1:]:
        torch.testing.assert_close(other, rewards[0], atol=1e-5, rtol=0)


def test_distilbert_scores_a_batch_like_single_answers(tmp_path, bert_tokenizer):
    """T68: DistilBERT pools token 0 and has a head of its own: in and out of a batch, the score is its own logit."""
    config = DistilBertConfig(vocab_size=len(bert_tokenizer), dim=16, hidden_dim=32, n_layers=1, n_heads=2,
                              max_position_embeddings=32, num_labels=1, initializer_range=0.3)  # fmt: skip
    model = DistilBertForSequenceClassification(config).eval()
    bert_tokenizer.padding_side = "left"  # as a tokenizer's folder may say; the judge pads on the right all the same
    save_model(model, bert_tokenizer, tmp_path)
    bert_tokenizer.padding_side = "right"
    judge = load_judge(str(tmp_path), CPU)
    batch, _ = judge(PROMPTS, ANSWERS, [True] * 3)
    for prompt, answer, reward in zip(PROMPTS, ANSWERS, batch):
        with torch.no_grad():
            logits = model(**bert_tokenizer(prompt + answer, return_tensors="pt")).logits
        assert reward.item() == pytest.approx(logits.item(), abs=1e-5)
    assert judge.model.pre_classifier.weight.equal(model.pre_classifier.weight)


def test_answers_longer_than_the_models_positions(tmp_path, tiny_tokenizer):
    """A judge never reads more tokens than its model has positions for, whatever --max-length says."""
    save_model(gpt2(len(tiny_tokenizer)), tiny_tokenizer, tmp_path)
    judge = load_judge(str(tmp_path), CPU)
    assert judge.max_length == 64
    reward, _ = judge(["The film was dull. " * 40], [" Great fun."], [True])
    assert torch.isfinite(reward).all()
    assert reward.item() != judge(["The film was dull. " * 40], [" I slept."], [True])[0].item()


def test_an_empty_answer_to_an_empty_prompt_has_a_score(tiny_tokenizer):
    """An answer of no tokens at all, not ended, is scored, too."""
    judge = RewardModel(gpt2(len(tiny_tokenizer)), tiny_tokenizer, 64)
    assert torch.isfinite(judge(["", "The film"], ["", " was"], [False, False])[0]).all()


@pytest.fixture
def pair_files(tmp_path, tiny_policy, tiny_tokenizer):
    """Write a base and 60 pairs; returns a function that makes train_rm's flags for honest or random labels."""
    save_model(tiny_policy, tiny_tokenizer, tmp_path / "base")

    def flags(out, random_labels):
        signs = torch.randint(2, (60,), generator=torch.Generator().manual_seed(0)).tolist()
        with open(tmp_path / "pairs.jsonl", "w") as file:
            for i, sign in enumerate(signs):
                answers = [f" was great fun. {i}", f" was dull. {i}"]
                if random_labels and sign:
                    answers.reverse()
                file.write(json.dumps({"prompt": "The film", "chosen": answers[0], "rejected": answers[1]}) + "\n")
        return ["--data", str(tmp_path / "pairs.jsonl"), "--base", str(tmp_path / "base"), "--eval-fraction", "0.5",
                "--batch-size", "15", "--epochs", "6", "--lr", "1e-2", "--warmup-steps", "0", "--device", "cpu",
                "--out", str(tmp_path / out)]  # fmt: skip

    return flags


def test_a_reward_model_learns_and_is_the_right_way_round(tmp_path, pair_files):
    """T23: trained on honest labels the accuracy is above chance, and the saved judge prefers what was chosen."""
    train_rm.main(pair_files("rm", random_labels=False))
    summary = json.loads((tmp_path / "rm" / "summary.json").read_text())
    assert (summary["train_pairs"], summary["eval_pairs"]) == (30, 30)
    assert summary["eval_accuracy"] > 0.95
    good, bad = load_judge(str(tmp_path / "rm"), CPU)(["The film"] * 2, [" was great fun. 3", " was dull. 3"], [1, 1])[
        0
    ]
    assert good > bad + 0.5


def test_the_saved_judge_scores_like_the_trained_model(tmp_path, pair_files):
    """T64: what train_rm validated is what load_judge reads back: head, weights and tokens give the same accuracy."""
    flags = pair_files("rm", random_labels=False)
    train_rm.main([*flags, "--epochs", "1", "--accept-weak", "--eval-data", str(tmp_path / "pairs.jsonl")])
    judge = load_judge(str(tmp_path / "rm"), CPU)
    rows, _ = train_rm.encode_pairs(load_pairs(str(tmp_path / "pairs.jsonl"))[0], judge.tokenizer, 64)
    options = train_rm.RewardModelOptions(precision="fp32")
    again = train_rm.evaluate_pairs(judge.model, rows, judge.tokenizer, options)
    summary = json.loads((tmp_path / "rm" / "summary.json").read_text())
    assert {name: summary[name] for name in again} == pytest.approx(again, abs=1e-5)


def test_the_learning_rate_in_the_log_is_the_one_that_was_used(tmp_path, pair_files):
    """Without a warm-up the first step takes --lr itself, and the last one does not take 0."""
    train_rm.main([*pair_files("rm", random_labels=False), "--epochs", "1", "--accept-weak"])
    lines = (tmp_path / "rm" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["learning_rate"] for line in lines] == pytest.approx([1e-2, 0.5e-2])


def test_random_labels_are_refused_unless_accepted(tmp_path, pair_files, capsys):
    """T23: a reward model not 3 standard errors above chance is not saved, and exit code 2 says so."""
    with pytest.raises(SystemExit) as stop:
        train_rm.main(pair_files("rm", random_labels=True))
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "--accept-weak" in errors[0]
    assert not (tmp_path / "rm" / "model").exists()
    assert (tmp_path / "rm" / "summary.json").exists()
    train_rm.main([*pair_files("weak", random_labels=True), "--accept-weak"])
    assert (tmp_path / "weak" / "model" / "model.safetensors").exists()


def test_the_base_gets_a_pad_token_of_its_own(tmp_path, tiny_policy):
    """T67: where pad is EOS, the reward model gets a pad token, so that transformers' own pooling sees the EOS, too."""
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


def test_a_tokenizer_larger_than_the_judges_embedding_is_refused(tmp_path, tiny_tokenizer):
    """A judge whose tokenizer knows more tokens than its model embeds is refused, as a policy is."""
    save_model(gpt2(len(tiny_tokenizer) - 1), tiny_tokenizer, tmp_path)
    with pytest.raises(UserError, match="300 tokens, its model embeds 299"):
        load_judge(str(tmp_path), CPU)


def test_a_judge_with_two_labels_is_refused(tmp_path, tiny_tokenizer):
    """A sentiment classifier has two labels; which of them would be the reward?"""
    save_model(gpt2(len(tiny_tokenizer), num_labels=2), tiny_tokenizer, tmp_path)
    with pytest.raises(UserError, match="a classifier with 2 labels; a reward model has 1"):
        load_judge(str(tmp_path), CPU)


def test_a_language_model_is_no_judge(tmp_path, tiny_policy, tiny_tokenizer):
    """T64: a language model as judge is refused: transformers would put a random head on it without a word."""
    save_model(tiny_policy, tiny_tokenizer, tmp_path)
    with pytest.raises(UserError, match="no sequence classifier"):
        load_judge(str(tmp_path), CPU)


def function_judge(folder, body, monkeypatch):
    """A judge from a new module in `folder` that holds `def f(prompts, completions, **columns)` with this body."""
    name = f"reward_functions_{next(MODULES)}"  # a module is imported once, so every test needs its own
    (folder / f"{name}.py").write_text(f"value = 3\ndef f(prompts, completions, **columns):\n    {body}\n")
    monkeypatch.syspath_prepend(str(folder))
    return load_judge(f"{name}.f", CPU), name


def test_a_function_is_a_judge(tmp_path, monkeypatch):
    """A function gets prompts and completions by name; its numbers are the reward, and sigma is 0."""
    body = "return [len(p) + 10 * len(c) for p, c in zip(prompts, completions)]"
    judge, _ = function_judge(tmp_path, body, monkeypatch)
    reward, sigma = judge(["a", "bb"], ["", "c"], [True, False])
    assert (reward.tolist(), sigma.tolist()) == ([1.0, 12.0], [0.0, 0.0])
    assert reward.dtype == torch.float32


def test_a_function_in_the_working_directory_is_found(tmp_path, monkeypatch):
    """A module beside the user's prompt is found, and sys.path stays as it was."""
    (tmp_path / "reward_beside_the_prompt.py").write_text("def f(prompts, completions):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert load_judge("reward_beside_the_prompt.f", CPU)(["a"], ["b"], [True])[0].tolist() == [1.0]
    assert sys.path == before


@pytest.mark.parametrize(
    "body, fragment",
    [
        ("return [float('nan'), 1.0]", "returned nan"),
        ("return [1.0, float('-inf')]", "returned -inf"),
        pytest.param(
            "return [1.0, 1e39]",  # finite in Python, infinite in float32
            "must be finite",
        ),
        ("return [1.0]", "1 numbers for 2 answers"),
        ("return [1.0] * 3", "3 numbers for 2 answers"),
        ("return ['good', 'bad']", "list of numbers"),
        ("return [None, 1.0]", "list of numbers"),
        ("return None", "list of numbers"),
        ("return 3.0", "list of numbers"),
    ],
)
def test_what_a_reward_function_may_not_return(tmp_path, monkeypatch, body, fragment):
    """T58: one finite number per answer, or a sentence that names the function."""
    judge, name = function_judge(tmp_path, body, monkeypatch)
    with pytest.raises(UserError, match=re.escape(fragment)) as error:
        judge(["a", "b"], ["c", "d"], [True, True])
    assert f"{name}.f" in str(error.value)


def test_an_error_inside_a_reward_function_keeps_its_traceback(tmp_path, monkeypatch):
    """T58: an exception of the user's own function is not swallowed."""
    judge, _ = function_judge(tmp_path, "return [1 / 0]", monkeypatch)
    with pytest.raises(ZeroDivisionError):
        judge(["a"], ["b"], [True])


@pytest.mark.parametrize(
    "spec, fragment",
    [
        ("no_such_module.f", "No module named 'no_such_module'"),
        ("rlhf_min.no_such_module.f", "No module named 'rlhf_min.no_such_module'"),
        ("rlhf_min.toy.no_such_function", "has no function no_such_function"),
        ("rlhf_min.toy.FOLDER", "is not a function"),
        (".f", ".f"),
        ("..f", "..f"),
        ("runs/no-such-run", "no such folder"),
        ("nothing", "no such folder"),
    ],
)
def test_a_judge_that_is_not_there(spec, fragment):
    """T69: a module, function or folder that does not exist is named in one line."""
    with pytest.raises(UserError, match=re.escape(fragment)):
        load_judge(spec, CPU)
