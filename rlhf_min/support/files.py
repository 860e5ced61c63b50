"""Files and folders that are complete or absent, even if the process is killed while it writes them."""

import contextlib
import json
import os
import shutil
from pathlib import Path

from .errors import UserError, first_line


def remove(path):
    """Delete a file or a folder, if there is one."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def whole(path):
    """`with whole(path) as new:` write the file or folder `new`, which then takes the place of `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    remove(new)
    try:
        yield new
        if path.is_dir():  # a folder cannot replace another in one go
            remove(path)
        os.replace(new, path)
    except BaseException:
        remove(new)
        raise


def lock(file):
    """Hold an open file until it is closed. UserError where another process holds it. Windows has no flock."""
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{file.name}: another process is writing this run; wait for it, or stop it") from None


def write_json(path, value):
    """Write a JSON value."""
    with whole(path) as new:
        new.write_text(json.dumps(value, indent=2) + "\n", encoding="ascii")


def read_json(path):
    """The object in a JSON file; UserError where there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} cannot be read: an object {{...}} is needed")
    return value
