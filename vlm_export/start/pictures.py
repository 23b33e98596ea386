"""The pictures that a recipe names as golden images: the user's own, as patterns relative to the recipe."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from vlm_export.errors import InputError
from vlm_export.paths import meant
from vlm_export.recipe import PHOTOGRAPHS

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_FEWEST = 2


@dataclass(frozen=True)
class Pictures:
    """`patterns` are what a recipe says, `count` how many pictures that is; 0 are the bundled photographs."""

    patterns: tuple[str, ...]
    count: int = 0


def pictures(named: Sequence[Path], beside: Path) -> Pictures:
    """The pictures that a user named, files or folders, as a recipe in the folder `beside` has to name them.

    Raises:
        InputError: there is no such file or folder, one is no picture, or there are fewer than golden outputs need.
    """
    if not named:
        return Pictures((PHOTOGRAPHS,))
    files = [file for path in named for file in _files(path)]
    if len(files) < _FEWEST:
        raise InputError(
            f"--images: {_FEWEST} pictures or more are needed; in {', '.join(map(str, named))}: {len(files)}"
        )
    for file in files:
        _check(file)
    return Pictures(tuple(pattern for path in named for pattern in _patterns(path, beside)), len(files))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix in _both_cases() and file.is_file())
    if not path.exists():
        close = meant(path)
        raise InputError(f"--images: no such file or folder: {path}" + (f"; did you mean {close}?" if close else ""))
    return [path]


def _patterns(path: Path, beside: Path) -> list[str]:
    relative = glob.escape(Path(os.path.relpath(path, beside)).as_posix())
    if not path.is_dir():
        return [relative]
    return [f"{relative}/*{suffix}" for suffix in sorted({file.suffix for file in _files(path)})]


def _both_cases() -> set[str]:
    return {case for suffix in _SUFFIXES for case in (suffix, suffix.upper())}


def _check(file: Path) -> None:
    try:
        with Image.open(file):
            pass  # its header is read
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"--images: {file}: no picture that can be opened") from error
