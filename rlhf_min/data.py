"""Preference pairs, prompts and texts, from JSON Lines (plain or .gz) or a hub data set.

Formats are TRL's. A preference row is `prompt`/`chosen`/`rejected`, each a string or a list of messages
`{"role", "content"}`; without `prompt`, chosen and rejected are whole texts or conversations. A labelled row is
`text`/`label` (1 good, 0 bad). A prompt row is `prompt`, or `text`, of which the first tokens are the prompt.
"""

import gzip
import json
import zlib
from pathlib import Path
from typing import NamedTuple

from .errors import UserError, first_line
from .files import whole
from .sources import check_source


class Pair(NamedTuple):
    """Two answers to one prompt, the better one first. `prompt` is text or a list of messages; the answers are text."""

    prompt: str | list
    chosen: str
    rejected: str
    may_be_cut: bool = False  # for a labelled text, whose beginning may stand for it; not for an answer to a prompt
    margin: float | None = None  # by how much the chosen answer is better, where the data say so


class Prompt(NamedTuple):
    """What the policy continues: the token ids it sees, and the text or messages they stand for."""

    tokens: list[int]
    text: str | list


def read_rows(source):
    """Yield (where, row) for every line of a .jsonl or .jsonl.gz file, or of a hub data set `owner/name[:split]`.

    Lines end at the byte 0x0A alone: str.splitlines would also cut at U+0085 and U+2028, which reviews contain.
    """
    check_source(source)
    if not Path(source).is_file():
        yield from _hub_rows(source)
        return
    for where, line in _read_lines(source):
        try:
            row = json.loads(line, object_pairs_hook=_unambiguous)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({str(error)[:80]}); one object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: {type(row).__name__} where an object {{...}} belongs")
        yield where, row


def _unambiguous(pairs):
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key twice")
    return row


def _read_lines(source):
    """Yield (where, line) of the lines that are not blank, as bytes, which split at b"\\n" only."""
    empty = True
    try:
        with gzip.open(source, "rb") if source.endswith(".gz") else open(source, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{source}, line {number}", line
                    empty = False
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{source} cannot be read: {error}; is it a whole file?") from None
    if empty:
        raise UserError(f"{source}: the file is empty; it needs at least one line")


def _hub_rows(source):
    import datasets

    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the library raises a dozen kinds; all mean that the name or the split is wrong
        raise UserError(f"{name}: {first_line(error)}") from None
    for number, row in enumerate(rows, 1):
        yield f"{source}, row {number}", row


def write_jsonl(path, rows):
    """One JSON object a line; ASCII, so that no reader can cut a row at an exotic separator."""
    with whole(path) as new, open(new, "w", encoding="ascii", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _text(row, key, where):
    value = row.get(key)
    if not isinstance(value, str):
        found = "missing" if key not in row else type(value).__name__
        raise UserError(f"{where}: field '{key}' must be text, but is {found}")
    if not value.strip():
        raise UserError(f"{where}: field '{key}' is empty")
    _check_unicode(value, where)
    return value


def _check_unicode(value, where):
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise UserError(f"{where}: the text has half of a surrogate pair (\\ud800 to \\udfff); remove it") from None


def _is_conversation(value):
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _check_messages(messages, key, where):
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f"{where}: every message of '{key}' needs a 'role' and a 'content', both text")
        _check_unicode(message["role"] + message["content"], where)


def _answer(messages, key, where):
    """The text of the one assistant message that an answer consists of."""
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise UserError(f"{where}: '{key}' must end in exactly one assistant message after the prompt")
    return _text(messages[0], "content", f"{where}, '{key}'")


def _is_whole(row):
    """Whether chosen and rejected are whole conversations; a `prompt` that is no list only repeats their beginning."""
    chosen = row.get("chosen")
    return _is_conversation(chosen) and not isinstance(row.get("prompt"), list) and chosen[0]["role"] != "assistant"


def pair_of_row(where, row):
    """The Pair of a row of read_rows that is no labelled text."""
    for key in ("chosen", "rejected"):
        if key not in row:
            raise UserError(f"{where}: no field '{key}'; a pair needs 'chosen' and 'rejected', or 'text' and 'label'")
    prompt, chosen, rejected, margin = row.get("prompt", ""), row["chosen"], row["rejected"], row.get("margin")
    if margin is not None and (isinstance(margin, bool | str | list | dict) or not abs(margin) < 1e38):
        raise UserError(f"{where}: 'margin' must be a finite number, but is {margin!r}")
    if not _is_conversation(chosen):
        prompt = _text(row, "prompt", where) if prompt != "" else ""
        return Pair(prompt, _text(row, "chosen", where), _text(row, "rejected", where), margin=margin)
    if not _is_conversation(rejected):
        raise UserError(f"{where}: 'chosen' is a list of messages, so 'rejected' must be one, too")
    _check_messages(chosen, "chosen", where)
    _check_messages(rejected, "rejected", where)
    if _is_whole(row):  # the prompt is the shared beginning of both conversations
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    prompt = _prompt({"prompt": prompt}, where)
    return Pair(prompt, _answer(chosen, "chosen", where), _answer(rejected, "rejected", where), margin=margin)


def load_pairs(source, margin=False):
    """Preference pairs, or labelled texts paired by the WARP report's recipe: the i-th good with the i-th bad text.

    Returns the pairs and how many labelled texts found no partner. With `margin`, UserError for a row without one.
    """
    pairs, good, bad = [], [], []
    for where, row in read_rows(source):
        if margin and ("chosen" not in row or row.get("margin") is None):
            raise UserError(f"{where}: a pair with a field 'margin' is needed; add the field or leave out --margin")
        if "label" in row and "chosen" not in row:
            label = row["label"]
            if label not in (0, 1):
                raise UserError(f"{where}: 'label' must be 0 (bad) or 1 (good), but is {label!r}")
            (good if label else bad).append(_text(row, "text", where))
        else:
            pairs.append(pair_of_row(where, row))
    pairs += [Pair("", chosen, rejected, may_be_cut=True) for chosen, rejected in zip(good, bad)]
    if not pairs:
        raise UserError(f"{source}: no pair; labelled texts need both labels, 1 and 0")
    return pairs, abs(len(good) - len(bad))


def _prompt(row, where):
    prompt = row["prompt"]
    if not isinstance(prompt, list):
        return _text(row, "prompt", where)
    if not _is_conversation(prompt):
        raise UserError(f"{where}: 'prompt' must be text or a list of messages")
    _check_messages(prompt, "prompt", where)
    if prompt[-1]["role"] == "assistant":
        raise UserError(f"{where}: the last message of 'prompt' is the assistant's; it must be the user's")
    return prompt


def read_texts(source):
    """Yield texts: the field `text` of .jsonl rows, or the lines of a .txt file."""
    if not source.endswith(".txt"):
        for where, row in read_rows(source):
            yield _text(row, "text", where)
        return
    check_source(source)
    empty = True
    for where, line in _read_lines(source):
        try:
            text = line.decode("utf-8").removeprefix("\ufeff").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 ({error.reason}); convert the file") from None
        if text:  # more is blank in Unicode than in bytes
            yield text
            empty = False
    if empty:
        raise UserError(f"{source}: the file is empty; it needs at least one line")


def read_prompts(source, max_characters=0):
    """Yield (where, prompt, is_text): a row's prompt, whole, or the `text` whose first tokens are to be the prompt.

    In a row of whole conversations, `chosen` without its last message is the prompt. One that is longer than
    `max_characters` is left out, if that is not 0.
    """
    for where, row in read_rows(source):
        if "prompt" not in row and not _is_whole(row):
            yield where, _text(row, "text", where), True
            continue
        prompt = pair_of_row(where, row).prompt if _is_whole(row) else _prompt(row, where)
        length = len(prompt) if isinstance(prompt, str) else sum(len(message["content"]) for message in prompt)
        if not max_characters or length <= max_characters:
            yield where, prompt, False


def load_prompts(source, tokenizer, prompt_tokens, max_length, max_characters=0):
    """Prompts of a file, each once: as read_prompts has them, or the first `prompt_tokens` tokens of a `text`.

    A `text` shorter than that is left out. A prompt must leave room for at least one token of `max_length`. Without a
    tokenizer every row is kept whole and has no tokens.
    """
    rows = (prompt_of_row(*row, tokenizer, prompt_tokens, max_length) for row in read_prompts(source, max_characters))
    prompts = {}
    for prompt in filter(None, rows):
        prompts.setdefault(json.dumps(prompt.text), prompt)
    if not prompts:
        remedy = f", or raise --max-prompt-characters {max_characters}" if max_characters else ""
        raise UserError(f"{source}: no prompt has a length that is asked for; lower --prompt-tokens{remedy}")
    return list(prompts.values())


def prompt_of_row(where, text, is_text, tokenizer, prompt_tokens, max_length):
    """The Prompt of a row of read_prompts, None for a `text` that is too short."""
    if tokenizer is None:
        return Prompt([], text)
    if is_text:
        # cut for speed: tokens average far fewer than 32 characters; a BOS, where there is one, counts as a token
        tokens = tokenizer(text[: 32 * prompt_tokens])["input_ids"][:prompt_tokens]
        if len(tokens) < prompt_tokens:
            return None
        text = tokenizer.decode(tokens, skip_special_tokens=True)
    else:
        tokens = encode_prompt(tokenizer, text)
        if len(tokens) >= max_length:
            raise UserError(f"{where}: the prompt has {len(tokens)} tokens, --max-length is {max_length}; raise it")
    if not tokens:
        raise UserError(f"{where}: the prompt has no tokens")
    return Prompt(tokens, text)


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt; messages go through the chat template, which writes its special tokens itself."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = apply_chat_template(tokenizer, prompt, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def with_answer(prompt, answer):
    """The conversation that a judge reads."""
    return [*prompt, {"role": "assistant", "content": answer}]


def apply_chat_template(tokenizer, messages, **kwargs):
    """The conversation as one string; UserError where the tokenizer has no template or the template refuses."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template for messages; use data of plain text"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except Exception as error:  # templates are programs: they raise what they like
        raise UserError(f"{tokenizer.name_or_path}: its chat template refuses a conversation: {error}") from None


def encode_answer(tokenizer, prompt, completion, ended=True, max_length=None, keep="end"):
    """Token ids of prompt and answer as the judge reads them; the one place for training and scoring alike.

    Text is concatenated, and EOS appended where it is missing and the answer has ended; messages go through the judge's
    own chat template. Longer than `max_length` loses tokens of its beginning, so that the answer stays (`keep="end"`),
    or of its end (`keep="start"`), and then has not ended.
    """
    plain = isinstance(prompt, str)
    if plain:
        text = prompt + completion
    elif ended:
        text = apply_chat_template(tokenizer, with_answer(prompt, completion))
    else:
        text = apply_chat_template(tokenizer, prompt, add_generation_prompt=True) + completion
    ids = tokenizer(text, add_special_tokens=plain)["input_ids"]
    eos = tokenizer.eos_token_id
    if plain and ended and eos is not None and (not ids or ids[-1] != eos):
        ids = [*ids, eos]
    if max_length is None or len(ids) <= max_length:
        return ids
    first = [i for i in ids[:1] if i in (tokenizer.cls_token_id, tokenizer.bos_token_id)]  # [CLS] is what BERT pools
    last = [i for i in ids[-1:] if i == tokenizer.sep_token_id]
    inner = ids[len(first) : len(ids) - len(last)]
    room = max_length - len(first) - len(last)
    return first + (inner[-room:] if keep == "end" else inner[:room]) + last


def without(prompts, others):
    """The prompts whose text is not among the others'."""
    seen = {json.dumps(other.text) for other in others}
    return [prompt for prompt in prompts if json.dumps(prompt.text) not in seen]


def hold_out_of(prompts, eval_prompts, count):
    """The prompts of which `count` may be held out: those of `eval_prompts` that are not in `prompts`, too, or if there
    are none, `prompts`, of which one must stay for training."""
    candidates = without(eval_prompts, prompts) if eval_prompts else prompts
    if len(candidates) < count + (not eval_prompts):
        few = "of --eval-prompts are not in --prompts" if eval_prompts else "distinct prompts"
        raise UserError(
            f"{len(candidates)} {few}: too few to hold out {count}; lower --num-eval-prompts, 3 at least, or give more"
        )
    return candidates
