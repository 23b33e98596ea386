"""The work folder of a recipe, the cache folder, and the JSON, texts and hashes of what is in them."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_export.atomic import alone, changed_folder, remove_left_overs, write_text
from vlm_export.errors import InputError
from vlm_export.news import tell
from vlm_export.paths import home

SKELETON = ".structure"  # how the name of a kept skeleton ends
DEEPEST = 100  # levels of JSON: a config has five
LARGEST_TEXT_BYTES = 200_000_000  # a tokenizer.json of 256,000 tokens has 40 MB

MERGE_REPORT = "merge.json"
Digests = dict[tuple[str, int, int, int], str]  # by a file's path, inode, size and time of change
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
_DIGESTS: ContextVar[Digests | None] = ContextVar("digests", default=None)


@dataclass(frozen=True)
class Work:
    """`build/<recipe>/`: `merged/` the plain checkpoint, `repo/` exactly what is pushed, `report/` what was checked.

    While the last two are changed, `new_repo` and `new_report` are what they become.
    """

    root: Path
    new_repo: Path | None = None
    new_report: Path | None = None

    @property
    def merged(self) -> Path:
        """The folder of the plain checkpoint that `merge` writes."""
        return self.root / "merged"

    @property
    def merge_report(self) -> Path:
        """What `merge` says of what it did, beside the checkpoint."""
        return self.merged / MERGE_REPORT

    @property
    def repo(self) -> Path:
        """The folder of the exported repo: exactly what is pushed."""
        return self.new_repo or self.root / "repo"

    @property
    def report(self) -> Path:
        """The folder of what was checked and measured."""
        return self.new_report or self.root / "report"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within, no other process works in this folder, and what killed ones left of its results is gone.

        Raises:
            InputError: something else is where the folder belongs.
        """
        with alone(self.root / ".lock", self.root):
            for folder in (self.merged, self.repo, self.report):
                remove_left_overs(folder)
            yield

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within, no other process works in this folder, as far as this one can see to it: where it may not write
        there, it cannot, and the user is told."""
        with ExitStack() as held:
            if self.root.is_dir():
                try:
                    held.enter_context(self.alone())
                except OSError as error:
                    if error.errno not in _UNWRITABLE:
                        raise
                    tell(f"{self.root}: may not be written, and so is not locked: let nothing change it meanwhile")
            yield

    @contextmanager
    def changing(self) -> Iterator[Work]:
        """The same work, in which files of `repo/` and `report/` may be replaced: all take effect behind the block, or
        none where it fails.

        Raises:
            InputError: as of `atomic.place_of`.
        """
        with changed_folder(self.root / "repo") as repo, changed_folder(self.root / "report") as report:
            yield replace(self, new_repo=repo, new_report=report)


def cache_folder() -> Path:
    """The folder of what is kept between runs: `$VLM_EXPORT_CACHE`, else `vlm-export` in the user's cache folder."""
    if own := os.environ.get("VLM_EXPORT_CACHE"):
        return Path(own).absolute()
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named).absolute() / "vlm-export"
    if (own_home := home()) is None:
        raise InputError("no home folder to keep a cache in: set HOME or VLM_EXPORT_CACHE to a folder")
    return own_home.absolute() / ".cache" / "vlm-export"


def graph_cache_folder() -> Path:
    """`$VLM_EXPORT_STRUCTURES`, else `structures` in the cache folder."""
    own = os.environ.get("VLM_EXPORT_STRUCTURES")
    return Path(own).absolute() if own else cache_folder() / "structures"


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, *, all_numbers: bool = False) -> dict[str, Any]:
    """A JSON object from a file.

    Python reads NaN and Infinity, which are no JSON; they are refused unless `all_numbers`, as our own reports need.

    Raises:
        InputError: it is missing, holds something else, is nested deeper than what is written of it could be, or is
            larger than any such file.
    """
    try:
        return json_object(text_of(path), str(path), all_numbers=all_numbers)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # not UTF-8, or no file
        raise InputError(f"{path}: not readable as JSON: {error}") from error


def json_object(text: str | bytes, source: str, *, all_numbers: bool = False) -> dict[str, Any]:
    """A JSON object from a text that `source` holds; raises as `read_json`."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise InputError(f"{source}: not readable as JSON: nested too deep") from error
    except ValueError as error:  # not JSON, or a number of more digits than Python converts
        raise InputError(f"{source}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{source}: holds a JSON {type(value).__name__}, not an object")
    _check_values(value, source, all_numbers)
    return value


def _check_values(value: dict[str, Any], source: str, all_numbers: bool) -> None:
    """Raises InputError for what Python can read and not copy or write, and for numbers that are none."""
    level: list[tuple[str, Any]] = [("", value)]
    for _ in range(DEEPEST):
        deeper = []
        for place, each in level:
            for key, inner in each.items() if isinstance(each, dict) else enumerate(each):
                if isinstance(inner, dict | list):
                    deeper.append((f"{place}{key}.", inner))
                elif isinstance(inner, float) and not (all_numbers or math.isfinite(inner)):
                    raise InputError(f"{source}: {place}{key}: is {inner}; it must be a finite number")
                for text in (key, inner):
                    if isinstance(text, str) and not _is_text(text):
                        raise InputError(f"{source}: {place}{key}: holds half of a surrogate pair, which is no text")
        if not deeper:
            return
        level = deeper
    raise InputError(f"{source}: not readable as JSON: nested too deep")


def _is_text(text: str) -> bool:
    """Whether it can be written: JSON can hold what is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def text_of(path: Path, most_bytes: int = LARGEST_TEXT_BYTES) -> str:
    """A file's text.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read, is larger than any such text, or is something else, such as a
            pipe, which is not waited for.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is no file")
    if (size := path.stat().st_size) > most_bytes:
        raise OSError(f"it has {size:,} bytes, and at most {most_bytes:,} are read")
    return path.read_text(encoding="utf-8")


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    known = _DIGESTS.get()
    if known is None:
        return _read_sha256(path)
    found = path.stat()
    key = (str(path.absolute()), found.st_ino, found.st_size, found.st_mtime_ns)
    if key not in known:
        known[key] = _read_sha256(path)
    return known[key]


def _read_sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def digests_kept(known: Digests) -> Iterator[None]:
    """Within, a file is read for its digest once, as long as its size, its time of change and its inode stay the same.

    `known` holds the digests: what one block filled may be given to the next.
    """
    token = _DIGESTS.set(known)
    try:
        yield
    finally:
        _DIGESTS.reset(token)


def file_hashes(repo: Path) -> dict[str, str]:
    """sha256 of every file below `repo`, by relative path."""
    files = sorted(path for path in repo.rglob("*") if path.is_file())
    return {path.relative_to(repo).as_posix(): sha256(path) for path in files}
