"""Contract §0.5, §2, §14.1: nothing is cast between graphs: their borders have the same types in every dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from vlm_export.doctor.classes import Fed
from vlm_export.doctor.findings import Finding, error
from vlm_export.doctor.repo_view import RepoView, dimensions

_LOGITS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def check(repo: RepoView) -> Iterator[Finding]:
    """Find inputs and outputs of a wrong type or number of axes."""
    for graph, loaded in repo.loaded():
        yield from _differences(graph.file, "input", graph.inputs, loaded.inputs or {})
        yield from _differences(graph.file, "output", graph.outputs, loaded.outputs)
        logits = graph.outputs.get("logits")
        if logits is not None and logits.dtype not in _LOGITS:
            yield error(graph.file, f"logits are {_name(logits.dtype)}", "cast them to float32")


def _differences(file: str, kind: str, found: Mapping[str, ir.Value], declared: Mapping[str, Fed]) -> Iterator[Finding]:
    for name in found.keys() & declared.keys():
        value, fed = found[name], declared[name]
        if fed.dtype is not None and value.dtype != fed.dtype:
            yield error(
                file,
                f"{kind} {name} is {_name(value.dtype)}, and transformers.js has {_name(fed.dtype)}",
                f"cast inside the graph, and keep {_name(fed.dtype)} at its border in every dtype",
            )
        axes = dimensions(value)
        if fed.rank is not None and axes is not None and len(axes) != fed.rank:
            yield error(file, f"{kind} {name} has {len(axes)} axes, not {fed.rank}: {axes}", "reshape inside the graph")


def _name(dtype: ir.DataType | None) -> str:
    names = {ir.DataType.FLOAT: "float32", None: "of no type"}
    return names.get(dtype, "" if dtype is None else dtype.name.lower())
