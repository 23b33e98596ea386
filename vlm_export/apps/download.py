"""An exported repo of the Hub's: all of its files but the graphs, and those in one dtype."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from vlm_export.runtime.drivers import graphs_of
from vlm_export.runtime.repo import ONNX, SUFFIXES, choose_dtype, open_repo

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_ALL_BUT_GRAPHS = ("*.json", "*.jinja")


def is_repo_id(reference: str) -> bool:
    """Whether it is written as an id of the Hub's, with its owner, and perhaps `@revision` behind it."""
    return _REPO_ID.fullmatch(reference) is not None


def download(repo_id: str, dtype: str | None = None) -> Path:
    """The folder of an exported repo of the Hub's, with its graphs of one dtype: `dtype`, or what a processor prefers.

    Raises:
        InputError: the Hub has no such repo, or the repo no such dtype.
    """
    from vlm_export import hub

    folder = hub.download(repo_id, allow_patterns=_ALL_BUT_GRAPHS)
    repo = open_repo(folder)
    components = graphs_of(repo.files)
    files = map(PurePosixPath, hub.list_files(repo_id, revision=folder.name))
    names = {path.name for path in files if path.parent.name == ONNX}
    suffix = SUFFIXES[choose_dtype(dtype, components, names, f"{repo_id}: {ONNX}", repo.failed)]
    graphs = [f"{ONNX}/{component}{suffix}.onnx*" for component in components]  # and their external data
    return hub.download(repo_id, revision=folder.name, allow_patterns=(*_ALL_BUT_GRAPHS, *graphs))
