"""Contract §11, §12: IR version and operator sets are those that the pinned onnxruntime-node and -web read.

Tried on onnxruntime-node 1.30.0 and onnxruntime-web 1.31.0-dev.20260914: IR 13 and opset 26 load, IR 14 and opset 27
do not.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.doctor.findings import Finding, error, warning
from vlm_export.doctor.repo_view import RepoView

_NEWEST_IR, _NEWEST_OPSET = 13, 26
_FUSED_NORMS = 17  # the first operator set with LayerNormalization: WebGPU computes others' in float16, wrongly
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")


def check(repo: RepoView) -> Iterator[Finding]:
    """Find versions that are too new or too old, and operators of a domain that no client has."""
    for graph in repo.graphs:
        model = graph.model
        opset = model.opset_imports.get("", _NEWEST_OPSET)
        if model.ir_version > _NEWEST_IR:
            problem = f"has IR version {model.ir_version}, and onnxruntime-web reads up to {_NEWEST_IR}"
            yield error(graph.file, problem, f"export with IR version {_NEWEST_IR} or lower")
        if opset > _NEWEST_OPSET:
            problem = f"has opset {opset}, and onnxruntime-web reads up to {_NEWEST_OPSET}"
            yield error(graph.file, problem, f"export with opset {_NEWEST_OPSET} or lower")
        if opset < _FUSED_NORMS and graph.dtype.endswith("16"):
            problem = f"has opset {opset}, whose norms are many operators: wrong and slow in float16 on WebGPU"
            yield warning(graph.file, problem, f"export with opset {_FUSED_NORMS} or higher")
        own = {function[0] for function in model.functions}
        foreign = {node.domain for node in graph.graph.all_nodes()} - own - {*_DOMAINS}
        for domain in sorted(foreign):
            yield error(graph.file, f"has operators of the domain {domain!r}, which no client has", "export without")
