"""Reading pairs, prompts and texts; batches and padding; the split into training and held-out prompts."""

import gzip
import json
import re
import sys
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from rlhf_min import data
from rlhf_min.data import (
    Pair,
    Prompt,
    apply_chat_template,
    distinct,
    encode_answer,
    load_pairs,
    read_texts,
    split_pairs,
    split_prompts,
)
from rlhf_min.support.batches import Batches, group_by_length, pad
from rlhf_min.support.errors import UserError
from rlhf_min.support.rows import read_rows, write_jsonl

EXOTIC = "first\u0085second\u2028third\x0bfourth\x1cfifth\rsixth 🎬 \u202eהסרט\u202c \x00 e\u0301"
USER = {"role": "user", "content": "A film?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Great.", "Dull."))
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [SYSTEM, USER, GOOD, {"role": "user", "content": "And the cast?"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def load_prompts(path, tokenizer, *rows, **changes):
    """The prompts of a file that has these rows."""
    options = {"prompt_tokens": 3, "max_length": 64, "max_prompt_characters": 0, "columns": []} | changes
    write_jsonl(path, rows)
    return data.load_prompts(str(path), tokenizer, SimpleNamespace(**options))


@pytest.mark.parametrize("windows", [False, True])
def test_rows_survive_exotic_separators(tmp_path, windows):
    """A file is cut at the byte 0x0A alone, not at U+0085 or U+2028, and reads the same plain, zipped and from Windows.

    What is written has one line a row for every reader.
    """
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n\n \n" for text in (EXOTIC, "next")).encode()
    assert "\u2028".encode() in content
    content = b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n") if windows else content
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    for source in (f"{tmp_path}/a.jsonl", f"{tmp_path}/a.jsonl.gz"):
        assert read_rows(source) == [{"text": EXOTIC}, {"text": "next"}]
    write_jsonl(tmp_path / "b.jsonl", [{"text": EXOTIC}, {"text": "next"}])
    assert read_texts(f"{tmp_path}/b.jsonl") == [EXOTIC, "next"]
    assert len((tmp_path / "b.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_a_file_that_is_not_written_to_its_end_is_not_there(tmp_path):
    """What counts as made because it exists, as the embedded world's texts do, must be whole."""

    def rows():
        yield {"text": "a"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(tmp_path / "a.jsonl", rows())
    assert list(tmp_path.iterdir()) == []


ZIPPED = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(5000)), mtime=0)


@pytest.mark.parametrize("name, content, fragment", [
    ("a.jsonl", b"\n \n", "a.jsonl: the file is empty"),
    ("a.jsonl", b"{}\n{oops\n", "a.jsonl, line 2: not JSON"),
    ("a.jsonl", b"{}\n\n[1]\n", "a.jsonl, line 3: list where an object"),
    ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, line 1: not JSON"),
    ("a.jsonl", b"[" * 100_000 + b"\n", "a.jsonl, line 1: not JSON"),
    ("header.gz", ZIPPED[:5], "header.gz cannot be read"),
    ("middle.gz", ZIPPED[:5000], "middle.gz cannot be read"),
    ("checksum.gz", ZIPPED[:-6] + b"000000", "checksum.gz cannot be read"),
    ("plain.gz", b'{"text": "plain"}\n', "plain.gz cannot be read"),
])  # fmt: skip
def test_broken_files_are_refused(tmp_path, name, content, fragment):
    """What is not JSON Lines, or a gzip file that is cut off or damaged, is refused with file and line."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(fragment)):
        read_rows(f"{tmp_path}/{name}")


def test_hub_data_sets_go_through_datasets(monkeypatch):
    """A name owner/name:split is loaded by `datasets`, split train by default; its errors become one line."""

    def load_dataset(name, split):
        if split == "nope":
            raise ValueError("Unknown split\nand more")
        return [{"chosen": name, "rejected": split}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, disable_progress_bars=int))
    assert load_pairs("owner/name:validation")[0] == [Pair("", "owner/name", "validation")]
    assert read_rows("owner/name") == [{"chosen": "owner/name", "rejected": "train"}]
    with pytest.raises(UserError, match=r"^owner/name:nope .*Unknown split$"):
        read_rows("owner/name:nope")


@pytest.mark.parametrize("source", ["none.jsonl", "owner/none.jsonl", "runs/none", "a/b/none.gz", "./none", "none"])
def test_a_missing_file_is_not_taken_for_a_hub_name(monkeypatch, source):
    """What ends like a file, or is no owner/name, is a missing file, and the hub is not asked."""
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: pytest.fail("asked")))
    with pytest.raises(UserError, match=f"^{re.escape(source)}: no such file"):
        read_rows(source)


@pytest.mark.parametrize("row, pair", [
    ({"prompt": "A film?", "chosen": " Great.", "rejected": " Dull."}, Pair("A film?", " Great.", " Dull.")),
    ({"chosen": "Great.", "rejected": "Dull."}, Pair("", "Great.", "Dull.")),
    ({"prompt": "", "chosen": "Great.", "rejected": "Dull."}, Pair("", "Great.", "Dull.")),
    ({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}, Pair([SYSTEM, USER], "Great.", "Dull.")),
    ({"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, Pair([SYSTEM, USER], "Great.", "Dull.")),
    ({"prompt": "A film?", "chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]}, Pair(TURNS, "Great.", "Dull.")),
    ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, Pair([USER], "Great.", "Great.")),
    ({"prompt": "A film?", "chosen": [GOOD], "rejected": [BAD]}, Pair([USER], "Great.", "Dull.")),
    ({"prompt": "x", "chosen": "y", "rejected": "z", "messages": ["x"], "id": "7", "ratings": {"a": [*range(6)]}},
     Pair("x", "y", "z")),
])  # fmt: skip
def test_pairs(tmp_path, row, pair):
    """A prompt is its own field or what both conversations share; a margin is kept, also 0, and null is none."""
    write_jsonl(tmp_path / "p.jsonl", [row, *(row | {"margin": margin} for margin in (1.5, 0, -2, None))])
    margins = (None, 1.5, 0, -2, None)
    assert load_pairs(f"{tmp_path}/p.jsonl") == ([pair._replace(margin=margin) for margin in margins], 0)
    with pytest.raises(UserError, match=r"p\.jsonl, line 1: a pair with a field 'margin' is needed"):
        load_pairs(f"{tmp_path}/p.jsonl", margin=True)


def test_labelled_texts_are_paired_in_order(tmp_path):
    """The i-th good text goes with the i-th bad one, whatever stands between; the surplus is left out and counted."""
    rows = [("b1", 0), ("b2", 0), ("g1", 1), ("b3", 0), ("g2", 1)]
    write_jsonl(tmp_path / "p.jsonl", [{"text": text, "label": label, "margin": 2} for text, label in rows])
    assert load_pairs(f"{tmp_path}/p.jsonl") == ([Pair("", "g1", "b1", True), Pair("", "g2", "b2", True)], 1)


@pytest.mark.parametrize("row, fragment", [
    ({"chosen": "a"}, "no field 'rejected'"),
    ({"chosen": "a", "rejected": 3}, "'rejected' must be text, but is int"),
    ({"chosen": "a", "rejected": " "}, "'rejected' is empty"),
    ({"chosen": "film \ud83d", "rejected": "b"}, "half of a surrogate pair"),
    ({"prompt": None, "chosen": "a", "rejected": "b"}, "'prompt' must be text, but is NoneType"),
    ({"text": "a", "label": "1"}, "'label' must be 0 (bad) or 1 (good), but is '1'"),
    ({"chosen": [USER, GOOD], "rejected": "b"}, "'rejected' must be text or a list of messages {role, content}"),
    ({"chosen": "a", "rejected": [USER, BAD]}, "'rejected' must be text, but is list"),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [{"role": "assistant"}]}, "no field 'content'"),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [USER]}, "exactly one assistant message"),
    ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "exactly one assistant message"),
    ({"prompt": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "it must be the user's"),
    ({"chosen": [GOOD], "rejected": [BAD]}, "no field 'prompt'"),
    ({"tools": [{"name": "f"}], "chosen": "a", "rejected": "b"}, "field 'tools' would not be read"),
    ({"chosen": "a", "rejected": "b", "labels": 0}, "'labels' would not be read; if 'chosen' is the better one"),
    ({"context": "x", "prompt": "y", "chosen": "a", "rejected": "b"}, "--columns =context leaves it out"),
    ({"prompt": "Is 3 even?", "text": "No.", "label": 1}, "field 'prompt' would not be read"),
    ({"Question": "Who?", "chosen": "a", "rejected": "b"}, "--columns prompt=Question reads it"),
    ({"prompt": "Be harsh.", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "'prompt' is no part of the"),
    ({"turns": {"a": ["one two three four five six"]}, "chosen": "a", "rejected": "b"}, "field 'turns' would not"),
    ({"blurb": "one two three four five six", "chosen": "a", "rejected": "b"}, "--columns prompt=blurb reads it"),
    ({"chosen": "a", "rejected": "b", "margin": "1.5"}, "'margin' must be a finite number, but is '1.5'"),
    ({"chosen": "a", "rejected": "b", "margin": float("nan")}, "'margin' must be a finite number, but is nan"),
    ({"chosen": "a", "rejected": "b", "margin": 10**400}, "'margin' must be a finite number"),
])  # fmt: skip
def test_bad_pairs_name_their_line(tmp_path, row, fragment):
    """A row that is no pair is refused with its line and field."""
    write_jsonl(tmp_path / "p.jsonl", [{"chosen": "a", "rejected": "b"}, row])
    with pytest.raises(UserError, match=f"p.jsonl, line 2.*{re.escape(fragment)}"):
        load_pairs(f"{tmp_path}/p.jsonl")


def test_prompts_whole_and_cut_from_texts(tmp_path, tiny_tokenizer):
    """A `prompt` is taken whole, a `text` by its first tokens, a shorter text not at all; each prompt counts once."""
    long = "I slept. " * 500  # of which only the beginning is tokenised
    rows = {"prompt": "The film was"}, {"text": "The plot was dull."}, {"text": "I"}, {"prompt": "The film was"}
    prompts = load_prompts(tmp_path / "p.jsonl", tiny_tokenizer, *rows, {"text": long})
    whole, *cut = (tiny_tokenizer(text)["input_ids"] for text in ("The film was", "The plot was dull.", long))
    assert [prompt.tokens for prompt in prompts] == [whole, *(tokens[:3] for tokens in cut)]
    assert [prompt.text for prompt in prompts] == [tiny_tokenizer.decode(prompt.tokens) for prompt in prompts]


def test_prompts_of_conversations(tmp_path, tiny_tokenizer, monkeypatch):
    """A conversation goes through the template once, which writes its special tokens; of a pair, its prompt does."""
    template = TEMPLATE + "{% if add_generation_prompt %}[assistant]{% endif %}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    prompts = load_prompts(
        tmp_path / "p.jsonl",
        tiny_tokenizer,
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "A film?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},  # the text says it again
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD], "margin": 1},
        {"prompt": "The film was", "chosen": " great", "rejected": " dull"},
    )
    assert [prompt.text for prompt in prompts] == [[USER], TURNS, "The film was"]
    prompts_of_pairs = {json.dumps(pair.prompt) for pair in load_pairs(f"{tmp_path}/p.jsonl")[0]}
    assert prompts_of_pairs == {json.dumps(prompt.text) for prompt in prompts}
    assert tiny_tokenizer.decode(prompts[0].tokens) == "<|endoftext|>[user]A film?[assistant]"
    assert prompts[0].tokens.count(tiny_tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(("limit", "kept"), [(0, "abcd"), (7, "abcd"), (6, "abd"), (5, "ab"), (3, "b")])
def test_long_prompts_are_left_out(tmp_path, tiny_tokenizer, monkeypatch, limit, kept):
    """A prompt of more characters, in all of its messages, is left out; 0 keeps all; too many tokens are a mistake."""
    monkeypatch.setattr(tiny_tokenizer, "chat_template", TEMPLATE)
    two = [{"role": "system", "content": "four"}, {"role": "user", "content": "on?"}]  # 7 in all
    last = [{"role": "user", "content": "sixsix"}]
    texts = {"a": "fünf!", "b": "tri", "c": two, "d": last}
    rows = [{"prompt": texts[name]} for name in "abc"] + [{"chosen": [*last, GOOD], "rejected": [*last, BAD]}]
    prompts = load_prompts(tmp_path / "p.jsonl", tiny_tokenizer, *rows, max_prompt_characters=limit)
    assert [prompt.text for prompt in prompts] == [texts[name] for name in kept]
    if limit == 0:
        with pytest.raises(UserError, match="line 3: a prompt of"):
            load_prompts(tmp_path / "p.jsonl", tiny_tokenizer, *rows, max_length=7)


@pytest.mark.parametrize("row, fragment", [
    ({"text": "I"}, "lower --prompt-tokens, or raise --max-prompt-characters"),
    ({"prompt": "a", "tools": [{"name": "f"}]}, "field 'tools' would not be read; --columns =tools"),
    ({"prompt": "Sum it up.", "text": "long"}, "field 'text' would not be read"),
    ({"prompt": [USER, GOOD]}, "it must be the user's"),
    ({"prompt": ["a"]}, "must be text or a list of messages"),
    ({"prompt": [USER, {"content": "no role"}]}, "no field 'role'; a message of 'prompt' needs it"),
    ({"title": "a"}, "line 1: no field 'text'; a prompt needs 'prompt' (--columns"),
    ({"chosen": "Q: a? A: b", "rejected": "Q: a? A: c"}, "no field 'text'; a transcript in 'chosen' ends in an answer"),
    ({"chosen": [USER, GOOD]}, "p.jsonl, line 1: no field 'rejected'"),
])  # fmt: skip
def test_bad_prompts_are_refused(tmp_path, tiny_tokenizer, row, fragment):
    """A row that is no prompt, or whose question would not be read, is refused with a sentence."""
    with pytest.raises(UserError, match=re.escape(fragment)):
        load_prompts(tmp_path / "p.jsonl", tiny_tokenizer, row)


def films(*numbers):
    return [Prompt([i], f"Film {i} was") for i in numbers]


def test_training_and_held_out_prompts_are_disjoint():
    """No text is in both parts, and none is lost; with a file of their own, none of the held-out ones is trained on."""
    training, held_out = split_prompts(films(*range(20)), [], 7)
    assert (len(training), len(held_out)) == (13, 7)
    assert sorted(training + held_out) == films(*range(20))
    others = [Prompt([9, 9], prompt.text) for prompt in films(*range(5, 20))]  # by text: tokens may be others
    training, held_out = split_prompts(films(*range(10)), others, 9)
    assert training == films(*range(10))
    assert {prompt.text for prompt in held_out} < {prompt.text for prompt in films(*range(10, 20))}


def test_held_out_prompts_depend_on_their_texts_alone():
    """Neither a seed nor the order of the file decides what is held out, so runs of two seeds can be compared."""
    _, first = split_prompts(films(*range(50)), [], 10)
    torch.manual_seed(1)
    assert split_prompts(films(*reversed(range(50))), [], 10)[1] == first
    assert split_prompts(films(*range(50)), [], 4)[1] == first[:4]
    assert sorted(first) not in (films(*range(10)), films(*range(40, 50)))


def test_too_few_prompts_to_hold_out():
    """At least one prompt must be left to train on."""
    with pytest.raises(UserError, match=r"^only 2 distinct prompts to hold some out .* 3 are needed"):
        split_prompts(films(1, 2), [], 2)
    with pytest.raises(UserError, match=r"^only 1 distinct prompts of --eval-prompts are not in --prompts; 2 are"):
        split_prompts(films(1, 2), films(2, 3), 2)
    assert [len(part) for part in split_prompts(films(1, 2), [], 1)] == [1, 1]


def batches(size, seed=0):
    return Batches(list(range(10)), size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 3, 10, 25])
def test_batches_visit_every_item_once_an_epoch(size):
    """In every epoch of N items each comes once, in an order of its own, whether or not the batch size divides N."""
    drawn = list(islice(batches(size), 20))
    items = [item for batch in drawn for item in batch]
    epochs = [items[start : start + 10] for start in range(0, len(items) - 9, 10)]
    assert [len(batch) for batch in drawn] == [size] * 20
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_order_is_a_function_of_the_seed_and_of_a_state():
    """Two seeds give two orders, and a stream that gets another's state goes on as that one does."""
    first, same, other = batches(4), batches(4), batches(4, seed=1)
    drawn = list(islice(first, 4))
    assert drawn == list(islice(same, 4))
    assert drawn != list(islice(other, 4))
    other.load_state_dict(first.state_dict())
    assert list(islice(first, 5)) == list(islice(other, 5))


def test_pad_by_hand():
    """The mask is True on the tokens that are real, also where one of them is the pad token's id."""
    tokens, mask = pad([[5, 9], [7]], 9, "cpu")
    assert tokens.tolist() == [[5, 9], [7, 9]] and mask.tolist() == [[True, True], [True, False]]
    tokens, mask = pad([[5, 9], [7]], 9, "cpu", side="left")
    assert tokens.tolist() == [[5, 9], [9, 7]] and mask.tolist() == [[True, True], [False, True]]


def test_rows_of_similar_length_go_together():
    """A group ends where it would pad 128 tokens: (100 − 40) · 3 ≥ 128, but (40 − 10) · 2 < 128; a GPU has one."""
    rows = [[0] * length for length in (10, 100, 40, 10)]
    assert group_by_length(rows, torch.device("cpu")) == [[1], [2, 0, 3]]
    assert group_by_length(rows, torch.device("cuda")) == [[0, 1, 2, 3]]


# What is read, and what is held out


def test_columns_rename_and_leave_out(tmp_path):
    """new=old renames a field in every row, =old leaves it out; what is not there, or is there twice, is refused."""
    source, row = f"{tmp_path}/p.jsonl", {"question": "A film?", "chosen": "a", "rejected": "b"}
    write_jsonl(source, [row | {"why": "one two three four five six"}] * 2)
    assert load_pairs(source, columns=["prompt=question", "=why"])[0] == [Pair("A film?", "a", "b")] * 2
    message = r"line 1: --columns: no field 'body'; found question, .* \(2 of 2 rows are wrong"
    with pytest.raises(UserError, match=message):
        load_pairs(source, columns=["prompt=body"])
    for columns in (["prompt"], ["prompt=question", "prompt=why"], ["=why", "x=why"]):
        with pytest.raises(UserError, match="write new=old or =old, and each name once"):
            load_pairs(source, columns=columns)
    with pytest.raises(UserError, match="there is a field 'chosen' already"):
        load_pairs(source, columns=["chosen=why"])


def test_copies_are_left_out():
    """A pair counts once, and the opposite vote is another one; what is among the others does not count."""
    pairs = [Pair("p", "a", "b"), Pair("p", "b", "a"), Pair("q", "a", "b"), Pair("p", "a", "c"), Pair("p", "a", "b")]
    assert distinct(pairs) == pairs[:4]
    assert distinct(pairs, [Pair("p", "a", "c"), Pair("q", "a", "b")]) == pairs[:2]


@pytest.mark.parametrize("kind", ["prompts", "transcripts"])
def test_no_question_is_on_both_sides(kind):
    """All pairs of a prompt, or of transcripts that begin alike, are held out together, whatever their order."""
    begin = lambda i: f"Human: what do you think of film {i // 3:02d}? Assistant:"
    pairs = [Pair(begin(i), f"good {i}", f"bad {i}") for i in range(60)]
    if kind == "transcripts":
        begins = [f"{begin(i)} {i % 2 * 'It is '}" for i in range(60)]
        pairs = [Pair("", f"{start}good {i}", f"{start}bad") for i, start in enumerate(begins)]
    train, held_out = split_pairs(pairs, 0.27)  # 17 of 60, which come in threes
    assert {*train}.isdisjoint(held_out) and len(train) + len(held_out) == 60 and len(held_out) == 18
    assert {pair.question for pair in train}.isdisjoint(pair.question for pair in held_out)
    assert {*split_pairs(pairs[::-1], 0.27)[1]} == {*held_out}


@pytest.mark.parametrize("name, text", [
    ("a.json", '[{"text": "one"}, {"text": "two"}]'), ("b.json", '[\n {"text": "one"},\n {"text": "two"}\n]'),
    ("c.csv", "text,label\none,1\ntwo,0\n"),
])  # fmt: skip
def test_other_files_go_through_datasets(tmp_path, monkeypatch, name, text):
    """Arrays of JSON and CSV are read where `datasets` is installed; else the extra is named."""
    (tmp_path / name).write_text(text)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UserError, match=rf"a \.{name[2:]} file needs pip install 'rlhf_min\[data\]'"):
            read_texts(f"{tmp_path}/{name}")
    pytest.importorskip("datasets")
    assert read_texts(f"{tmp_path}/{name}") == ["one", "two"]


def test_messages_without_a_chat_template(tiny_tokenizer, monkeypatch, capsys):
    """They are written as plain lines, EOS behind an answer, which is said once; BERT gets its [CLS] and [SEP]."""
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    read = lambda *args: tiny_tokenizer.decode(encode_answer(tiny_tokenizer, *args))
    assert read([SYSTEM, USER], "Great.") == "system: Be brief.\nuser: A film?\nassistant: Great.<|endoftext|>\n"
    assert read([USER], "Gre", False) == "user: A film?\nassistant: Gre"
    assert capsys.readouterr().err.count("no chat template") == 1
    monkeypatch.setattr(tiny_tokenizer, "_special_tokens_map", {"cls_token": "[C]", "sep_token": "[S]"})
    text = apply_chat_template(tiny_tokenizer, [USER])
    assert text == "[C]user: A film?\n[S]"
