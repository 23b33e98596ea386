"""Contract §11, §12, §14.8: WebGPU has no kernel for activations that are quantized as they come."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.doctor.findings import Finding, error
from vlm_export.doctor.repo_view import RepoView

_OPERATORS = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")


def check(repo: RepoView) -> Iterator[Finding]:
    """Find such operators in what WebGPU takes by itself: they run on the processor, and text came out garbled."""
    for graph in repo.graphs:
        found = sorted({node.op_type for node in graph.nodes(*_OPERATORS)})
        if found and "webgpu" in repo.devices_of(graph.file):
            yield error(
                graph.file,
                f"WebGPU takes this file by default, and has no kernel for {', '.join(found)}",
                "name q4, fp16 or fp32 for webgpu in transformers.js_config.device_config",
            )
