"""A mistake of the user's: exit code 2 and one line with the remedy. A defect of ours keeps its traceback."""

import functools
import sys


class UserError(Exception):
    """Something the user can mend; the message names the file, line or flag, and the remedy."""


def first_line(error):
    """What a library's exception says, in one line; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line_errors(main):
    """Decorate a script's ``main``: a UserError becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(2) from None

    return wrapper
