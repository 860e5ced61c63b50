"""Reading pairs, prompts and texts; batches and the split into training and held-out prompts."""

import gzip
import json
import re
import sys
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from rlhf_min.batches import Batches, pad
from rlhf_min.data import (
    Pair,
    encode_prompt,
    load_pairs,
    load_prompts,
    read_rows,
    read_texts,
    write_jsonl,
)
from rlhf_min.errors import UserError
from rlhf_min.inputs import split_prompts

EXOTIC = "first\u0085second\u2028third\x0bfourth\x1cfifth\rsixth"
USER, GOOD, BAD = ({"role": role, "content": text} for role, text in
                   (("user", "A film?"), ("assistant", "Great."), ("assistant", "Dull.")))  # fmt: skip
SYSTEM = {"role": "system", "content": "Be brief."}


def jsonl(path, *rows):
    """Write rows as JSON Lines in UTF-8 with nothing escaped; returns the path as text."""
    path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
    return str(path)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_plain_and_gzip_read_the_same(tmp_path):
    """A .gz file gives the same rows as the plain file, blank lines left out, each with its line number."""
    content = b'{"text": "one"}\n\n  \n{"text": "two"}'
    (tmp_path / "a.jsonl").write_bytes(content)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(content)
    for name in ("a.jsonl", "a.jsonl.gz"):
        source = str(tmp_path / name)
        rows = [(f"{source}, line 1", {"text": "one"}), (f"{source}, line 4", {"text": "two"})]
        assert list(read_rows(source)) == rows


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    """A file that Windows wrote, with a byte order mark and CR LF, has the same rows."""
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert [row["text"] for _, row in read_rows(str(tmp_path / "a.jsonl"))] == ["one", "two"]


def test_exotic_separators_survive_writing_and_reading(tmp_path):
    """T70: U+0085, U+2028 and their kin survive writing and reading, and the file has one line a row."""
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": EXOTIC}, {"text": "next"}])
    assert [row["text"] for _, row in read_rows(str(path))] == [EXOTIC, "next"]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2  # so that other readers cannot cut a row either


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_exotic_separators_in_a_foreign_file_survive(tmp_path, suffix):
    """T70: a file that holds U+0085 and U+2028 unescaped is cut at the byte 0x0A alone."""
    content = (json.dumps({"text": "a\u0085b\u2028c"}, ensure_ascii=False) + '\n{"text": "next"}\n').encode()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert "\u2028".encode() in content
    assert list(read_texts(str(path))) == ["a\u0085b\u2028c", "next"]


def test_texts_of_a_txt_file(tmp_path):
    """T70: a .txt file has a text a line, cut at 0x0A alone; blank lines are left out."""
    (tmp_path / "a.txt").write_bytes("one\u0085more\n\n two \nthree\u2028more".encode())
    assert list(read_texts(str(tmp_path / "a.txt"))) == ["one\u0085more", "two", "three\u2028more"]


def test_plain_pairs(tmp_path):
    """Text pairs keep their prompt; without one, or with an empty one, chosen and rejected are whole texts."""
    rows = [{"prompt": "A film?", "chosen": " Great.", "rejected": " Dull."}, {"chosen": "Great.", "rejected": "Dull."},
            {"prompt": "", "chosen": "Good.", "rejected": "Bad."}]  # fmt: skip
    assert load_pairs(jsonl(tmp_path / "p.jsonl", *rows))[0] == [
        Pair("A film?", " Great.", " Dull.", False),
        Pair("", "Great.", "Dull.", False),
        Pair("", "Good.", "Bad.", False),
    ]


def test_conversations_with_explicit_and_implicit_prompt(tmp_path):
    """A conversation's prompt is its own field or the messages that both answers share; both read the same."""
    explicit = {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}
    implicit = {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}
    pairs, _ = load_pairs(jsonl(tmp_path / "p.jsonl", explicit, implicit))
    assert pairs == [Pair([SYSTEM, USER], "Great.", "Dull.", False)] * 2


def test_a_text_prompt_beside_whole_conversations_is_ignored(tmp_path):
    """Data sets such as UltraFeedback repeat the question as text: the conversations say the same, with their roles."""
    turns = [SYSTEM, USER, GOOD, {"role": "user", "content": "And the cast?"}]
    rows = [{"prompt": "A film?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            {"prompt": "", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            {"prompt": "something else", "chosen": [*turns, GOOD], "rejected": [*turns, BAD]}]  # fmt: skip
    pairs, _ = load_pairs(jsonl(tmp_path / "p.jsonl", *rows))
    assert pairs == [Pair([USER], "Great.", "Dull.")] * 2 + [Pair(turns, "Great.", "Dull.")]


def test_margins_of_pairs(tmp_path):
    """T24: a number in the field `margin` is kept with its pair, text or messages; null is none, 0 is not."""
    rows = [{"chosen": "a", "rejected": "b", "margin": 1.5}, {"chosen": "a", "rejected": "b", "margin": 0},
            {"chosen": "a", "rejected": "b", "margin": -2}, {"chosen": "a", "rejected": "b", "margin": None},
            {"chosen": "a", "rejected": "b"}, {"chosen": [USER, GOOD], "rejected": [USER, BAD], "margin": 3},
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "margin": 0.25}]  # fmt: skip
    pairs, _ = load_pairs(jsonl(tmp_path / "p.jsonl", *rows))
    assert [pair.margin for pair in pairs] == [1.5, 0, -2, None, None, 3, 0.25]
    labelled = [{"text": "good", "label": 1, "margin": 2}, {"text": "bad", "label": 0, "margin": 2}]
    pairs, _ = load_pairs(jsonl(tmp_path / "l.jsonl", *labelled))
    assert pairs == [Pair("", "good", "bad", may_be_cut=True, margin=None)]  # two texts have no margin between them


def test_a_margin_beyond_all_floats_is_refused(tmp_path):
    """JSON has integers of any length; one that is no float is refused with its line, without a traceback."""
    (tmp_path / "p.jsonl").write_text('{"chosen": "a", "rejected": "b", "margin": 1%s}\n' % ("0" * 400))
    with pytest.raises(UserError, match=re.escape("p.jsonl, line 1: 'margin' must be a finite number")):
        load_pairs(str(tmp_path / "p.jsonl"))


def test_identical_conversations_keep_their_answer(tmp_path):
    """The shared beginning never takes in the last message: equal answers stay answers."""
    row = {"chosen": [USER, GOOD], "rejected": [USER, GOOD]}
    assert load_pairs(jsonl(tmp_path / "p.jsonl", row))[0] == [Pair([USER], "Great.", "Great.", False)]


def test_labelled_texts_are_paired_in_order(tmp_path):
    """The i-th good text goes with the i-th bad one, whatever stands between; the surplus is left out and counted."""
    rows = [("b1", 0), ("b2", 0), ("g1", 1), ("b3", 0), ("g2", 1)]
    pairs, unpaired = load_pairs(jsonl(tmp_path / "p.jsonl", *({"text": t, "label": y} for t, y in rows)))
    assert pairs == [Pair("", "g1", "b1", True), Pair("", "g2", "b2", True)] and unpaired == 1


@pytest.mark.parametrize(
    "row, fragment",
    [
        ({"chosen": "a"}, "no field 'rejected'"),
        ({"chosen": "a", "rejected": 3}, "'rejected' must be text, but is int"),
        ({"chosen": "a", "rejected": " "}, "'rejected' is empty"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "'prompt' must be text, but is NoneType"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' must be text, but is int"),
        ({"text": "a", "label": 2}, "'label' must be 0 (bad) or 1 (good), but is 2"),
        ({"text": "a", "label": "pos"}, "'label' must be"),
        ({"text": None, "label": 1}, "'text' must be text"),
        ({"chosen": [USER, GOOD], "rejected": "b"}, "'rejected' must be one, too"),
        ({"chosen": "a", "rejected": [USER, BAD]}, "'rejected' must be text, but is list"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [{"role": "assistant"}]}, "needs a 'role' and a 'content'"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [USER]}, "exactly one assistant message"),
        ({"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": [BAD]}, "exactly one assistant message"),
        ({"prompt": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "must be the user's"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "'prompt' is empty"),
        ({"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, "'prompt' must be"),
        ({"prompt": [], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "'prompt' must be"),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "exactly one assistant message"),
        ({"prompt": "A film?", "chosen": [USER, GOOD], "rejected": [SYSTEM, BAD]}, "'prompt' must be"),
        ({"prompt": "A film?", "chosen": [USER, GOOD], "rejected": "Dull."}, "'rejected' must be one, too"),
        ({"chosen": "a", "rejected": "b", "margin": "a"}, "'margin' must be a finite number, but is 'a'"),
        ({"chosen": "a", "rejected": "b", "margin": "1.5"}, "'margin' must be a finite number, but is '1.5'"),
        ({"chosen": "a", "rejected": "b", "margin": True}, "'margin' must be a finite number, but is True"),
        ({"chosen": "a", "rejected": "b", "margin": [1]}, "'margin' must be a finite number, but is [1]"),
        ({"chosen": "a", "rejected": "b", "margin": {}}, "'margin' must be a finite number, but is {}"),
        ({"chosen": "a", "rejected": "b", "margin": float("nan")}, "'margin' must be a finite number, but is nan"),
        ({"chosen": "a", "rejected": "b", "margin": float("-inf")}, "'margin' must be a finite number, but is -inf"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD], "margin": "a"}, "'margin' must be a finite number"),
    ],
)
def test_bad_pairs_name_their_line(tmp_path, row, fragment):
    """A row that is no pair is refused with its line and field."""
    source = jsonl(tmp_path / "p.jsonl", {"chosen": "a", "rejected": "b"}, row)
    with pytest.raises(UserError, match=re.escape(fragment)) as error:
        load_pairs(source)
    assert "p.jsonl, line 2" in str(error.value)


def test_prompts_whole_and_cut_from_texts(tmp_path, tiny_tokenizer):
    """A `prompt` is taken whole, a `text` by its first tokens, a shorter text not at all; each text counts once."""
    rows = [{"prompt": "The film was"}, {"text": "The plot was dull and long."}, {"text": "I"},
            {"prompt": "The film was"}]  # fmt: skip
    prompts = load_prompts(jsonl(tmp_path / "p.jsonl", *rows), tiny_tokenizer, prompt_tokens=3, max_length=32)
    assert [prompt.tokens for prompt in prompts] == [
        tiny_tokenizer("The film was")["input_ids"],
        tiny_tokenizer("The plot was dull and long.")["input_ids"][:3],
    ]
    assert [prompt.text for prompt in prompts] == [tiny_tokenizer.decode(prompt.tokens) for prompt in prompts]


def test_a_long_text_is_cut_like_a_short_one(tmp_path, tiny_tokenizer):
    """Only the beginning of a long text is tokenised, and that gives the same first tokens as the whole of it."""
    text = "The film was great fun. " * 500
    (prompt,) = load_prompts(jsonl(tmp_path / "p.jsonl", {"text": text}), tiny_tokenizer, 7, 32)
    assert prompt.tokens == tiny_tokenizer(text)["input_ids"][:7]


def test_a_conversation_as_prompt_goes_through_the_template_once(tmp_path, tiny_tokenizer, monkeypatch):
    """T19: the tokens of a conversation are those of its rendered template, which writes its special tokens itself."""
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    (prompt,) = load_prompts(jsonl(tmp_path / "p.jsonl", {"prompt": [SYSTEM, USER]}), tiny_tokenizer, 3, 64)
    assert prompt.text == [SYSTEM, USER]
    assert tiny_tokenizer.decode(prompt.tokens) == "<|endoftext|>[system]Be brief.[user]A film?[assistant]"
    assert prompt.tokens == encode_prompt(tiny_tokenizer, [SYSTEM, USER])
    assert prompt.tokens.count(tiny_tokenizer.bos_token_id) == 1


def test_prompts_of_preference_rows(tmp_path, tiny_tokenizer, monkeypatch):
    """T26: REINFORCE takes the pairs' own prompts, so that its prompts are what a pair of the file has, each once."""
    monkeypatch.setattr(
        tiny_tokenizer, "chat_template", "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    more = [USER, GOOD, {"role": "user", "content": "Why?"}]
    source = jsonl(
        tmp_path / "p.jsonl",
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "A film?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},  # the text says it again
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [*more, GOOD], "rejected": [*more, BAD], "margin": 1},
        {"prompt": "The film was", "chosen": " great", "rejected": " dull"},
    )
    prompts = load_prompts(source, tiny_tokenizer, 3, 64)
    assert [prompt.text for prompt in prompts] == [[USER], more, "The film was"]
    assert [prompt.tokens for prompt in prompts] == [encode_prompt(tiny_tokenizer, prompt.text) for prompt in prompts]
    pairs, _ = load_pairs(source)
    assert {json.dumps(pair.prompt) for pair in pairs} == {json.dumps(prompt.text) for prompt in prompts}


@pytest.mark.parametrize(("limit", "kept"), [(0, "abcd"), (100, "abcd"), (7, "abcd"), (6, "abd"), (5, "ab"), (3, "b")])
def test_long_prompts_are_left_out(tmp_path, tiny_tokenizer, monkeypatch, limit, kept):
    """A prompt of more than `max_characters` characters, or of messages with more in all, is left out; 0 keeps all."""
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    two = [{"role": "system", "content": "four"}, {"role": "user", "content": "on?"}]  # 7 in all
    last = [{"role": "user", "content": "sixsix"}]
    rows = {"a": {"prompt": "fünf!"}, "b": {"prompt": "tri"}, "c": {"prompt": two},
            "d": {"chosen": [*last, GOOD], "rejected": [*last, BAD]}}  # fmt: skip
    texts = {"a": "fünf!", "b": "tri", "c": two, "d": last}
    prompts = load_prompts(jsonl(tmp_path / "p.jsonl", *rows.values()), tiny_tokenizer, 3, 64, limit)
    assert [prompt.text for prompt in prompts] == [texts[name] for name in kept]


def test_a_prompt_that_is_left_out_may_have_too_many_tokens(tmp_path, tiny_tokenizer):
    """The limit on characters comes first: it is the way out of the limit on tokens and says so if none is left."""
    source = jsonl(tmp_path / "p.jsonl", {"prompt": "The film was great fun. " * 9}, {"prompt": "I"})
    with pytest.raises(UserError, match="line 1: the prompt has"):
        load_prompts(source, tiny_tokenizer, 3, 16)
    assert [prompt.text for prompt in load_prompts(source, tiny_tokenizer, 3, 16, 20)] == ["I"]
    source = jsonl(tmp_path / "q.jsonl", {"prompt": "The film was great fun."})
    with pytest.raises(UserError, match=r"q\.jsonl: no prompt .*raise --max-prompt-characters 20"):
        load_prompts(source, tiny_tokenizer, 3, 16, 20)


@pytest.mark.parametrize(
    "row, prompt_tokens, fragment",
    [
        ({"prompt": "The film was great fun. " * 9}, 3, "p.jsonl, line 1: the prompt has"),
        ({"text": "I"}, 9, "lower --prompt-tokens"),
        ({"prompt": [USER]}, 3, "no chat template"),
        ({"prompt": [USER, GOOD]}, 3, "must be the user's"),
        ({"prompt": ["a"]}, 3, "must be text or a list of messages"),
        ({"prompt": [USER, {"content": "no role"}]}, 3, "needs a 'role'"),
        ({"title": "a"}, 3, "'text' must be text, but is missing"),
        ({"chosen": [USER, GOOD]}, 3, "p.jsonl, line 1: no field 'rejected'"),
        ({"chosen": [USER, GOOD], "rejected": [{"role": "user"}, BAD]}, 3, "every message of 'rejected'"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, 3, "no chat template"),
    ],
)
def test_bad_prompts_are_refused(tmp_path, tiny_tokenizer, row, prompt_tokens, fragment):
    """A row that is no prompt, or leaves no room for an answer, is refused with a sentence."""
    with pytest.raises(UserError, match=re.escape(fragment)):
        load_prompts(jsonl(tmp_path / "p.jsonl", row), tiny_tokenizer, prompt_tokens, max_length=16)


def test_training_and_held_out_prompts_are_disjoint(tmp_path, tiny_tokenizer):
    """T26: no text is in both parts, although the file holds every text twice, and none is lost."""
    rows = [{"prompt": f"Film {i % 20} was"} for i in range(40)]
    prompts = load_prompts(jsonl(tmp_path / "p.jsonl", *rows), tiny_tokenizer, 3, 32)
    training, held_out = split_prompts(prompts, [], 7, generator())
    train_texts, eval_texts = {p.text for p in training}, {p.text for p in held_out}
    assert (len(training), len(held_out)) == (13, 7)
    assert not train_texts & eval_texts
    assert train_texts | eval_texts == {f"Film {i} was" for i in range(20)}


def test_held_out_prompts_of_a_file_of_their_own(tmp_path, tiny_tokenizer):
    """T26: where the held-out prompts have their own file, none of those used is trained on."""
    train_file = jsonl(tmp_path / "t.jsonl", *({"prompt": f"Film {i} was"} for i in range(10)))
    eval_file = jsonl(tmp_path / "e.jsonl", *({"prompt": f"Film {i} was"} for i in range(5, 20)))
    prompts, others = (load_prompts(file, tiny_tokenizer, 3, 32) for file in (train_file, eval_file))
    training, held_out = split_prompts(prompts, others, 10, generator())
    assert len(held_out) == 10
    assert {p.text for p in held_out} <= {p.text for p in others}
    assert training
    assert not {p.text for p in training} & {p.text for p in held_out}


def test_too_few_prompts_to_hold_out(tmp_path, tiny_tokenizer):
    """At least one prompt must be left to train on."""
    prompts = load_prompts(jsonl(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b"}), tiny_tokenizer, 3, 32)
    for others in ([], prompts, prompts[:1]):
        few = "0 of --eval-prompts are not in --prompts" if others else "2 distinct prompts"
        with pytest.raises(UserError, match=f"^{few}: too few to hold out 2"):
            split_prompts(prompts, others, 2, generator())
    assert [len(part) for part in split_prompts(prompts, [], 1, generator())] == [1, 1]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 25])
def test_batches_visit_every_item_once_an_epoch(batch_size):
    """T59: the loader advances: in every epoch of N items each comes once, whether or not the batch divides N."""
    stream = Batches(list(range(10)), batch_size, generator())
    drawn = list(islice(stream, 20))
    assert all(len(batch) == batch_size for batch in drawn)
    items = [item for batch in drawn for item in batch]
    for start in range(0, len(items) - 9, 10):
        assert sorted(items[start : start + 10]) == list(range(10))


def test_two_consecutive_batches_differ():
    """T59: two consecutive batches differ, and so do the orders of two epochs."""
    stream = Batches(list(range(100)), 50, generator())
    first, second, third, fourth = islice(stream, 4)
    assert not set(first) & set(second)
    assert first + second != third + fourth


def test_order_repeats_with_the_seed_and_differs_between_seeds():
    """T51: the order of the prompts is a function of the seed, and two seeds give two orders."""
    orders = [list(islice(Batches(list(range(30)), 10, generator(seed)), 3)) for seed in (1, 2, 1)]
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]


def test_hub_data_sets_go_through_datasets(monkeypatch):
    """A name owner/name:split is loaded by the `datasets` package, split train where none is given."""
    calls = []

    def load_dataset(name, split):
        calls.append((name, split))
        return [{"chosen": "good", "rejected": "bad"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, __spec__=True))
    monkeypatch.setattr("rlhf_min.sources.hub_refusal", lambda path: "")
    assert load_pairs("owner/name:validation")[0] == [Pair("", "good", "bad", False)]
    assert list(read_rows("owner/name")) == [("owner/name, row 1", {"chosen": "good", "rejected": "bad"})]
    assert calls == [("owner/name", "validation"), ("owner/name", "train")]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Unknown split\nand more"),
        pytest.param(
            ConnectionError(),
        ),
    ],
)
def test_a_failure_of_datasets_is_one_line(monkeypatch, error):
    """Whatever the library raises, with or without a message, the user sees a sentence that names the data set."""

    def load_dataset(name, split):
        raise error

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, __spec__=True))
    monkeypatch.setattr("rlhf_min.sources.hub_refusal", lambda path: "")
    with pytest.raises(UserError, match="owner/name") as caught:
        list(read_rows("owner/name:nope"))
    assert "and more" not in str(caught.value)


def test_missing_datasets_gives_the_sentence_about_the_extra(monkeypatch):
    """Without the `datasets` package the message names the extra that brings it."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=re.escape("pip install 'rlhf_min[data]'")):
        list(read_rows("owner/name"))


def test_unreachable_hub_is_said_before_datasets_retries(monkeypatch):
    """T69: where the hub cannot be reached, `datasets` is not even asked."""
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(__spec__=True))
    monkeypatch.setattr("rlhf_min.sources.hub_refusal", lambda path: "the hub cannot be reached")
    with pytest.raises(UserError, match="hub cannot be reached"):
        list(read_rows("owner/name"))


@pytest.mark.parametrize("source", ["none.jsonl", "owner/none.jsonl", "a/b/none.gz", "./none", "/none/at-all", "none"])
def test_a_missing_file_is_not_taken_for_a_hub_name(monkeypatch, source):
    """T69: what ends like a file, or has no owner/name, is a missing file."""
    monkeypatch.setattr("rlhf_min.sources.hub_refusal", lambda path: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=f"^{re.escape(source)}: no such file"):
        list(read_rows(source))


@pytest.mark.parametrize(
    "content, fragment",
    [
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (b"{}\n{oops\n", "line 2: not JSON"),
        (b"{}\n\n[1]\n", "line 3: list where an object"),
        (b'"text"\n', "line 1: str where an object"),
        (b'{"text": "\xff"}\n', "line 1: not JSON"),
        (b"[" * 100_000 + b"\n", "line 1: not JSON"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, content, fragment):
    """What is not JSON Lines is refused with file and line, never with a traceback."""
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(fragment)) as error:
        list(read_rows(str(tmp_path / "a.jsonl")))
    assert "a.jsonl" in str(error.value)


@pytest.mark.parametrize("cut", ["header", "middle", "checksum", "no gzip"])
def test_broken_gzip_files_are_refused(tmp_path, cut):
    """A .gz file that is cut off, damaged or no gzip at all is refused by its name."""
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(5000)))
    content = {"header": whole[:5], "middle": whole[: len(whole) // 2], "checksum": whole[:-6] + b"000000",
               "no gzip": b'{"text": "plain"}\n'}[cut]  # fmt: skip
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match=re.escape("a.jsonl.gz cannot be read")):
        list(read_rows(str(tmp_path / "a.jsonl.gz")))


@pytest.mark.parametrize("read", ["prompts", "pairs"])
def test_half_a_surrogate_pair_is_refused(tmp_path, tiny_tokenizer, read):
    r"""JSON can hold "\ud83d", half an emoji, which no tokenizer reads: the message names the line."""
    rows = {"prompt": "film \ud83d"} if read == "prompts" else {"chosen": "film \ud83d", "rejected": "b"}
    write_jsonl(tmp_path / "a.jsonl", [rows])
    with pytest.raises(UserError, match=re.escape("a.jsonl, line 1")):
        if read == "prompts":
            load_prompts(str(tmp_path / "a.jsonl"), tiny_tokenizer, 3, 32)
        else:
            load_pairs(str(tmp_path / "a.jsonl"))


def test_pad_by_hand():
    """T1, T3: the mask is True on the tokens that are real, also where one of them is the pad token's id."""
    tokens, mask = pad([[5, 9], [7]], 9, "cpu")
    assert tokens.tolist() == [[5, 9], [7, 9]] and mask.tolist() == [[True, True], [True, False]]
    tokens, mask = pad([[5, 9], [7]], 9, "cpu", side="left")
    assert tokens.tolist() == [[5, 9], [9, 7]] and mask.tolist() == [[True, True], [False, True]]


def test_a_file_that_is_not_written_to_its_end_is_not_there(tmp_path):
    """What counts as cached because it exists, as the embedded world's texts do, must be whole."""

    def rows():
        yield {"text": "a"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(tmp_path / "a.jsonl", rows())
    assert list(tmp_path.iterdir()) == []
