"""What a rule finds: where, what is wrong, and what to do about it, in a line each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

_LONGEST = 500  # characters of a line


class Severity(Enum):
    """An error: a client fails, or says something else than the model. A warning: in some place, or at a cost."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a repo.

    Attributes:
        file: by its path in the repo.
        fix: what to do, as an imperative.
    """

    severity: Severity
    file: str
    problem: str
    fix: str


def error(file: str, problem: str, fix: str) -> Finding:
    """A finding for which `doctor` exits with 1."""
    return Finding(Severity.ERROR, _line(file), _line(problem), _line(fix))


def warning(file: str, problem: str, fix: str) -> Finding:
    """A finding for which it does not."""
    return Finding(Severity.WARNING, _line(file), _line(problem), _line(fix))


def _line(text: str) -> str:
    """A line that a terminal can show, whatever names and values a repo has."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…"
