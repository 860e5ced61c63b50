"""Rows of a file or of a hub data set, and the checks that nothing in them is misread or left unread."""

import gzip
import json
import zlib
from pathlib import Path

from huggingface_hub import HfApi, constants

from .errors import UserError, first_line
from .files import whole

LOADERS = {".json": "json", ".csv": "csv", ".parquet": "parquet"}  # what the library `datasets` reads
QUESTIONS = """prompt text instruction instructions question query problem input context premise system system_prompt
system_message conversations messages history dialogue tools passage document article body email post title human
user""".split()  # fields that may hold what an answer answers


def read_rows(source, parse=lambda row: row, columns=()):
    """What parse(row) gives, without None, for every row of a .jsonl or .jsonl.gz file, or of what `datasets` reads.

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


def text_of(row, key, need=""):
    """The text in a field; ValueError where there is none. `need` says what the field is for."""
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


def is_conversation(value):
    """Whether a value is a list of messages {role, content}, as far as its first one says."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def check_messages(messages, key):
    """The messages as they are; ValueError for one without a role or a content."""
    if not is_conversation(messages):
        raise ValueError(f"'{key}' must be text or a list of messages {{role, content}}, like the others")
    for message in messages:
        if isinstance(message, dict) and message.get("role") == "system" and message.get("content") == "":
            continue
        for part in ("role", "content"):
            text_of(message if isinstance(message, dict) else {}, part, f"a message of '{key}' needs it; ")
    return messages


def _words(value):
    """How many words the longest text in a JSON value has."""
    if isinstance(value, dict | list):
        return max(map(_words, value.values() if isinstance(value, dict) else value), default=0)
    return len(value.split()) if isinstance(value, str) else 0


def check_all_is_read(row, used, long_texts=False):
    """ValueError for a field that may hold the question and is not read: one of QUESTIONS, and with `long_texts` any
    conversation and any text of more than five words. What repeats the text that is read is fine."""
    read = json.dumps([row.get(name) for name in used], default=str)
    for name, value in row.items():
        question = name.lower() in QUESTIONS and isinstance(value, str | list | dict)
        suspect = question or (long_texts and (is_conversation(value) or _words(value) > 5))
        repeats = json.dumps(value.strip() if isinstance(value, str) else value, default=str)[1:-1] in read
        if name not in used and value and suspect and not repeats:
            fix = f"--columns ={name} leaves it out, if it is no part of the question; else write it into the prompt"
            fix = fix if "prompt" in row else f"--columns prompt={name} reads it as the prompt; {fix}"
            raise ValueError(f"field '{name}' would not be read; {fix}")
