"""Contract §2, §5, §14.1: a graph gives what the client reads, under the name by which it does."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.doctor.findings import Finding, error
from vlm_export.doctor.repo_view import RepoView


def check(repo: RepoView) -> Iterator[Finding]:
    """Find outputs that are missing."""
    for graph, loaded in repo.loaded():
        for name in loaded.outputs:
            if name not in graph.outputs:
                have = ", ".join(one for one in graph.outputs if not one.startswith("present"))
                yield error(graph.file, f"has no output {name!r}, only {have or 'a cache'}", f"call it {name}")
