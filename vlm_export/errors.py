"""The errors that a user can cause, and the exit status each one means.

A message is one line: which file, which key, what to do next. The command line prints it as it stands; only `--debug`
shows the traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
LONGEST_LINE = 299  # characters of what is printed of an error, with what stands in front of it
_SHOWN = 60  # characters of a value that is wrong
_REASON = 120  # of what a library says
_GAP = " … "


class VlmExportError(Exception):
    """Base of everything that the command line reports in one line."""

    exit_code = 1


class InputError(VlmExportError):
    """What the user gave is wrong: a recipe, a checkpoint, an option, a missing tool. Exit status 2."""

    exit_code = 2


class CheckFailed(VlmExportError):
    """The work was done and did not hold: a verification, a proof, a refused push. Exit status 1."""

    exit_code = 1


def all_of(problems: Sequence[str], shown: int = 5) -> str:
    """One line that lists what is wrong, cut after `shown`."""
    rest = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
    return "; ".join(problems[:shown]) + rest


def one_line(text: str, most: int = LONGEST_LINE) -> str:
    """A text without line ends and other characters that a terminal acts on; of a long one, the beginning and the end.

    Names come from files of others, and can hold anything.
    """
    line = "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in " ".join(text.split()))
    if len(line) <= most:
        return line
    end = (most - len(_GAP)) // 3
    return f"{line[: most - len(_GAP) - end]}{_GAP}{line[len(line) - end :]}"


def shown(value: Any, most: int = _SHOWN) -> str:
    """A wrong value as a message shows it: of a long one, the beginning and the end."""
    return one_line(value if isinstance(value, str) and len(value) > most * 10 else repr(value), most)


def reason(error: BaseException) -> str:
    """What an error of a library says, in few words; what kind it is, where that says more."""
    said = one_line(str(error), _REASON)
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    if isinstance(error, RecursionError):
        return "nested too deep, or without end"
    if isinstance(error, KeyError):
        return f"{said} is missing"
    cryptic = isinstance(error, AssertionError | ArithmeticError | LookupError | AttributeError) or not said
    return f"{type(error).__name__}: {said}".removesuffix(": ") if cryptic else said


def refused(error: OSError) -> str:
    """What the system refuses, and of which file: where a copy has no room, of the copy."""
    file = (error.filename2 if error.errno in NO_ROOM else None) or error.filename
    return f"{file or 'system'}: {error.strerror or error}"


@contextmanager
def blamed_on(what: str | Callable[[], str], remedy: str = "") -> Iterator[None]:
    """Within, what a library raises of values of others becomes an InputError about `what`, and says the remedy.

    Libraries raise what comes: a config with heads that do not divide is a ValueError, a ZeroDivisionError, an
    AssertionError or a RuntimeError, by the class that it is for. What the system refuses, such as a full disk, passes.

    Raises:
        InputError: instead of any other exception.
    """
    try:
        yield
    except VlmExportError:
        raise
    except BaseException as error:
        # What Rust panics of, in tokenizers, is no Exception in Python.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise
        subject = what if isinstance(what, str) else what()
        raise InputError(f"{subject}: {reason(error)}{remedy and f': {remedy}'}") from error
