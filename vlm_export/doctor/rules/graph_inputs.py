"""Contract §0.3, §2, §5, §14.1: a graph takes what the client can feed, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.doctor.findings import Finding, error
from vlm_export.doctor.repo_view import RepoView


def check(repo: RepoView) -> Iterator[Finding]:
    """Find inputs that nobody feeds, and those that are needed and not there."""
    for graph, loaded in repo.loaded():
        if loaded.inputs is None:
            continue
        own = [name for name in graph.inputs if not name.startswith("past_")]
        for name in own:
            if name not in loaded.inputs:
                yield error(
                    graph.file,
                    f"input {name!r} is none that transformers.js feeds ({', '.join(loaded.inputs)})",
                    "rename it, or compute it in the graph from what is fed",
                )
        for name in loaded.needed:
            if name not in own:
                yield error(graph.file, f"has no input {name!r}", "export it with that input")
