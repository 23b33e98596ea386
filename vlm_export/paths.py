"""Paths that a user wrote: whether one can only be meant as a path, and what was meant by one that does not exist."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WINDOWS_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def expanded(path: str | Path) -> Path:
    """The path with a home folder in place of `~`; as it is where there is no such folder or user."""
    return Path(os.path.expanduser(path))


def home() -> Path | None:
    """The user's home folder; None of a user who has none, as in containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def is_no_id(reference: str) -> bool:
    """Whether a reference cannot be an id of the Hub, `org/name`."""
    return not REPO_ID.fullmatch(reference) or bool(_WINDOWS_DRIVE.match(reference))


def is_plainly_a_path(reference: str) -> bool:
    """Whether what was typed cannot be meant as `org/name` or `org/name@revision`, or is close to a folder."""
    if is_no_id(reference.partition("@")[0]):
        return True
    path = Path(reference)
    close = meant(path)
    return path.parent.is_dir() or (close is not None and len(close.parts) == len(path.parts))


def no_such_folder(reference: str, base: Path = Path()) -> str:
    """One line for the user on a path that does not exist."""
    close = meant(base / expanded(reference), folders=True)
    return f"no such folder: {reference}" + (f"; did you mean {close}?" if close else "")


def meant(path: Path, *, folders: bool = False) -> Path | None:
    """The path that exists and is most like one that does not, or the beginning of it; None where nothing is.

    With `folders` it is a folder.
    """
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    there = missing.parent.iterdir() if missing.parent.is_dir() else ()
    names = [each.name for each in there if each.is_dir() or not folders]
    close = difflib.get_close_matches(missing.name, names, n=1)
    if not close:
        return None
    found = missing.parent / close[0]
    whole = found / path.relative_to(missing)
    return whole if whole.exists() else found
