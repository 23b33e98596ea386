"""Contract §11: WebGPU multiplies by packed weights in one form, and older builds by none of four bits in NF4."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from vlm_export.doctor.findings import Finding, error, warning
from vlm_export.doctor.repo_view import RepoView

_ZERO_POINTS, _GROUPS = 3, 4  # inputs of MatMulNBits


def check(repo: RepoView) -> Iterator[Finding]:
    """Find products in what WebGPU takes by itself for which it has no kernel."""
    for graph in repo.graphs:
        if "webgpu" not in repo.devices_of(graph.file):
            continue
        problems = sorted({problem for node in graph.nodes("MatMulNBits") for problem in _problems(node)})
        for problem in problems:
            fix = "quantize symmetrically or with zero points of uint8, in the order in which weights lie"
            yield error(graph.file, f"WebGPU takes this file by default, and no MatMulNBits with {problem}", fix)
        if any(graph.nodes("MatMulBnb4")):
            problem = "WebGPU takes this file by default, and has MatMulBnb4 only since the middle of 2026"
            yield warning(graph.file, problem, "name q4 for webgpu in transformers.js_config.device_config")


def _problems(node: ir.Node) -> Iterator[str]:
    points, groups = (node.inputs[place] if len(node.inputs) > place else None for place in (_ZERO_POINTS, _GROUPS))
    if points is not None and points.dtype not in (None, ir.DataType.UINT8):
        yield f"zero points of {points.dtype.name.lower()}"
    if groups is not None:
        yield "a group index (g_idx)"
