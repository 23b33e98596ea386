"""Contract §7.1, §14.7: constants of shapes and axes lie in the graph's file, where shape inference needs them."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.doctor.findings import Finding, error
from vlm_export.doctor.repo_view import RepoView
from vlm_export.graph.graph_on_disk import external_tensors
from vlm_export.tensors.graph_message import SMALL_BYTES


def check(repo: RepoView) -> Iterator[Finding]:
    """Find small whole numbers outside the file: sessions fail with "Cannot parse data from external tensors"."""
    for graph in repo.graphs:
        tensors = external_tensors(graph.model, repo.path / graph.file)
        small = [str(one.name) for one in tensors if one.nbytes < SMALL_BYTES and one.dtype.is_integer()]
        if small:
            yield error(
                graph.file,
                f"{small[0]} and {len(small) - 1} more small constants lie outside the file"
                if len(small) > 1
                else f"{small[0]}, a small constant, lies outside the file",
                f"put only tensors of {SMALL_BYTES} bytes or more into external data",
            )
