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
    pipeline,
)

import train_rm
from rlhf_min.batches import pad
from rlhf_min.data import Pair, encode_prompt, load_pairs, load_prompts
from rlhf_min.errors import UserError
from rlhf_min.evaluation import judge_policy
from rlhf_min.losses import ordinal_loss, pairwise_loss
from rlhf_min.models import load_classifier, save_model
from rlhf_min.pretrain import train_tokenizer
from rlhf_min.reward_model import (
    RewardModel,
    classify,
    encode_answer,
    group_by_length,
    load_judge,
    reward_and_sigma,
    row_logits,
)

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


def labels(*names):
    """The part of a config that names the labels; without names there is one, the reward."""
    return (
        {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
        if names
        else {"num_labels": 1}
    )


RATINGS = [str(k) for k in range(1, 11)]


def gpt2(vocab_size, names=(), **config):
    """A GPT-2 classifier of one block that has preferences."""
    config = GPT2Config(vocab_size=vocab_size, n_positions=64, n_layer=1, n_embd=16, n_head=2, **labels(*names),
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.3, **config)  # fmt: skip
    return GPT2ForSequenceClassification(config).eval()


def llama(vocab_size, **config):
    """A Llama classifier of one block."""
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=64, num_labels=1, initializer_range=0.3,
                         **config)  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


def distilbert(vocab_size, names=()):
    """A DistilBERT classifier of one block."""
    config = DistilBertConfig(vocab_size=vocab_size, dim=16, hidden_dim=32, n_layers=1, n_heads=2,
                              max_position_embeddings=32, initializer_range=0.3, **labels(*names))  # fmt: skip
    return DistilBertForSequenceClassification(config).eval()


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
    judge.logits = lambda rows: seen.extend(rows) or torch.zeros(len(rows), 1)
    judge(*arguments)
    del judge.logits
    return seen


@pytest.mark.parametrize("completion", [" was great.", " was great." + EOS, "  spaces ", ""])
def test_training_rows_equal_scoring_rows(tiny_tokenizer, completion):
    """T19: a pair is tokenised for training as its answers are for scoring, and EOS stands once, at the end."""
    judge = RewardModel(gpt2(len(tiny_tokenizer)), tiny_tokenizer, max_length=64)
    ((chosen, rejected, _),), _ = train_rm.encode_pairs(
        [Pair("The film", completion, " was dull.", True)], tiny_tokenizer, 64
    )
    assert scored_rows(judge, ["The film"] * 2, [completion, " was dull."], [True, True]) == [chosen, rejected]
    assert chosen.count(tiny_tokenizer.eos_token_id) == 1
    assert chosen[-1] == tiny_tokenizer.eos_token_id


def test_training_rows_equal_scoring_rows_for_conversations(tiny_tokenizer, monkeypatch):
    """T19: a conversation goes through the judge's template once: one [user], one [assistant], one EOS."""
    monkeypatch.setattr(tiny_tokenizer, "chat_template", TEMPLATE)
    judge = RewardModel(gpt2(len(tiny_tokenizer)), tiny_tokenizer, max_length=64)
    ((chosen, rejected, _),), _ = train_rm.encode_pairs(
        [Pair(QUESTION, "Great fun.", "Dull.", True)], tiny_tokenizer, 64
    )
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
    assert [bert_tokenizer.decode(row) for row in rows[0][:2]] == ["[CLS] a b c [SEP]", "[CLS] a [SEP]"]


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
    assert columns["reward"] == pytest.approx([judge.logits([row]).item() for row in ids], abs=1e-5)
    assert max(max(tiny_tokenizer(p + c)["input_ids"]) for p, c in zip(PROMPTS, columns["completion"])) >= 270


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("pad_token_id", [None, 1], ids=["pad None", "own pad"])
def test_decoder_classifiers_score_a_batch_like_single_answers(tmp_path, tiny_tokenizer, build, pad_token_id):
    """T67: a GPT-2 or Llama judge scores a batch as it scores singles, and sees EOS."""
    save_model(build(len(tiny_tokenizer), eos_token_id=0, pad_token_id=pad_token_id), tiny_tokenizer, tmp_path)
    judge = load_judge(str(tmp_path), CPU)
    batch, sigma = judge(PROMPTS, ANSWERS, torch.tensor([True, False, True]))
    single = [judge([p], [a], [e])[0].item() for p, a, e in zip(PROMPTS, ANSWERS, (True, False, True))]
    assert batch.tolist() == pytest.approx(single, abs=1e-5)
    assert sigma.tolist() == [0.0, 0.0, 0.0]
    other_end, _ = judge(PROMPTS, ANSWERS, torch.tensor([False, True, False]))
    assert (other_end - batch).abs().min() > 1e-3


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_foreign_judge_whose_pad_is_eos_is_read_as_it_was_trained(tmp_path, tiny_tokenizer, build):
    """T67: transformers, and so whoever trained with it, pools the token before the EOS; in a batch as in singles."""
    model = build(len(tiny_tokenizer), eos_token_id=0, pad_token_id=0)
    save_model(model, tiny_tokenizer, tmp_path)
    judge = load_judge(str(tmp_path), CPU)
    for ended in (True, False):
        ids = [tiny_tokenizer(p + a)["input_ids"] + [0] * ended for p, a in zip(PROMPTS, ANSWERS)]
        expected = [model(input_ids=torch.tensor([row])).logits.item() for row in ids]
        assert judge(PROMPTS, ANSWERS, [ended] * 3)[0].tolist() == pytest.approx(expected, abs=1e-5)


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
    model = distilbert(len(bert_tokenizer))
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


def architecture(name, tiny_tokenizer, bert_tokenizer):
    return {"gpt2": (gpt2, tiny_tokenizer), "distilbert": (distilbert, bert_tokenizer)}[name]


@pytest.mark.parametrize("name", ["gpt2", "distilbert"])
def test_a_judge_of_ratings_agrees_with_transformers(tmp_path, tiny_tokenizer, bert_tokenizer, name):
    """T32, T68: reward and sigma are E and σ of the probabilities that transformers' own pipeline gives the ratings."""
    build, tokenizer = architecture(name, tiny_tokenizer, bert_tokenizer)
    save_model(build(len(tokenizer), RATINGS), tokenizer, tmp_path)
    reward, sigma = load_judge(str(tmp_path), CPU)(PROMPTS, ANSWERS, [True] * 3)
    assert (reward.shape, sigma.shape, reward.dtype, sigma.dtype) == ((3,), (3,), torch.float32, torch.float32)
    end = tokenizer.eos_token or ""  # the judge ends an answer, the pipeline reads what it is given
    texts = [prompt + answer + end for prompt, answer in zip(PROMPTS, ANSWERS)]
    rows = pipeline("text-classification", str(tmp_path), top_k=None)(texts)
    for row, mean, std in zip(rows, reward.tolist(), sigma.tolist()):
        p = {int(entry["label"]): entry["score"] for entry in row}
        assert sorted(p) == list(range(1, 11))
        expected = sum(k * p[k] for k in p)
        assert mean == pytest.approx(expected, abs=1e-4)
        assert std == pytest.approx(sum((k - expected) ** 2 * p[k] for k in p) ** 0.5, abs=1e-4)
    assert reward.std() > 0.01 and sigma.min() > 0.1


@pytest.mark.parametrize("name", ["gpt2", "distilbert"])
def test_a_scalar_judge_agrees_with_transformers(tmp_path, tiny_tokenizer, bert_tokenizer, name):
    """T68: the reward of a scalar head is the logit, as the pipeline's with no function on top; its sigma is 0."""
    build, tokenizer = architecture(name, tiny_tokenizer, bert_tokenizer)
    save_model(build(len(tokenizer)), tokenizer, tmp_path)
    reward, sigma = load_judge(str(tmp_path), CPU)(PROMPTS, ANSWERS, [True] * 3)
    texts = [prompt + answer + (tokenizer.eos_token or "") for prompt, answer in zip(PROMPTS, ANSWERS)]
    classifier = pipeline("text-classification", str(tmp_path), function_to_apply="none")
    assert reward.tolist() == pytest.approx([classifier(text)[0]["score"] for text in texts], abs=1e-4)
    assert sigma.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["gpt2", "distilbert"])
def test_a_judge_of_ratings_scores_a_batch_like_single_answers(tiny_tokenizer, bert_tokenizer, name):
    """T20: reward and sigma of ten ratings do not depend on the padding, nor on how many are scored at a time."""
    build, tokenizer = architecture(name, tiny_tokenizer, bert_tokenizer)
    model = build(len(tokenizer), RATINGS)
    alone = [RewardModel(model, tokenizer)([p], [a], [True]) for p, a in zip(PROMPTS, ANSWERS)]
    alone = [torch.cat(column) for column in zip(*alone)]
    for batch_size in (64, 2):
        together = RewardModel(model, tokenizer, batch_size=batch_size)(PROMPTS, ANSWERS, [True] * 3)
        torch.testing.assert_close(list(together), alone, atol=1e-4, rtol=0)
    judge = RewardModel(model, tokenizer)
    logits = judge.logits([encode_answer(tokenizer, p, a) for p, a in zip(PROMPTS, ANSWERS)])
    assert (logits.shape, logits.dtype, logits.requires_grad) == ((3, 10), torch.float32, False)
    torch.testing.assert_close(reward_and_sigma(logits), judge(PROMPTS, ANSWERS, [True] * 3))


def test_a_judge_scores_without_dropout(tiny_tokenizer):
    """T20: a model that comes from training, with dropout on, is a judge that says the same twice."""
    model = gpt2(len(tiny_tokenizer), RATINGS)
    model.transformer.drop.p = 0.5
    judge = RewardModel(model.train(), tiny_tokenizer)
    torch.testing.assert_close(judge(PROMPTS, ANSWERS, [True] * 3), judge(PROMPTS, ANSWERS, [True] * 3))


def test_reward_and_sigma_by_hand():
    """T32: one logit is the reward itself, with no doubt; ten are a distribution over 1..10, here ½ on 2, ½ on 6."""
    reward, sigma = reward_and_sigma(torch.tensor([[-3.0], [40.0]]))
    assert (reward.tolist(), sigma.tolist()) == ([-3.0, 40.0], [0.0, 0.0])
    logits = torch.full((1, 10), -1e4)
    logits[0, [1, 5]] = 7.0
    reward, sigma = reward_and_sigma(logits)
    assert (reward.tolist(), sigma.tolist()) == ([4.0], [2.0])
    reward, sigma = reward_and_sigma(torch.zeros(1, 2))  # two ratings are ratings, too
    assert (reward.tolist(), sigma.tolist()) == ([1.5], [0.5])


@pytest.mark.parametrize("head, count", [("scalar", 1), ("ordinal", 10)])
def test_a_new_head_is_a_judges_head(tmp_path, tiny_policy, tiny_tokenizer, head, count):
    """T32: train_rm's head is one reward, or the ratings "1".."10"; saved and loaded it is a judge as it stands."""
    save_model(tiny_policy, tiny_tokenizer, tmp_path / "base")
    model, tokenizer = train_rm.load_base(train_rm.RewardModelOptions(base=str(tmp_path / "base"), head=head), CPU)
    assert model.config.num_labels == count
    assert count == 1 or [model.config.id2label[i] for i in range(10)] == RATINGS
    save_model(model, tokenizer, tmp_path / "rm")
    again, _ = load_classifier(str(tmp_path / "rm"), CPU)
    assert all(weight.equal(model.state_dict()[name]) for name, weight in again.state_dict().items())
    reward, sigma = load_judge(str(tmp_path / "rm"), CPU)(PROMPTS, ANSWERS, [True] * 3)
    assert (sigma > 0).all() if count == 10 else (sigma == 0).all()
    assert reward.isfinite().all() and (count == 1 or (reward.min() > 1 and reward.max() < 10))


@pytest.mark.parametrize("names, head, count", [([], "ordinal", 10), (RATINGS, "scalar", 1), (["a", "b"], "scalar", 1)])
def test_a_base_with_another_head_gets_the_new_one(tmp_path, tiny_tokenizer, names, head, count):
    """T68: the base is any model, a classifier with another number of labels, too: its head is left behind."""
    save_model(gpt2(len(tiny_tokenizer), names), tiny_tokenizer, tmp_path)
    model, _ = train_rm.load_base(train_rm.RewardModelOptions(base=str(tmp_path), head=head), CPU)
    assert (model.config.num_labels, model.score.weight.shape) == (count, (count, 16))


def head_logits(columns):
    """Logits (B, K) × 2 and B rows whose margins are 0, ½, 1, ..."""
    chosen, rejected = torch.randn(2, 4, columns)
    return chosen, rejected, [([5, 6], [7], i / 2) for i in range(4)]


def test_margin_of_the_pairs_reaches_the_loss():
    """T24: with --margin a scalar head is trained by the pairwise loss with the pairs' margins, (B,) as they are."""
    chosen, rejected, rows = head_logits(1)
    options = train_rm.RewardModelOptions(margin=True, center_coefficient=0.1)
    loss, metrics = train_rm.pair_loss(chosen, rejected, rows, options)
    margin = torch.tensor([0.0, 0.5, 1.0, 1.5])
    torch.testing.assert_close(loss, pairwise_loss(chosen[:, 0], rejected[:, 0], margin, 0.1))
    assert metrics["loss"] == loss.item()
    assert metrics["margin"] == pytest.approx(
        (chosen - rejected).mean().item()
    )  # what there is, not what there shall be
    without, _ = train_rm.pair_loss(chosen, rejected, rows, train_rm.RewardModelOptions(center_coefficient=0.1))
    torch.testing.assert_close(without, pairwise_loss(chosen[:, 0], rejected[:, 0], None, 0.1))
    assert loss > without + 0.1


def test_margins_of_zero_are_no_margin():
    """T24: with --margin and margins of 0 loss and gradient are those without."""
    chosen, rejected, rows = head_logits(1)
    chosen.requires_grad_()
    rows = [(*row[:2], 0) for row in rows]  # JSON's 0 is an int
    losses = [train_rm.pair_loss(chosen, rejected, rows, train_rm.RewardModelOptions(margin=flag))[0]
              for flag in (True, False)]  # fmt: skip
    assert losses[0] == losses[1]
    assert torch.equal(*(torch.autograd.grad(loss, chosen)[0] for loss in losses))


@pytest.mark.parametrize("ties", ["strict", "half"])
def test_ordinal_head_has_the_ordinal_loss(ties):
    """T29: --head ordinal trains by the ordinal loss with --ties, and its accuracy compares E, a tie an error."""
    chosen, rejected, rows = head_logits(10)
    rejected[0] = chosen[0]
    options = train_rm.RewardModelOptions(head="ordinal", ties=ties, center_coefficient=0.1)
    loss, metrics = train_rm.pair_loss(chosen, rejected, rows, options)
    torch.testing.assert_close(loss, ordinal_loss(chosen, rejected, ties, 0.1))
    ratings = torch.arange(1.0, 11)
    mean_w, mean_l = chosen.softmax(-1) @ ratings, rejected.softmax(-1) @ ratings
    assert metrics["accuracy"] == sum(w > r for w, r in zip(mean_w[1:].tolist(), mean_l[1:].tolist())) / 4
    assert metrics["margin"] == pytest.approx((mean_w - mean_l).mean().item(), abs=1e-5)
    assert metrics["mean_reward"] == pytest.approx((mean_w + mean_l).mean().item() / 2, abs=1e-5)


def test_margins_stay_with_their_pairs(tiny_tokenizer):
    """T24: tokenising keeps a pair's margin, and validation, which sorts the pairs by length, keeps it, too."""
    pairs = [Pair("The film", " was great fun." * (3 - i), " was dull.", margin=float(i)) for i in range(3)]
    rows, _ = train_rm.encode_pairs([*pairs, Pair("The film", "a", "b")], tiny_tokenizer, 64)
    assert [row[2] for row in rows] == [0.0, 1.0, 2.0, None]
    judge = RewardModel(gpt2(len(tiny_tokenizer)), tiny_tokenizer)
    options = train_rm.RewardModelOptions(margin=True, center_coefficient=0.0, batch_size=2, precision="fp32")
    metrics = train_rm.evaluate_pairs(judge.model, rows[:3], tiny_tokenizer, options)
    chosen, rejected = (judge.logits([row[side] for row in rows[:3]])[:, 0] for side in (0, 1))
    expected = pairwise_loss(chosen, rejected, torch.tensor([0.0, 1.0, 2.0])).item()
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(pairwise_loss(chosen, rejected, torch.tensor([2.0, 1.0, 0.0])).item() - expected) > 1e-3


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


HEADS = [["scalar"], ["ordinal"], ["ordinal", "--ties", "half"]]


@pytest.mark.parametrize("head", HEADS, ids=" ".join)
def test_a_reward_model_learns_and_is_the_right_way_round(tmp_path, pair_files, head):
    """T23, T31: trained on honest labels accuracy is above chance, and the saved judge prefers what was chosen."""
    train_rm.main([*pair_files("rm", random_labels=False), "--head", *head])
    summary = json.loads((tmp_path / "rm" / "summary.json").read_text())
    assert (summary["train_pairs"], summary["eval_pairs"]) == (30, 30)
    assert summary["eval_accuracy"] > 0.95
    good, bad = load_judge(str(tmp_path / "rm"), CPU)(["The film"] * 2, [" was great fun. 3", " was dull. 3"], [1, 1])[
        0
    ]
    assert good > bad + 0.5


@pytest.mark.parametrize("head", HEADS, ids=" ".join)
def test_the_saved_judge_scores_like_the_trained_model(tmp_path, pair_files, head):
    """T64: what train_rm validated is what load_judge reads back: head, weights and tokens give the same accuracy."""
    flags = [*pair_files("rm", random_labels=False), "--head", *head]
    train_rm.main([*flags, "--epochs", "1", "--accept-weak", "--eval-data", str(tmp_path / "pairs.jsonl")])
    judge = load_judge(str(tmp_path / "rm"), CPU)
    rows, _ = train_rm.encode_pairs(load_pairs(str(tmp_path / "pairs.jsonl"))[0], judge.tokenizer, 64)
    options = train_rm.RewardModelOptions(precision="fp32", head=head[0], ties=head[-1] if head[1:] else "strict")
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


@pytest.mark.parametrize(
    "names",
    [
        ["NEGATIVE", "POSITIVE"],
        ["LABEL_0", "LABEL_1"],  # what transformers calls them unless told
        [f"LABEL_{k}" for k in range(10)],
        [str(k) for k in range(10)],
        RATINGS[::-1],
        ["1", "10", *RATINGS[1:-1]],
        [*RATINGS[:-1], "none"],
    ],
    ids=" ".join,
)
def test_a_judge_whose_labels_are_no_ratings_is_refused(tmp_path, tiny_tokenizer, names):
    """T32: a sentiment classifier has two labels; which of them would be the reward? Ratings are 1, 2, 3, in order."""
    save_model(gpt2(len(tiny_tokenizer), names), tiny_tokenizer, tmp_path)
    found = re.escape(f"a classifier with the labels {', '.join(names[:3])}, ...; a reward model has one label")
    with pytest.raises(UserError, match=found):
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


def test_an_error_inside_a_reward_function_is_named_with_its_place(tmp_path, monkeypatch):
    """T58: an exception of the user's own function is not swallowed: its kind, message, file and line are said."""
    judge, name = function_judge(tmp_path, "return [1 / 0]", monkeypatch)
    place = r"ZeroDivisionError: division by zero \(.*\.py, line \d+\)"
    with pytest.raises(UserError, match=f"reward function {name}.f raised {place}"):
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


# Rows of similar length together


def test_groups_of_similar_length():
    """On a CPU a group ends where going on would pad 128 tokens or more; on a GPU there is one; none is lost."""
    rows = [[0] * n for n in (10, 200, 12, 190, 100)]
    # 190 after 200 pads 4 · 10 tokens, 100 would pad 3 · 100, 12 after 100 then 2 · 88, 10 after 12 one time 2
    assert group_by_length(rows, torch.device("cpu")) == [[1, 3], [4], [2, 0]]
    assert group_by_length(rows, torch.device("cuda")) == [[0, 1, 2, 3, 4]]


def test_logits_of_groups_are_in_the_order_of_the_rows():
    """Whatever is computed together, a row's logits are those of the row alone."""
    config = GPT2Config(vocab_size=30, n_positions=256, n_embd=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=0)
    model = GPT2ForSequenceClassification(config).eval()
    rows = [torch.randint(1, 30, (n,)).tolist() for n in (10, 200, 12, 190, 100)]
    with torch.no_grad():
        alone = torch.cat([row_logits(model, [row], 0) for row in rows])
        torch.testing.assert_close(row_logits(model, rows, 0), alone, atol=1e-5, rtol=0)
    assert len(set(alone.flatten().tolist())) == 5
