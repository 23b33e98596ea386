"""Contract §2, §14.2: each entry of the cache comes out as `present…`, of the type in which it goes in again."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.doctor.findings import Finding, error
from vlm_export.doctor.repo_view import RepoView, dimensions


def check(repo: RepoView) -> Iterator[Finding]:
    """Find entries that do not come out, or as something else."""
    for graph, loaded in repo.loaded():
        entries = {name: value for name, value in graph.inputs.items() if loaded.cached and name.startswith("past_")}
        for name, value in entries.items():
            present = _present(name)
            given = graph.outputs.get(present)
            if given is None:
                yield error(graph.file, f"has no output {present!r} for {name}", f"call it {present}")
                continue
            if given.dtype != value.dtype:
                yield error(
                    graph.file,
                    f"{present} is {given.dtype}, and goes in again as {name}, which is {value.dtype}",
                    "give both the same type",
                )
            before, after = dimensions(value) or [], dimensions(given) or []
            if any(map(_differ, before, after)):
                problem = f"{present} is {after}, and goes in again as {before}"
                yield error(graph.file, problem, "give both the same axes")


def _present(name: str) -> str:
    """`past_key_values.0.key` → `present.0.key`, `past_conv.0` → `present_conv.0`."""
    if name.startswith("past_key_values"):
        return name.replace("past_key_values", "present", 1)
    return name.replace("past_", "present_", 1)


def _differ(before: int | str, after: int | str) -> bool:
    return isinstance(before, int) and isinstance(after, int) and before != after
