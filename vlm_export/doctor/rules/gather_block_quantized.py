"""Contract §0.10, §11, §14.8: WASM, in the browser's default build, has no kernel for `GatherBlockQuantized`."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.doctor.findings import Finding, error, warning
from vlm_export.doctor.repo_view import RepoView


def check(repo: RepoView) -> Iterator[Finding]:
    """Find it: an error in what a browser takes by itself, a warning in what it can be told to take."""
    for graph in repo.graphs:
        if any(graph.nodes("GatherBlockQuantized")):
            by_default = "wasm" in repo.devices_of(graph.file)
            yield (error if by_default else warning)(
                graph.file,
                "has GatherBlockQuantized, for which a browser without WebGPU has no kernel: "
                + ("it takes this file by default" if by_default else f"it fails with dtype {graph.dtype!r}"),
                "look tables up as Gather on whole numbers, then Gather on scales, Cast and Mul",
            )
