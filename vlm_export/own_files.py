"""The files of a folder that somebody else may have filled: a model's, an adapter's, a golden's.

Links inside the folder are as good as files. One that leads out of it would have a file of this machine read, and
published with the rest. A snapshot in the Hub's cache consists of links to blobs, which are its own. What is no file at
all, such as a pipe, would be waited for without end.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from vlm_export.errors import InputError
from vlm_export.files import sha256

_HUB_REPO = re.compile(r"(models|datasets|spaces)--.+")
_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")  # of several repos, in the `blobs` of the whole cache


def own_file(folder: Path, name: str) -> Path | None:
    """The file of that name, which may have folders in it; None where there is none.

    Raises:
        InputError: it is a link that leads out of the folder or to nothing, or is no file.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    if not path.exists():
        raise InputError(f"{path}: a link to no file: copy the file itself there")
    check_link(folder, path)
    if not path.is_file():
        kind = "folder" if path.is_dir() else "pipe, a socket or a device"
        raise InputError(f"{path}: is a {kind}: put a file there")
    return path


def unchanged_file(folder: Path, name: str, digest: str) -> Path | None:
    """The file as `own_file` finds it if it has that sha256; None where it has another.

    Raises:
        InputError: as of `own_file`.
    """
    path = own_file(folder, name)
    return path if path is not None and sha256(path) == digest else None


def check_files(folder: Path, patterns: Sequence[str]) -> None:
    """Raises InputError as `own_file` does, for any file of these names, which may be below a folder's name."""
    for pattern in patterns:
        place, _, names = pattern.rpartition("/")
        inner = folder / place
        check_link(folder, inner)
        for found in sorted(inner.iterdir()) if inner.is_dir() else ():
            if fnmatch(found.name, names):
                own_file(folder, found.relative_to(folder).as_posix())


def check_tree(folder: Path) -> None:
    """Raises InputError where anything below a folder is a link that leads out of it or to nothing, or is no file."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            own_file(folder, path.relative_to(folder).as_posix())


def check_link(folder: Path, path: Path) -> None:
    """Raises InputError if a path below a folder is, or goes through, a link that leads out of it."""
    for step in _steps(folder, path):
        if leads_out(folder, step):
            raise InputError(
                f"{step}: a link that leads out of {folder.resolve().name}: copy the {_kind(step)} itself there"
            )


def leads_out(folder: Path, path: Path) -> bool:
    """Whether a path below a folder ends outside it, and outside the blobs that belong to a snapshot of the Hub's."""
    root, target = (Path(os.path.realpath(one)) for one in (folder, path))
    if target.is_relative_to(root):
        return False
    repo = root.parent.parent
    if root.parent.name != "snapshots" or not _HUB_REPO.fullmatch(repo.name):
        return True
    if target.is_relative_to(repo / "blobs"):
        return False
    shared = repo.parent / "blobs"
    return not (target.is_relative_to(shared) and _SHARED_BLOB.fullmatch(target.relative_to(shared).as_posix()))


def _steps(folder: Path, path: Path) -> list[Path]:
    """The path up to each of its parts below the folder."""
    parts = path.relative_to(folder).parts
    return [folder.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)]


def _kind(path: Path) -> str:
    return "folder" if path.is_dir() else "file"
