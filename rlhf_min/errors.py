"""A mistake of the user's: exit code 2 and one line with the remedy. A defect of ours keeps its traceback."""

import errno
import functools
import os
import re
import signal
import sys

LOST = r"Connection (closed|reset) by (remote )?peer|gloo/transport"  # how gloo says that a process has gone
ENVIRONMENT = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM,
               errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}  # fmt: skip


class UserError(Exception):
    """Something the user can mend; the message names the file, line or flag, and the remedy."""

    code = 2


class Stopped(UserError):
    """Ctrl-C, or a signal to end."""

    code = 130


def world_size():
    """How many processes torchrun has started, 1 without it; WORLD_SIZE alone, as clusters set it, means nothing."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdigit() and "RANK" in os.environ else 1


def no_device(name):
    """The UserError for a device that is not there."""
    return UserError(f"--device {name} is not to be had on this machine; try --device cpu")


def first_line(error):
    """What a library's exception says, in one line; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def explain(error):
    """The UserError for what the machine is to blame for: interrupts, a full disk or memory; None for a defect."""
    text = first_line(error)
    if "inline_container" in text:  # torch.save hides what the file system said
        error = error.__context__
    if isinstance(error, UserError):
        return error
    if type(error).__name__ in ("DistBackendError", "DistNetworkError") or re.search(LOST, str(error)):
        return UserError("another process of this job has stopped, see its message")
    if isinstance(error, KeyboardInterrupt):
        return Stopped("stopped")
    if isinstance(error, BrokenPipeError):
        return Stopped("stopped: nobody reads the output any more")
    if type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "DefaultCPUAllocator" in text:
        return UserError("out of memory: lower --batch-size or --max-length, or take a smaller model")
    if isinstance(error, OSError) and error.errno in ENVIRONMENT:
        where = error.filename or "the folder of the run"
        return UserError(f"cannot use {where}: {error.strerror}; mend that, or name another file or --out")
    if type(error).__name__ == "SafetensorError" and "os error" in text:
        return UserError(f"cannot write the model: {text}; mend that, or name another --out")
    return None


def one_line_errors(main):
    """Decorate a script's ``main``: what `explain` has words for becomes one line on stderr and an exit code."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see refuse_mistakes
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal that has no θ shall not end a run
        try:
            return main(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            known = explain(error)
            if known is None:
                raise
            line = " ".join(str(known).split())
            if world_size() > 1:
                line = f"process {os.environ['RANK']}: {line}"
            if len(line) > 600:  # it quotes somebody's label of 5,000 characters
                line = f"{line[:300]} ... {line[-250:]}"
            print(line if isinstance(known, Stopped) else f"error: {line}", file=sys.stderr)
            if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would complain once more at its end
            raise SystemExit(known.code) from None

    return wrapper
