"""What a rule finds: where, what is wrong, and what to do about it, in a line each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


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
    return Finding(Severity.ERROR, file, problem, fix)


def warning(file: str, problem: str, fix: str) -> Finding:
    """A finding for which it does not."""
    return Finding(Severity.WARNING, file, problem, fix)
