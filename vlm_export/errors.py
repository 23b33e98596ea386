"""The errors that a user can cause, and the exit status each one means.

A message is one line: which file, which key, what to do next. The command line prints it as it stands; only `--debug`
shows the traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


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
