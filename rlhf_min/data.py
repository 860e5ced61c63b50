"""Preference pairs, prompts and texts, from JSON Lines (plain or .gz) or a hub data set, and as token ids.

Formats are TRL's. A preference row is `prompt`/`chosen`/`rejected`, each a string or a list of messages
`{"role", "content"}`. Without `prompt`, chosen and rejected are whole texts or conversations. A labelled row is
`text`/`label` (1 good, 0 bad). A prompt row is `prompt`, or `text`, of which the first tokens are the prompt.
"""

import gzip
import hashlib
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import huggingface_hub

from .support.errors import UserError, first_line
from .support.files import whole


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


# Rows


def read_rows(source):
    """Yield (where, row) for every line of a .jsonl or .jsonl.gz file, or of a hub data set `owner/name[:split]`."""
    if not Path(source).is_file():
        yield from _hub_rows(source)
        return
    empty = True
    try:
        with gzip.open(source, "rb") if source.endswith(".gz") else open(source, "rb") as file:
            for number, line in enumerate(file, 1):  # as bytes: str.splitlines would cut at U+0085 and U+2028, too
                if line.strip():
                    yield f"{source}, line {number}", _row_of(line, f"{source}, line {number}")
                    empty = False
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{source} cannot be read: {error}; is it a whole file?") from None
    if empty:
        raise UserError(f"{source}: the file is empty; it needs at least one line")


def _row_of(line, where):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({str(error)[:80]}); one object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: {type(row).__name__} where an object {{...}} belongs")
    return row


def _hub_rows(source):
    name, _, split = source.partition(":")
    is_file = Path(source).exists() or Path(source).suffix in (".jsonl", ".gz", ".txt")
    if is_file or name.count("/") != 1 or source.startswith(("/", ".", "runs/")):
        raise UserError(f"{source}: no such file; give a .jsonl or .jsonl.gz file or a hub data set owner/name")
    try:
        import datasets

        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().dataset_info(name, timeout=5)  # load_dataset would retry for half a minute
        rows = datasets.load_dataset(name, split=split or "train")
    except ImportError:
        raise UserError(f"{source} is no file, and hub data sets need: pip install 'rlhf_min[data]'") from None
    except Exception as error:  # the library raises a dozen kinds; all mean that the name or the split is wrong
        raise UserError(f"{source}: no such file, and the hub says: {first_line(error)}") from None
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
        raise UserError(f"{where}: field '{key}' must be text, but is {found}; found {', '.join(row)}")
    if not value.strip():
        raise UserError(f"{where}: field '{key}' is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # JSON can spell it, no tokenizer takes it
        raise UserError(f"{where}: field '{key}' has half of a surrogate pair (\\ud800 to \\udfff); remove it")
    return value


def _is_conversation(value):
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _is_whole(row):
    """Whether chosen and rejected are whole conversations; a `prompt` of text repeats their beginning."""
    chosen = row.get("chosen")
    return _is_conversation(chosen) and not isinstance(row.get("prompt"), list) and chosen[0]["role"] != "assistant"


def _messages(messages, key, where):
    if not _is_conversation(messages):
        raise UserError(f"{where}: '{key}' must be text or a list of messages, like the others")
    for message in messages:
        for part in ("role", "content"):
            _text(message if isinstance(message, dict) else {}, part, f"{where}, a message of '{key}'")
    return messages


def _answer(messages, key, where):
    """The text of the one assistant message that an answer consists of."""
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise UserError(f"{where}: '{key}' must end in exactly one assistant message after the prompt")
    return messages[0]["content"]


def _prompt(prompt, where):
    if isinstance(prompt, list) and _messages(prompt, "prompt", where)[-1]["role"] == "assistant":
        raise UserError(f"{where}: the last message of 'prompt' is the assistant's; it must be the user's")
    return prompt if isinstance(prompt, list) else _text({"prompt": prompt}, "prompt", where)


def pair_of_row(where, row):
    """The Pair of a row of read_rows that is no labelled text."""
    for key in ("chosen", "rejected"):
        if key not in row:
            need = "a pair needs 'chosen' and 'rejected', or 'text' and 'label'"
            raise UserError(f"{where}: no field '{key}'; {need}; found {', '.join(row)}")
    prompt, chosen, rejected, margin = row.get("prompt", ""), row["chosen"], row["rejected"], row.get("margin")
    if margin is not None and not (isinstance(margin, int | float) and abs(margin) < 1e38):
        raise UserError(f"{where}: 'margin' must be a finite number, but is {margin!r}")
    if not _is_conversation(chosen):
        prompt = _prompt(prompt, where) if prompt != "" else ""
        return Pair(prompt, _text(row, "chosen", where), _text(row, "rejected", where), margin=margin)
    chosen, rejected = _messages(chosen, "chosen", where), _messages(rejected, "rejected", where)
    if _is_whole(row):  # the prompt is the shared beginning of both conversations
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    answers = _answer(chosen, "chosen", where), _answer(rejected, "rejected", where)
    return Pair(_prompt(prompt, where), *answers, margin=margin)


def load_pairs(source, margin=False):
    """Preference pairs, or labelled texts paired by the WARP report's recipe: the i-th good with the i-th bad text.

    Returns the pairs and how many labelled texts found no partner. With `margin`, UserError for a row without one.
    """
    pairs, good, bad = [], [], []
    for where, row in read_rows(source):
        if margin and ("chosen" not in row or row.get("margin") is None):
            raise UserError(f"{where}: a pair with a field 'margin' is needed; add the field or leave out --margin")
        if "label" in row and "chosen" not in row:
            if row["label"] not in (0, 1):
                raise UserError(f"{where}: 'label' must be 0 (bad) or 1 (good), but is {row['label']!r}")
            (good if row["label"] else bad).append(_text(row, "text", where))
        else:
            pairs.append(pair_of_row(where, row))
    pairs += [Pair("", chosen, rejected, may_be_cut=True) for chosen, rejected in zip(good, bad)]
    if not pairs:
        raise UserError(f"{source}: no pair; labelled texts need both labels, 1 and 0")
    return pairs, abs(len(good) - len(bad))


def read_texts(source):
    """Yield the field `text` of every row."""
    for where, row in read_rows(source):
        yield _text(row, "text", where)


def load_prompts(source, tokenizer, options):
    """Prompts of a file, each once: a row's `prompt`, or the first `options.prompt_tokens` tokens of its `text`.

    In a row of whole conversations, `chosen` without its last message is the prompt. A `text` that is too short is left
    out, and so is a `prompt` of more than `options.max_prompt_characters`, if that is not 0. Every prompt must leave
    room for at least one token of `options.max_length`.
    """
    prompts = {}
    for where, row in read_rows(source):
        if "prompt" not in row and not _is_whole(row):
            prompt = _prompt_of_text(tokenizer, _text(row, "text", where), options.prompt_tokens)
        else:
            text = pair_of_row(where, row).prompt if _is_whole(row) else _prompt(row["prompt"], where)
            length = len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)
            fits = not options.max_prompt_characters or length <= options.max_prompt_characters
            prompt = Prompt(encode_prompt(tokenizer, text), text) if fits else None
        if prompt and not 0 < len(prompt.tokens) < options.max_length:
            raise UserError(f"{where}: a prompt of {len(prompt.tokens)} tokens; raise --max-length")
        if prompt:
            prompts.setdefault(json.dumps(prompt.text), prompt)
    if not prompts:
        raise UserError(f"{source}: no prompt is left; lower --prompt-tokens, or raise --max-prompt-characters")
    return list(prompts.values())


def _prompt_of_text(tokenizer, text, count):
    # cut for speed: tokens average far fewer than 32 characters; a BOS, where there is one, counts as a token
    tokens = tokenizer(text[: 32 * count])["input_ids"][:count]
    return Prompt(tokens, tokenizer.decode(tokens, skip_special_tokens=True)) if len(tokens) == count else None


def without(prompts, others):
    """The prompts whose text is not among the others'."""
    seen = {json.dumps(other.text) for other in others}
    return [prompt for prompt in prompts if json.dumps(prompt.text) not in seen]


def hold_out(prompts, count, which):
    """`count` of the prompts, whatever the seed: those whose text has the smallest hash. UserError for too few."""
    if len(prompts) < count:
        raise UserError(f"only {len(prompts)} distinct prompts {which}; {count} are needed")
    return sorted(prompts, key=lambda prompt: hashlib.sha256(json.dumps(prompt.text).encode()).digest())[:count]


def split_prompts(prompts, eval_prompts, count):
    """(training, held-out) prompts, none in both: `count` of `eval_prompts` if there are any, else of `prompts`."""
    if eval_prompts:
        return prompts, hold_out(without(eval_prompts, prompts), count, "of --eval-prompts are not in --prompts")
    held_out = hold_out(prompts, count + 1, "to hold some out and train on another; lower --num-eval-prompts")[:count]
    return without(prompts, held_out), held_out


# Token ids


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt; messages go through the chat template, which writes its special tokens itself."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = apply_chat_template(tokenizer, prompt, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def apply_chat_template(tokenizer, messages, **kwargs):
    """The conversation as one string; UserError where the tokenizer has no template or the template refuses."""
    name = tokenizer.name_or_path
    if tokenizer.chat_template is None:
        raise UserError(f"{name}: its tokenizer has no chat template for messages; use data of plain text")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except Exception as error:  # templates are programs: they raise what they like
        raise UserError(f"{name}: its chat template refuses a conversation: {first_line(error)}") from None


def encode_answer(tokenizer, prompt, completion, ended=True, max_length=None, keep="end"):
    """Token ids of prompt and answer as the judge reads them; the one place for training and scoring alike.

    Text is concatenated, and EOS appended where it is missing and the answer has ended. Messages go through the judge's
    own chat template. Longer than `max_length` loses tokens of its beginning, so that the answer stays (`keep="end"`),
    or of its end (`keep="start"`), and then has not ended.
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
    if plain and ended and eos is not None and (not ids or ids[-1] != eos):
        ids = [*ids, eos]
    if max_length is None or len(ids) <= max_length:
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
        limit = max_length if pair.may_be_cut else None
        chosen, rejected = (
            encode_answer(tokenizer, pair.prompt, answer, max_length=limit, keep="start")
            for answer in (pair.chosen, pair.rejected)
        )
        if chosen == rejected:
            dropped["identical"] += 1
        elif max(len(chosen), len(rejected)) > max_length:
            dropped[f"longer than {max_length} tokens"] += 1
        else:
            rows.append((chosen, rejected, pair.margin))
    return rows, dropped
