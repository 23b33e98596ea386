"""Contract §1.3, §7: a graph is found by its name in onnx/ alone, and a dtype by its suffix."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.contract import SUFFIXES
from vlm_export.doctor.findings import Finding, warning
from vlm_export.doctor.repo_view import DEVICES, ONNX, RepoView, split_name


def check(repo: RepoView) -> Iterator[Finding]:
    """Find graphs that no client loads, and dtypes that only some graphs have."""
    if repo.client is None:
        return
    needed = list(repo.client.graphs)
    suffixes = ", ".join(suffix for suffix in SUFFIXES.values() if suffix)
    for file in repo.graph_files:
        component, _ = split_name(file)
        if not file.startswith(ONNX):
            yield warning(file, f"is not loaded: graphs lie in {ONNX}", f"move it to {ONNX}")
        elif component not in needed:
            problem = f"is not loaded: {repo.model_type} takes {', '.join(needed)}, alone or with {suffixes}"
            yield warning(file, problem, "rename it, or remove it")
    yield from _incomplete(repo, needed)


def _incomplete(repo: RepoView, needed: list[str]) -> Iterator[Finding]:
    for dtype, suffix in SUFFIXES.items():
        files = [f"{ONNX}{component}{suffix}.onnx" for component in needed]
        present = [file for file in files if repo.has(file)]
        absent = [file for file in files if not repo.has(file)]
        chosen = any(repo.named_dtype(split_name(file)[0], device) == dtype for file in present for device in DEVICES)
        if present and absent and not chosen:
            names = ", ".join(file.removeprefix(ONNX) for file in absent)
            yield warning(present[0], f"dtype {dtype!r} cannot be asked for: {names} missing", f"export {dtype} of all")
