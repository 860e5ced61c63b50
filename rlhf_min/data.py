"""Preference pairs, prompts and texts: rows of a file, what is read of them, and their token ids.

Formats are TRL's. A preference row is `prompt`/`chosen`/`rejected`, each a string or a list of messages
`{"role", "content"}`. Without `prompt`, chosen and rejected are whole texts or conversations. A labelled row is
`text`/`label` (1 good, 0 bad). A prompt row is `prompt`, or `text`, of which the first tokens are the prompt.
"""

import gzip
import hashlib
import itertools
import json
import math
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants

from .support.errors import UserError, first_line
from .support.files import whole

LOADERS = {".json": "json", ".csv": "csv", ".parquet": "parquet"}  # what the library `datasets` reads
QUESTIONS = """prompt text instruction instructions question query problem input context premise system system_prompt
system_message conversations messages history dialogue tools passage document article body email post title human
user""".split()  # fields that may hold what an answer answers
VERDICTS = "label labels preference winner better better_response_id".split()  # which of two answers is the better one
PAIR_NEEDS = "a pair needs 'chosen' and 'rejected', or 'text' and 'label' (--columns chosen=FIELD names one); "
PROMPT_NEEDS = "a prompt needs 'prompt' (--columns prompt=FIELD names it), or 'text', whose first tokens it is; "
PAIRS_ARE_NONE = "a transcript in 'chosen' ends in an answer: write what comes before it into a field 'prompt'; "
# for a tokenizer without a chat template: a line a message, between the tokens that BERT reads, and EOS after an answer
PLAIN_TEMPLATE = """{{ cls_token or '' }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}\
{{ eos_token or '' if message['role'] == 'assistant' else '' }}{{ '\n' }}{% endfor %}\
{% if add_generation_prompt %}assistant: {% else %}{{ sep_token or '' }}{% endif %}"""


class Pair(NamedTuple):
    """Two answers to one prompt, the better one first. `prompt` is text or a list of messages; the answers are text."""

    prompt: str | list
    chosen: str
    rejected: str
    may_be_cut: bool = False  # for a labelled text, whose beginning may stand for it; not for an answer to a prompt
    margin: float | None = None  # by how much the chosen answer is better, where the data say so

    @property
    def identity(self):
        """The same for copies. Two people who disagree make two pairs."""
        return json.dumps([self.prompt, self.chosen, self.rejected])

    @property
    def question(self):
        """What both answers belong to: the prompt, else how both begin, else, for two texts, nothing but themselves."""
        same = itertools.takewhile(lambda letters: letters[0] == letters[1], zip(self.chosen, self.rejected))
        shared = "".join(letter for letter, _ in same)
        shared = shared[: max(shared.rfind(":"), shared.rfind("\n")) + 1] or shared  # up to "Assistant:"
        return self.prompt or (shared if len(shared) > 20 else sorted([self.chosen, self.rejected]))


class Prompt(NamedTuple):
    """What the policy continues: the token ids it sees, and the text or messages they stand for."""

    tokens: list[int]
    text: str | list
    columns: dict | None = None  # the row's other fields, for reward functions

    @property
    def identity(self):
        """The same for copies."""
        return json.dumps(self.text)


# Rows


def read_rows(source, parse=lambda row: row, columns=()):
    """[parse(row)] of every row that is not None: of a .jsonl or .jsonl.gz file, or of what `datasets` reads.

    columns: ["new=old"], other names for fields; without a new name the field is left out. Where parse raises
    ValueError, a row is wrong: UserError with the first one and their number.
    """
    names = dict(reversed(column.partition("=")[::2]) for column in columns)  # {old: new}
    new = [name for name in names.values() if name]
    if not all("=" in column for column in columns) or len(names) < len(columns) or len({*new}) < len(new):
        raise UserError(f"--columns {' '.join(columns)}: write new=old or =old, and each name once")
    parsed, wrong, count = [], [], 0
    for where, content in _contents(source):
        count += 1
        try:
            row = json.loads(content) if isinstance(content, bytes) else content
            if not isinstance(row, dict):
                raise ValueError(f"{type(row).__name__} where an object {{...}} belongs; one object a line")
            if absent := names.keys() - row.keys():
                raise ValueError(f"--columns: no field {min(absent)!r}; found {', '.join(row)}")
            if taken := {*names.values()} & row.keys() - names.keys():
                raise ValueError(f"--columns: there is a field {min(taken)!r} already; leave it out with ={min(taken)}")
            row = {names.get(name, name): value for name, value in row.items()}
            row.pop("", None)
            parsed.append(parse(row))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            wrong.append(f"{where}: not JSON ({str(error)[:80]}); one object a line")
        except ValueError as error:
            wrong.append(f"{where}: {error}")
    if wrong:
        raise UserError(wrong[0] + (f" ({len(wrong)} of {count} rows are wrong)" if len(wrong) > 1 else ""))
    if not count:
        raise UserError(f"{source}: the file is empty; it needs at least one line")
    return [row for row in parsed if row is not None]


def _contents(source):
    """Yield (where, a line as bytes or a row) of a file or a hub data set `owner/name[:split]`."""
    name, _, split = source.partition(":")
    path, loader = Path(source), LOADERS.get(Path(source).suffix)
    if path.is_file() and not loader:
        try:
            with gzip.open(source, "rb") if source.endswith(".gz") else open(source, "rb") as file:
                for number, line in enumerate(file, 1):  # as bytes: str.splitlines would cut at U+0085 and U+2028, too
                    if line.strip():
                        yield f"{source}, line {number}", line
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{source} cannot be read: {error}; is it a whole file?") from None
        return
    on_the_hub = name.count("/") == 1 and not source.startswith(("/", ".", "runs/")) and not path.exists()
    if not path.is_file() and (not on_the_hub or path.suffix in (*LOADERS, ".jsonl", ".gz", ".txt")):
        raise UserError(f"{source}: no such file; give a .jsonl or .jsonl.gz file or a hub data set owner/name")
    try:
        import datasets

        datasets.disable_progress_bars()
        if loader:
            rows = datasets.load_dataset(loader, data_files=source, split="train")
        else:
            if not constants.HF_HUB_OFFLINE:
                HfApi().dataset_info(name, timeout=5)  # load_dataset would retry for half a minute
            rows = datasets.load_dataset(name, split=split or "train")
    except ImportError:
        what = f"a {path.suffix} file needs" if loader else "no file, and a hub data set needs"
        raise UserError(f"{source}: {what} pip install 'rlhf_min[data]'; .jsonl needs nothing") from None
    except Exception as error:  # of a dozen kinds; all mean that the file, the name or the split is wrong
        raise UserError(f"{source} cannot be read as a data set: {first_line(error)}") from None
    for number, row in enumerate(rows, 1):
        yield f"{source}, row {number}", row


def write_jsonl(path, rows):
    """One JSON object a line; ASCII, so that no reader can cut a row at an exotic separator."""
    with whole(path) as new, open(new, "w", encoding="ascii", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _text(row, key, need=""):
    value = row.get(key)
    if key not in row:
        raise ValueError(f"no field '{key}'; {need}found {', '.join(row)}")
    if not isinstance(value, str):
        raise ValueError(f"field '{key}' must be text, but is {type(value).__name__}; found {', '.join(row)}")
    if not value.strip():
        raise ValueError(f"field '{key}' is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # JSON can spell it, no tokenizer takes it
        raise ValueError(f"field '{key}' has half of a surrogate pair (\\ud800 to \\udfff); remove it")
    return value


def _is_conversation(value):
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _is_whole(row):
    """Whether chosen and rejected are whole conversations; a `prompt` of text repeats their beginning."""
    chosen = row.get("chosen")
    return _is_conversation(chosen) and not isinstance(row.get("prompt"), list) and chosen[0]["role"] != "assistant"


def _messages(messages, key):
    if not _is_conversation(messages):
        raise ValueError(f"'{key}' must be text or a list of messages {{role, content}}, like the others")
    for message in messages:
        if isinstance(message, dict) and message.get("role") == "system" and message.get("content") == "":
            continue
        for part in ("role", "content"):
            _text(message if isinstance(message, dict) else {}, part, f"a message of '{key}' needs it; ")
    return messages


def _answer(messages, key):
    """The text of the one assistant message that an answer consists of."""
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise ValueError(f"'{key}' must end in exactly one assistant message after the prompt")
    return messages[0]["content"]


def _prompt(prompt):
    if isinstance(prompt, list) and _messages(prompt, "prompt")[-1]["role"] == "assistant":
        raise ValueError("the last message of 'prompt' is the assistant's; it must be the user's")
    return prompt if isinstance(prompt, list) else _text({"prompt": prompt}, "prompt")


def _words(value):
    """How many words the longest text in a JSON value has."""
    if isinstance(value, dict | list):
        return max(map(_words, value.values() if isinstance(value, dict) else value), default=0)
    return len(value.split()) if isinstance(value, str) else 0


def _check_all_is_read(row, used, long_texts=False):
    """ValueError for a field that may hold the question and is not read: one of QUESTIONS, and with `long_texts` any
    conversation and any text of more than five words. What repeats the text that is read is fine."""
    read = json.dumps([row.get(name) for name in used], default=str)
    for name, value in row.items():
        question = name.lower() in QUESTIONS and isinstance(value, str | list | dict)
        suspect = question or (long_texts and (_is_conversation(value) or _words(value) > 5))
        repeats = json.dumps(value.strip() if isinstance(value, str) else value, default=str)[1:-1] in read
        if name not in used and value and suspect and not repeats:
            fix = f"--columns ={name} leaves it out, if it is no part of the question; else write it into the prompt"
            fix = fix if "prompt" in row else f"--columns prompt={name} reads it as the prompt; {fix}"
            raise ValueError(f"field '{name}' would not be read; {fix}")


def pair_of_row(row):
    """The Pair of a row that is no labelled text."""
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ValueError(f"no field '{key}'; {PAIR_NEEDS}found {', '.join(row)}")
    _check_all_is_read(row, ("prompt", "chosen", "rejected", "margin"), long_texts=True)
    prompt, chosen, rejected, margin = row.get("prompt", ""), row["chosen"], row["rejected"], row.get("margin")
    if margin is not None and not (type(margin) in (int, float) and abs(margin) < 1e38):
        raise ValueError(f"'margin' must be a finite number, but is {margin!r}")
    if not _is_conversation(chosen):
        prompt = _prompt(prompt) if prompt != "" else ""
        return Pair(prompt, _text(row, "chosen"), _text(row, "rejected"), margin=margin)
    chosen, rejected = _messages(chosen, "chosen"), _messages(rejected, "rejected")
    if _is_whole(row):  # the prompt is the shared beginning of both conversations
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        if json.dumps(prompt)[1:-1] not in json.dumps(chosen[:shared]):
            raise ValueError("'prompt' is no part of the conversations in 'chosen' and 'rejected'; --columns =prompt")
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    elif isinstance(prompt, str):
        prompt = [{"role": "user", "content": _text(row, "prompt")}]
    return Pair(_prompt(prompt), _answer(chosen, "chosen"), _answer(rejected, "rejected"), margin=margin)


def load_pairs(source, margin=False, columns=()):
    """Preference pairs, or labelled texts paired by the WARP report's recipe: the i-th good with the i-th bad text.

    Returns the pairs and how many labelled texts found no partner. With `margin`, UserError for a row without one.
    """
    good, bad = [], []

    def parse(row):
        if margin and ("chosen" not in row or row.get("margin") is None):
            raise ValueError("a pair with a field 'margin' is needed; add the field or leave out --margin")
        if "label" not in row or "chosen" in row:
            if verdict := next((name for name in row if name.lower() in VERDICTS), None):
                raise ValueError(
                    f"field '{verdict}' would not be read; if 'chosen' is the better one, --columns ={verdict}"
                )
            return pair_of_row(row)
        text = _text(row, "text", PAIR_NEEDS)
        _check_all_is_read(row, ("text", "label"))
        if row["label"] not in (0, 1):
            raise ValueError(f"'label' must be 0 (bad) or 1 (good), but is {row['label']!r}")
        (good if row["label"] else bad).append(text)
        return None

    pairs = read_rows(source, parse, columns)
    pairs += [Pair("", chosen, rejected, may_be_cut=True) for chosen, rejected in zip(good, bad)]
    if not pairs:
        raise UserError(f"{source}: no pair; labelled texts need both labels, 1 and 0")
    return pairs, abs(len(good) - len(bad))


def distinct(items, others=()):
    """The pairs or prompts, each once, that are not among the others."""
    first = {item.identity: item for item in reversed(items)}
    seen = {other.identity for other in others}
    return [item for item in items if item is first[item.identity] and item.identity not in seen]


def split_pairs(pairs, fraction):
    """(training, held-out) pairs. All pairs of a question are on one side, and which one does not depend on a seed."""
    ordered = sorted(pairs, key=lambda pair: by_hash(pair.question))
    count = math.ceil(fraction * len(pairs))
    while 0 < count < len(pairs) and ordered[count].question == ordered[count - 1].question:
        count += 1
    return ordered[count:], ordered[:count]


def by_hash(text):
    """A key of sorting that is random and always the same."""
    return hashlib.sha256(json.dumps(text).encode()).digest()


def read_texts(source):
    """The field `text` of every row."""
    return read_rows(source, lambda row: _text(row, "text"))


def load_prompts(source, tokenizer, options):
    """Prompts of a file, each once: a row's `prompt`, or the first `options.prompt_tokens` tokens of its `text`.

    In a row of whole conversations, `chosen` without its last message is the prompt. A `text` that is too short is left
    out, and so is a `prompt` of more than `options.max_prompt_characters`, if that is not 0. Every prompt must leave
    room for at least one token of `options.max_length`.
    """

    def parse(row):
        columns = {name: value for name, value in row.items() if name != "prompt"}
        if "prompt" not in row and not _is_whole(row):
            text = _text(row, "text", PAIRS_ARE_NONE if "chosen" in row else PROMPT_NEEDS)
            _check_all_is_read(row, ("text",))
            # cut for speed: tokens average far fewer than 32 characters; a BOS, where there is one, counts as a token
            tokens = tokenizer(text[: 32 * options.prompt_tokens])["input_ids"][: options.prompt_tokens]
            if len(tokens) < options.prompt_tokens:
                return None
            prompt = Prompt(tokens, tokenizer.decode(tokens, skip_special_tokens=True), columns)
        else:
            text = pair_of_row(row).prompt if _is_whole(row) else _prompt(row["prompt"])
            _check_all_is_read(row, ("prompt", "chosen", "rejected"))
            length = len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)
            if 0 < options.max_prompt_characters < length:
                return None
            prompt = Prompt(encode_prompt(tokenizer, text), text, columns)
        if not 0 < len(prompt.tokens) < options.max_length:
            raise ValueError(f"a prompt of {len(prompt.tokens)} tokens; raise --max-length")
        return prompt

    prompts = read_rows(source, parse, options.columns)
    if not prompts:
        raise UserError(f"{source}: no prompt is left; lower --prompt-tokens, or raise --max-prompt-characters")
    return distinct(prompts)


def hold_out(prompts, count, which):
    """`count` of the prompts, whatever the seed: those whose text has the smallest hash. UserError for too few."""
    if len(prompts) < count:
        raise UserError(f"only {len(prompts)} distinct prompts {which}; {count} are needed")
    return sorted(prompts, key=lambda prompt: by_hash(prompt.text))[:count]


def split_prompts(prompts, eval_prompts, count):
    """(training, held-out) prompts, none in both: `count` of `eval_prompts` if there are any, else of `prompts`."""
    if eval_prompts:
        return prompts, hold_out(distinct(eval_prompts, prompts), count, "of --eval-prompts are not in --prompts")
    held_out = hold_out(prompts, count + 1, "to hold some out and train on another; lower --num-eval-prompts")[:count]
    return distinct(prompts, held_out), held_out


# Token ids


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt; messages go through the chat template, which writes its special tokens itself."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = apply_chat_template(tokenizer, prompt, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def apply_chat_template(tokenizer, messages, **kwargs):
    """The conversation as one string; UserError where the template refuses. Without one, PLAIN_TEMPLATE is taken."""
    name = tokenizer.name_or_path
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE  # and saves it with its model
        print(f"{name}: no chat template; messages are written as lines 'role: content'", file=sys.stderr)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except Exception as error:  # templates are programs: they raise what they like
        raise UserError(f"{name}: its chat template refuses a conversation: {first_line(error)}") from None


def encode_answer(tokenizer, prompt, completion, ended=True):
    """Token ids of prompt and answer as the judge reads them; the one place for training and scoring alike.

    Text is concatenated, and EOS appended where it is missing and the answer has ended. Messages go through the judge's
    own chat template.
    """
    plain = isinstance(prompt, str)
    if plain:
        text = prompt + completion
    elif ended:
        text = apply_chat_template(tokenizer, [*prompt, {"role": "assistant", "content": completion}])
    else:
        text = apply_chat_template(tokenizer, prompt, add_generation_prompt=True) + completion
    ids = tokenizer(text, add_special_tokens=plain)["input_ids"]
    eos = tokenizer.eos_token_id
    return [*ids, eos] if plain and ended and eos is not None and (not ids or ids[-1] != eos) else ids


def cut(tokenizer, ids, max_length, keep):
    """At most `max_length` of the ids: the `keep` "start" or "end" of them, between the tokens that BERT reads."""
    if len(ids) <= max_length:
        return ids
    first = [i for i in ids[:1] if i in (tokenizer.cls_token_id, tokenizer.bos_token_id)]  # [CLS] is what BERT pools
    last = [i for i in ids[-1:] if i == tokenizer.sep_token_id]
    inner = ids[len(first) : len(ids) - len(last)]
    room = max_length - len(first) - len(last)
    return first + (inner[-room:] if keep == "end" else inner[:room]) + last


def encode_pairs(pairs, tokenizer, max_length):
    """[(chosen ids, rejected ids, margin)] and a Counter of the pairs that were dropped, by reason."""
    rows, dropped = [], Counter()
    for pair in pairs:
        both = [encode_answer(tokenizer, pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
        if pair.may_be_cut:
            both = [cut(tokenizer, ids, max_length, keep="start") for ids in both]
        chosen, rejected = both
        if chosen == rejected:
            dropped["identical"] += 1
        elif max(len(chosen), len(rejected)) > max_length:
            dropped[f"longer than {max_length} tokens"] += 1
        else:
            rows.append((chosen, rejected, pair.margin))
    return rows, dropped
