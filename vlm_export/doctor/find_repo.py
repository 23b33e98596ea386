"""The repo that a user named: a folder, or one of the Hub's, of which only what rules read is fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath

from vlm_export.doctor.repo_view import CONFIG, DOCUMENTS, ONNX, RepoView, open_repo
from vlm_export.errors import InputError
from vlm_export.files import Work
from vlm_export.paths import expanded, is_plainly_a_path, no_such_folder


def find_repo(reference: str, notify: Callable[[str], None]) -> RepoView:
    """The view of a folder, of the repo in a work folder, or of a repo of the Hub; `notify` hears what is fetched.

    Raises:
        InputError: there is no such folder or repo, or no config.json in it that can be read.
    """
    folder = expanded(reference)
    if folder.is_dir():
        inner = Work(folder).repo
        return open_repo(inner if not (folder / CONFIG).exists() and (inner / CONFIG).exists() else folder)
    if is_plainly_a_path(reference):
        raise InputError(f"{no_such_folder(reference)}; nor is it an id of the Hub (org/name)")
    return _fetch(reference, notify)


def _fetch(repo_id: str, notify: Callable[[str], None]) -> RepoView:
    from vlm_export import hub

    folder = hub.download(repo_id, allow_patterns=DOCUMENTS)
    listed = hub.list_files(repo_id, revision=folder.name)
    sizes = {path: size for path, size in listed.items() if PurePosixPath(path).parent.as_posix() in (".", ONNX[:-1])}
    graphs = [path for path in sizes if path.endswith(".onnx")]
    if graphs:
        megabytes = sum(sizes[path] for path in graphs) / 1e6
        notify(f"fetching {len(graphs)} graphs, {megabytes:,.0f} MB, but for those in the cache")
        folder = hub.download(repo_id, revision=folder.name, allow_patterns=graphs)
    return open_repo(folder, sizes)
