"""A mistake of the user is one line and exit code 2. A defect of ours keeps its traceback."""

import functools
import pydoc
import sys

FULL_OR_FORBIDDEN = "No space left|Disk quota|Read-only|Permission denied|File too large|Input/output error"


class UserError(Exception):
    """Something the user can mend. The message names the file, line or flag, and the remedy."""

    code = 2


class Stopped(UserError):
    """Ctrl-C or SIGTERM."""

    code = 130


def first_line(error):
    """The first line of an exception's message; its type where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def import_function(spec, remedy):
    """The function package.module.function; UserError where there is none."""
    sys.path.insert(0, "")  # a module in the working directory is found, too, as python -m does
    try:
        function = pydoc.locate(spec)
    except (pydoc.ErrorDuringImport, SystemExit) as error:  # what the module's own lines raise
        raise UserError(f"{spec} cannot be imported: {first_line(error)}") from None
    finally:
        sys.path.remove("")
    if not callable(function):
        raise UserError(f"{spec}: no such function; {remedy}")
    return function


def explain(error):
    """The UserError for a mistake of the user or a fault of the machine; None for a defect of ours."""
    text = first_line(error)
    if isinstance(error, UserError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Stopped("stopped")
    if type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "DefaultCPUAllocator" in text:
        return UserError("out of memory: lower --batch-size or --max-length, or take a smaller model")
    if "Connection closed by peer" in str(error) or type(error).__name__ in ("DistBackendError", "DistNetworkError"):
        return UserError("another process of this run has stopped; its own message says why")
    # torch.save and safetensors wrap the system's error in one of their own
    for cause in (error, error.__context__):
        if any(reason in str(cause) for reason in FULL_OR_FORBIDDEN.split("|")):
            return UserError(f"cannot write: {first_line(cause)}; free the disk, or name another --out")
    return None


def one_line_errors(main):
    """Decorate a script's `main`: what `explain` can explain becomes one line on stderr and an exit code."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal without θ must not end a run
        try:
            return main(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            known = explain(error)
            if known is None:
                raise
            line = " ".join(str(known).split())
            print(line if isinstance(known, Stopped) else f"error: {line[:600]}", file=sys.stderr)
            raise SystemExit(known.code) from None

    return wrapper
