"""Contract §11, §14.8: neither processors nor WASM have a kernel for weights of one bit."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.doctor.findings import Finding, error
from vlm_export.doctor.repo_view import RepoView


def check(repo: RepoView) -> Iterator[Finding]:
    """Find `MatMulNBits` of one bit."""
    for graph in repo.graphs:
        if any(node.attributes.get_int("bits", 4) == 1 for node in graph.nodes("MatMulNBits")):
            problem = "has MatMulNBits of 1 bit, and kernels take 2, 4 or 8: sessions fail on processors and in WASM"
            yield error(graph.file, problem, "export q2 or q4 instead")
