"""Copies what is finished to where fsspec writes by a URL, such as `s3://bucket/prefix`, or to a folder.

OUTPUT/sweep.json, .csv, index.html    the table
OUTPUT/CELL/LAYOUT/repo/, report/      as in the sweep's own folder; the repo where it passed every check
OUTPUT/CELL/LAYOUT/SHA256SUMS          of all of that, written last, so that nothing without it is whole
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from vlm_export.errors import InputError, VlmExportError, reason
from vlm_export.files import Work, sha256

SUMS = "SHA256SUMS"
_PROBE = ".vlm-export-probe"
_OF_BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}  # they have no folders, and make buckets where asked to


class Storage:
    """A place at a URL.

    Raises:
        InputError: fsspec knows no such file system, or the package that reads it is not installed.
    """

    def __init__(self, url: str):
        self.url = url
        protocol = urlsplit(url).scheme
        with self._asked("cannot be opened"):
            try:
                self._files, self._root = fsspec.url_to_fs(url)
            except ImportError as error:
                extra = " by `pip install 'vlm-export[s3]'`" if protocol in ("s3", "s3a") else ""
                raise InputError(f"{url}: fsspec needs a package for it, which goes in{extra}: {error}") from error
        self._has_folders = protocol not in _OF_BUCKETS

    def check(self) -> None:
        """Write a small file and delete it.

        Raises:
            InputError: that fails.
        """
        with self._asked("cannot be written"):
            self._write(self._path(_PROBE), b"")
            self._files.rm_file(self._path(_PROBE))

    def store(self, folder: Path, files: Iterable[str], place: str) -> list[str]:
        """Copy files, so that they are all that the place holds; nothing where it does already.

        Args:
            folder: what their names are relative to.
            files: their names.
            place: relative to the URL.

        Returns:
            those that were copied.

        Raises:
            InputError: something cannot be read or written there.
        """
        hashes = {name: sha256(folder / name) for name in sorted(files)}
        sums = "".join(f"{digest}  {name}\n" for name, digest in hashes.items()).encode()
        there = self._path(place)
        with self._asked("cannot be read"):
            held = self._held(there)
            known = self._files.cat_file(f"{there}/{SUMS}") if SUMS in held else b""
        sizes = {name: (folder / name).stat().st_size for name in hashes} | {SUMS: len(sums)}
        if known == sums and held == sizes:
            return []
        same = _digests(known)
        with self._asked("cannot be written"):
            if SUMS in held:
                self._files.rm_file(f"{there}/{SUMS}")
            sent = [name for name in hashes if same.get(name) != hashes[name] or held.get(name) != sizes[name]]
            for name in sent:
                self._write(f"{there}/{name}", folder / name)
            for name in held.keys() - sizes.keys():
                self._files.rm_file(f"{there}/{name}")
            self._write(f"{there}/{SUMS}", sums)
            held = self._held(there)
        if held != sizes:
            wrong = sorted(name for name in held.keys() | sizes.keys() if held.get(name) != sizes.get(name))
            raise InputError(f"{self.url}/{place}: holds something else than was written: {', '.join(wrong[:3])}")
        return sent

    def put(self, file: Path) -> None:
        """Copy one file to the top.

        Raises:
            InputError: that fails.
        """
        with self._asked("cannot be written"):
            self._write(self._path(file.name), file)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _held(self, there: str) -> Mapping[str, int]:
        """By name relative to a folder there, the sizes of the files in it."""
        self._files.invalidate_cache()
        try:
            found = self._files.find(there, detail=True)
        except FileNotFoundError:
            return {}
        return {path.removeprefix(there).lstrip("/"): facts["size"] for path, facts in found.items()}

    def _write(self, path: str, content: Path | bytes) -> None:
        if self._has_folders:
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        if isinstance(content, bytes):
            self._files.pipe_file(path, content)
        else:
            self._files.put_file(str(content), path)

    @contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        """Within, whatever a file system raises becomes an InputError: each raises what its library does."""
        try:
            yield
        except VlmExportError:
            raise
        except Exception as error:
            raise InputError(f"{self.url}: {what}: {reason(error)}") from error


def _digests(sums: bytes) -> dict[str, str]:
    """By name the digests of a `SHA256SUMS`."""
    lines = [line.partition("  ") for line in sums.decode(errors="replace").splitlines()]
    return {name: digest for digest, _, name in lines}


def files_of(work: Work, passed: bool) -> list[str]:
    """What is kept of a work folder, relative to it: its report, and the repo that passed."""
    folders = [work.report, *([work.repo] if passed else [])]
    found = [path for folder in folders if folder.is_dir() for path in folder.rglob("*") if path.is_file()]
    return [path.relative_to(work.root).as_posix() for path in found]
