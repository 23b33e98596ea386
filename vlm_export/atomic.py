"""Files and folders that appear whole or not at all, and what killed runs left of them.

What is made lies beside its place, under a hidden name, until it is moved there. One process at a time makes it: a lock
says whether whoever began it is alive, and what is under such a name without one is deleted by the next. A lock is a
file that the system unlocks when its holder ends, however that ends.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from vlm_export.errors import NO_ROOM, InputError, VlmExportError
from vlm_export.news import tell

_SCRATCH = "vlm-export-"
_RANDOM = "[a-z0-9_]{8}"  # what `tempfile` puts behind a prefix
_LOCK = ".lock"
_OF_DISK = {*NO_ROOM, errno.EIO}  # Python names no file of them
_NO_FOLDER = "is no folder, and one belongs there: move it away or delete it"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextmanager
def alone(lock: Path, what: Path, *, told: bool = True) -> Iterator[None]:
    """Within, no other process is in here with the same lock file; another one is waited for, which the user is told.

    Args:
        lock: a file, which is made with the folders above it, and is gone behind the block.
        what: what is worked on, for the line that is told.
        told: whether a line is told.

    Raises:
        OSError: there can be no such file.
    """
    folder = lock.parent
    if os.path.lexists(folder) and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, _NO_FOLDER, str(folder))
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    held = _lock(lock)
    try:
        with _named(what, lock):
            held.acquire(timeout=0)
    except Timeout:
        if told:
            tell(f"{what}: another vlm-export{_holder(lock)} is at work there: waiting for its end")
        held.acquire()
    try:
        with suppress(OSError):
            lock.write_text(str(os.getpid()), encoding="ascii")
        yield
    finally:
        _let_go(held, lock)
        with suppress(OSError):  # not empty
            for each in new:
                each.rmdir()


def _lock(path: Path) -> FileLock:
    return FileLock(path, thread_local=False, poll_interval=0.05)


def _let_go(held: FileLock, path: Path) -> None:
    with suppress(OSError):  # Windows deletes no open file
        path.unlink()
    held.release()


def _holder(lock: Path) -> str:
    try:
        return f", process {int(lock.read_text(encoding='ascii'))},"
    except (OSError, ValueError):
        return ""


def place_of(target: Path) -> Path:
    """Where a folder lies that is to be made or replaced: behind the link, where its name is one.

    Raises:
        InputError: something else is in its way, a link leads to a place that is not there, or a disk is mounted there.
    """
    if os.path.ismount(target):
        raise InputError(f"{target}: is where a disk is mounted, and cannot be replaced: mount it at a folder above")
    if not target.is_symlink():
        if target.exists() and not target.is_dir():
            raise InputError(f"{target}: {_NO_FOLDER}")
        return target
    place = Path(os.path.realpath(target))
    if place.is_symlink() or not place.parent.is_dir():
        raise InputError(f"{target}: is a link to {place}, which is not there: make that folder, or delete the link")
    if place.exists() and not place.is_dir():
        raise InputError(f"{target}: is a link to {place}, which is no folder: delete the link")
    return place_of(place)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the block ends well and vanishes when it does not.

    Where `target` is a link to a folder, that folder is replaced and the link stays. Errors of the block that name the
    new folder name the target instead.

    Raises:
        InputError: as of `place_of`.
    """
    place = place_of(target)
    with alone(_lock_of(place), target):
        _remove_left_overs(place)
        with _beside(place, target) as beside:
            yield beside
            _put(beside, place)


@contextmanager
def new_folder(target: Path) -> Iterator[Path | None]:
    """As `atomic_folder`, of a folder that is made once: None where another process made it meanwhile."""
    with alone(_lock_of(target), target):
        _remove_left_overs(target)
        if target.is_dir():
            yield None
            return
        with _beside(target, target) as beside:
            yield beside
            _put(beside, target)


@contextmanager
def changed_folder(target: Path) -> Iterator[Path]:
    """As `atomic_folder`, of a folder that holds what `target` holds.

    Its files are the same files, by hard links where the file system has them: they may be replaced and deleted, and
    not be written into.
    """
    with atomic_folder(target) as folder:
        if target.is_dir():
            _link_folder(target, folder)
        yield folder


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder for temporary files, which is gone behind the block. What killed runs left of such is deleted."""
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "no folder for temporary files can be written", "TMPDIR") from None
    _remove_dead_scratch(temporary)
    with _named(temporary):
        folder, held = _new_scratch()
        try:
            inner = folder / "files"
            inner.mkdir()
            yield inner
        finally:
            held.release()
            shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes, *, shared: bool = False) -> None:
    """Write a file, whole or not at all; `shared` says that other processes may write it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    with alone(_lock_of(path), path, told=False) if shared else nullcontext(), _named(path, beside):
        try:
            beside.write_bytes(content)
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


def remove_left_overs(target: Path) -> None:
    """Delete what killed runs left beside a folder, unless one is alive that makes it. One that was moved away to make
    place, and whose place is still empty, is moved back."""
    place = Path(os.path.realpath(target))
    lock = _lock_of(place)
    if not place.parent.is_dir() or not (lock.exists() or any(_left_overs(place))):
        return
    held = _lock(lock)
    with suppress(Timeout):
        held.acquire(timeout=0)
        try:
            _remove_left_overs(place)
        finally:
            _let_go(held, lock)


def _remove_left_overs(place: Path) -> None:
    previous = _previous(place)
    if previous.is_dir() and not previous.is_symlink() and not os.path.lexists(place):
        previous.rename(place)
    for path in _left_overs(place):
        _delete(path)


def _left_overs(place: Path) -> list[Path]:
    """What atomic folders leave beside theirs when they are killed."""
    made = re.compile(rf"\.{re.escape(place.name)}-{_RANDOM}")  # `previous` has eight letters too
    return [path for path in place.parent.iterdir() if made.fullmatch(path.name)]


def _previous(place: Path) -> Path:
    return place.with_name(f".{place.name}-previous")


def _lock_of(place: Path) -> Path:
    return place.with_name(f".{place.name}{_LOCK}")


def _delete(path: Path) -> None:
    """A folder and all in it, a file, or a link and not what it leads to, as far as it may be deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def _beside(place: Path, target: Path) -> Iterator[Path]:
    with _named(target, place.parent):
        beside = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        with _named(target, beside):
            beside.chmod(0o755)
            yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _put(beside: Path, place: Path) -> None:
    """Move a folder to its place, and delete what was there: at no moment there is neither, where the system can."""
    if not place.exists():
        beside.rename(place)
    elif _exchange(beside, place):
        _delete(beside)
    else:
        previous = _previous(place)
        place.rename(previous)
        beside.rename(place)
        _delete(previous)


def _exchange(one: Path, other: Path) -> bool:
    """Give two folders each other's name in one step; False where the system or the file system has no such step."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and not rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)


def _link_folder(source: Path, target: Path) -> None:
    """All that a folder holds in another one that is there, links as links.

    `shutil.copytree` goes on where one file fails, and then raises a list of texts: of a full disk one for each file.

    Raises:
        OSError: the first that the system raises.
    """
    for each in source.iterdir():
        place = target / each.name
        if each.is_dir() and not each.is_symlink():
            place.mkdir()
            _link_folder(each, place)
        else:
            _link(each, place)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system without such links
        shutil.copy2(source, target, follow_symlinks=False)


def _new_scratch() -> tuple[Path, FileLock]:
    """A folder with a lock in it, which says that it is in use. One without a lock yet may be deleted by another."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_SCRATCH))
        held = _lock(folder / _LOCK)
        with suppress(Timeout, FileNotFoundError):
            held.acquire(timeout=0)
            if folder.is_dir():
                return folder, held


def _remove_dead_scratch(temporary: Path) -> None:
    for folder in temporary.glob(f"{_SCRATCH}*"):
        with suppress(OSError, Timeout):  # somebody else's, or in use
            if not folder.is_symlink() and _is_ours(folder) and (folder / _LOCK).is_file():
                held = _lock(folder / _LOCK)
                held.acquire(timeout=0)
                shutil.rmtree(folder, ignore_errors=True)
                held.release()
                shutil.rmtree(folder, ignore_errors=True)  # Windows deletes no open file


def _is_ours(folder: Path) -> bool:
    return not hasattr(os, "geteuid") or folder.stat().st_uid == os.geteuid()


@contextmanager
def _named(target: Path, beside: Path | None = None) -> Iterator[None]:
    """Within, errors are about `target`, where they are about `beside` or a full disk and no file."""
    try:
        yield
    except OSError as error:
        if error.filename2 is not None and error.errno in NO_ROOM:  # of a copy what is copied to
            error.filename, error.filename2 = error.filename2, None
        named = str(error.filename or "")
        if not named and error.errno in _OF_DISK:
            error.filename = str(target)
        elif beside is not None and named.startswith(str(beside)):
            error.filename = str(target) + named.removeprefix(str(beside))
            error.filename2 = None
        raise
    except VlmExportError as error:
        if beside is not None and str(beside) in str(error):
            raise type(error)(str(error).replace(str(beside), str(target))) from error
        raise
