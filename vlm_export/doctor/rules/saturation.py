"""Contract §11, §12: integer products add up in 16 bits on x86 processors without VNNI, and saturate silently."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.doctor.findings import Finding, error
from vlm_export.doctor.repo_view import RepoView
from vlm_export.quantize.saturation import worst


def check(repo: RepoView) -> Iterator[Finding]:
    """Find graphs whose weights can do so."""
    for graph in repo.graphs:
        product = worst(graph.graph) if graph.has_weights else None
        if product is not None:
            yield error(graph.file, str(product), "quantize weights to unsigned numbers or to 7 bits, or keep floats")
