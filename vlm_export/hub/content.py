"""What is to be pushed: files of a folder or bytes, within what the Hub takes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path, PurePosixPath

from huggingface_hub.hf_api import RepoFile

from vlm_export.errors import InputError
from vlm_export.own_files import leads_out

Files = Mapping[str, Path | bytes]  # by path in the repo: a file, or what it holds
# Source: hub-docs, `docs/hub/storage-limits.md`.
MAX_FILE_BYTES = 500 * 10**9
MAX_ENTRIES = 10_000  # of a folder
# huggingface_hub refuses to commit anything in these.
FORBIDDEN_FOLDERS = (".git", ".cache")


def folder_files(folder: Path) -> dict[str, Path]:
    """The files of `folder` by their path in the repo. Raises InputError for what the Hub could not hold."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: build one to push first")
    files = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_symlink():
            _check_link(folder, relative)
        if path.is_file():
            files[relative.as_posix()] = path
        elif not path.is_dir():
            raise InputError(f"{folder}: {relative} is a pipe, a socket or a device: remove it from the folder")
        if path.name in FORBIDDEN_FOLDERS:
            raise InputError(f"{folder}: the Hub does not take {relative}: remove it from the folder")
    if not files:
        raise InputError(f"{folder} holds no files: build one to push first")
    return files


def check_limits(repo_id: str, files: Files) -> None:
    """Raises InputError for what is larger than the Hub takes."""
    for name, content in files.items():
        if (size := size_bytes(content)) > MAX_FILE_BYTES:
            limit = f"{MAX_FILE_BYTES / 1e9:.0f} GB"
            raise InputError(f"{repo_id}: {name} has {size / 1e9:,.0f} GB, and the Hub takes files up to {limit}")
    entries = {
        PurePosixPath(*parts[:end]) for name in files for parts in [name.split("/")] for end in range(1, len(parts) + 1)
    }
    folder, count = Counter(entry.parent.as_posix() for entry in entries).most_common(1)[0]
    if count > MAX_ENTRIES:
        raise InputError(f"{repo_id}: {folder} holds {count:,} files, and the Hub takes {MAX_ENTRIES:,} in a folder")


def size_bytes(content: Path | bytes) -> int:
    """The size of a file, or of bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def same_content(content: Path | bytes, remote: RepoFile) -> bool:
    """Whether a local file is the remote one: the Hub gives the sha256 of LFS files, else the git blob sha1."""
    size = size_bytes(content)
    if size != remote.size:
        return False
    with BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        if remote.lfs is not None:
            return hashlib.file_digest(file, "sha256").hexdigest() == remote.lfs.sha256
        return hashlib.file_digest(file, lambda: hashlib.sha1(b"blob %d\0" % size)).hexdigest() == remote.blob_id


def _check_link(folder: Path, relative: Path) -> None:
    if leads_out(folder, folder / relative):
        raise InputError(f"{folder}: {relative} is a link that leaves the folder: put the file itself there")
    if not (folder / relative).is_file():
        raise InputError(f"{folder}: {relative} is a link to no file: put the file or folder itself there")
