"""What is kept between runs, how large it is, and what of it can be deleted: all that is is made again when needed.

Only what this package made is deleted, and told by its name and what lies in it: `VLM_EXPORT_CACHE` may name a folder
that holds other things.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_export import hub
from vlm_export.files import SKELETON, cache_folder, graph_cache_folder
from vlm_export.web import chromium, node_runtime

_NODE_HOME = re.compile(r"node-[0-9a-f]{16}")
_LOCK = "package-lock.json"


@dataclass(frozen=True)
class Cache:
    """A part of what is kept.

    Attributes:
        what: what it is, for the user.
        path: its file or folder.
        deleted: the files and folders that `clean` deletes; none of what is not this package's.
        instead: how what it does not delete can be.
    """

    what: str
    path: Path
    size_bytes: int
    deleted: tuple[Path, ...] = ()
    instead: str = ""


def caches() -> list[Cache]:
    """All that is kept, this package's first; nothing that is not there."""
    found = [_graphs(), *_node_homes(), *_others(), _of_the_hub()]
    return [cache for cache in found if cache is not None]


def clean(chosen: Sequence[Cache]) -> int:
    """Delete what of these can be deleted. Returns how many bytes that were."""
    for path in (path for cache in chosen for path in cache.deleted):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return sum(cache.size_bytes for cache in chosen if cache.deleted)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count nothing."""
    if path.is_symlink():
        return 0
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file() and not each.is_symlink())


def _graphs() -> Cache | None:
    folder = graph_cache_folder()
    files = tuple(sorted(folder.glob(f"*{SKELETON}"))) if folder.is_dir() else ()
    if not files:
        return None
    what = f"graphs that were traced: {len(files)} components"
    return Cache(what, folder, sum(map(size_of, files)), files)


def _node_homes() -> Iterator[Cache]:
    used = {node_runtime.home_of(): "transformers.js", node_runtime.home_of(chromium.SCRIPTS): "what drives Chromium"}
    for path in _below_the_cache():
        if _NODE_HOME.fullmatch(path.name) and (path / _LOCK).is_file() and not path.is_symlink():
            what = used.get(path, "packages of another version of vlm-export")
            yield Cache(f"npm: {what}", path, size_of(path), (path,))


def _others() -> Iterator[Cache]:
    """What lies in the cache folder and is not known here, such as downloads of the recipes that train something."""
    known = {graph_cache_folder(), *(cache.path for cache in _node_homes())}
    for path in _below_the_cache():
        if path not in known:
            yield Cache("other", path, size_of(path), instead="delete it by hand, if you know what it is")


def _below_the_cache() -> list[Path]:
    return sorted(cache_folder().iterdir()) if cache_folder().is_dir() else []


def _of_the_hub() -> Cache | None:
    folder = hub.cache_folder()
    if not folder.is_dir():
        return None
    return Cache("the Hub's downloads, of all programs", folder, size_of(folder), instead="`hf cache` manages it")
