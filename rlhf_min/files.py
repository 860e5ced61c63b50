"""Files and folders that are whole or not there at all, and JSON in them. No torch here."""

import contextlib
import json
import os
import shutil
from pathlib import Path

from .errors import UserError, first_line


def _sync(path):
    if path.is_file():
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
        return
    with contextlib.suppress(OSError):  # Windows, and some file systems, cannot do it for a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path):
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def whole(path):
    """`with whole(path) as new:` make the file or folder `new`; once it is complete and on the disk, it becomes `path`.

    A file that is killed or fails at any moment leaves the old one; so does a folder, until its last moment.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old.new")
    _remove(new)
    try:
        yield new
        for part in (new, *new.rglob("*")):
            _sync(part)
        if path.is_dir():  # a folder cannot be replaced in one go
            _remove(old)
            os.replace(path, old)
        os.replace(new, path)
        _sync(path.parent)
        _remove(old)
    except BaseException:
        _remove(new)
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise


def write_json(path, value):
    """Write a value that JSON has; ASCII, so that no reader can stumble."""
    with whole(path) as new:
        new.write_text(json.dumps(value, indent=2) + "\n", encoding="ascii")


def read_json(path):
    """The object in a JSON file; UserError where there is none."""
    try:
        if Path(path).is_fifo():
            raise ValueError("it is a pipe")
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("an object {...} is needed")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    return value
