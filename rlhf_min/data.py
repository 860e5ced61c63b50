"""Preference pairs, prompts and texts: what is read of a row, what is held out, and their token ids.

Formats are TRL's. A preference row is `prompt`/`chosen`/`rejected`, each a string or a list of messages
`{"role", "content"}`. Without `prompt`, chosen and rejected are whole texts or conversations. A labelled row is
`text`/`label` (1 good, 0 bad). A prompt row is `prompt`, or `text`, of which the first tokens are the prompt.
"""

import hashlib
import itertools
import json
import math
import sys
from collections import Counter
from typing import NamedTuple

from .support.errors import UserError, first_line
from .support.rows import check_all_is_read, check_messages, is_conversation, read_rows, text_of

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


# From rows


def _is_whole(row):
    """Whether chosen and rejected are whole conversations; a `prompt` of text repeats their beginning."""
    chosen = row.get("chosen")
    return is_conversation(chosen) and not isinstance(row.get("prompt"), list) and chosen[0]["role"] != "assistant"


def _answer(messages, key):
    """The text of the one assistant message that an answer consists of."""
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise ValueError(f"'{key}' must end in exactly one assistant message after the prompt")
    return messages[0]["content"]


def _prompt(prompt):
    if isinstance(prompt, list) and check_messages(prompt, "prompt")[-1]["role"] == "assistant":
        raise ValueError("the last message of 'prompt' is the assistant's; it must be the user's")
    return prompt if isinstance(prompt, list) else text_of({"prompt": prompt}, "prompt")


def pair_of_row(row):
    """The Pair of a row that is no labelled text."""
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ValueError(f"no field '{key}'; {PAIR_NEEDS}found {', '.join(row)}")
    check_all_is_read(row, ("prompt", "chosen", "rejected", "margin"), long_texts=True)
    prompt, chosen, rejected, margin = row.get("prompt", ""), row["chosen"], row["rejected"], row.get("margin")
    if margin is not None and not (type(margin) in (int, float) and abs(margin) < 1e38):
        raise ValueError(f"'margin' must be a finite number, but is {margin!r}")
    if not is_conversation(chosen):
        prompt = _prompt(prompt) if prompt != "" else ""
        return Pair(prompt, text_of(row, "chosen"), text_of(row, "rejected"), margin=margin)
    chosen, rejected = check_messages(chosen, "chosen"), check_messages(rejected, "rejected")
    if _is_whole(row):  # the prompt is the shared beginning of both conversations
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        if json.dumps(prompt)[1:-1] not in json.dumps(chosen[:shared]):
            raise ValueError("'prompt' is no part of the conversations in 'chosen' and 'rejected'; --columns =prompt")
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    elif isinstance(prompt, str):
        prompt = [{"role": "user", "content": text_of(row, "prompt")}]
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
            if key := next((name for name in row if name.lower() in VERDICTS), None):
                raise ValueError(f"field '{key}' would not be read; if 'chosen' is the better one, --columns ={key}")
            return pair_of_row(row)
        text = text_of(row, "text", PAIR_NEEDS)
        check_all_is_read(row, ("text", "label"))
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
    return read_rows(source, lambda row: text_of(row, "text"))


def load_prompts(source, tokenizer, options):
    """Prompts of a file, each once: a row's `prompt`, or the first `options.prompt_tokens` tokens of its `text`.

    In a row of whole conversations, `chosen` without its last message is the prompt. A `text` that is too short is left
    out, and so is a `prompt` of more than `options.max_prompt_characters`, if that is not 0. Every prompt must leave
    room for at least one token of `options.max_length`.
    """

    def parse(row):
        columns = {name: value for name, value in row.items() if name != "prompt"}
        if "prompt" not in row and not _is_whole(row):
            text = text_of(row, "text", PAIRS_ARE_NONE if "chosen" in row else PROMPT_NEEDS)
            check_all_is_read(row, ("text",))
            # cut for speed: tokens average far fewer than 32 characters; a BOS, where there is one, counts as a token
            tokens = tokenizer(text[: 32 * options.prompt_tokens])["input_ids"][: options.prompt_tokens]
            if len(tokens) < options.prompt_tokens:
                return None
            prompt = Prompt(tokens, tokenizer.decode(tokens, skip_special_tokens=True), columns)
        else:
            text = pair_of_row(row).prompt if _is_whole(row) else _prompt(row["prompt"])
            check_all_is_read(row, ("prompt", "chosen", "rejected"))
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
