"""Simplify a graph's structure: our rewrites, then onnxsim within a budget of size and time.

Weights are inputs here, so onnxsim never sees one and its memory does not grow with them.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlm_export.graph import passes
from vlm_export.graph.onnxsim_process import Onnxsim
from vlm_export.graph.simplify_report import ONNXSIM_RAN, SimplifyReport
from vlm_export.graph.trace import REWRITES, UNFUSED, UNFUSED_ROTARY
from vlm_export.spec.graph import Component

_FUSED = {
    "GroupQueryAttention",
    "MultiHeadAttention",
    "RotaryEmbedding",
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "LayerNormalization",
    "SkipLayerNormalization",
    "Gelu",
    "QuickGelu",
}
ONNXSIM_SECONDS = 120
ONNXSIM_BYTES = 64 << 20  # a structure this large is no structure: something folded a weight into it


def simplify(
    structure: ir.Model, component: Component, onnxsim: Onnxsim, *, seconds: float = ONNXSIM_SECONDS
) -> tuple[ir.Model, SimplifyReport]:
    """Returns the simplified structure and the report; past a budget, the graph stays as our rewrites left it."""
    before = len(structure.graph)
    declared = {spec.name for spec in component.inputs}
    plain, with_weights = passes.BEFORE_ONNXSIM
    rewrites = {
        **json.loads(structure.metadata_props.pop(REWRITES, "{}")),
        **passes.run(plain, structure),
        **passes.run_with_weights(with_weights, structure, declared),
    }
    RemoveUnusedNodesPass()(structure)
    simplified, outcome = _onnxsim(structure, onnxsim, seconds)
    attention, rotary = (simplified.metadata_props.get(name, "") for name in (UNFUSED, UNFUSED_ROTARY))
    report = SimplifyReport(
        before, len(simplified.graph), rewrites, count_fused(simplified), attention, outcome, unfused_rotary=rotary
    )
    return simplified, report


def count_fused(structure: ir.Model) -> dict[str, int]:
    """How many nodes are ONNX Runtime's own operators, by operator."""
    return dict(Counter(node.op_type for node in structure.graph if node.op_type in _FUSED))


def _onnxsim(structure: ir.Model, onnxsim: Onnxsim, seconds: float) -> tuple[ir.Model, str]:
    with tempfile.TemporaryDirectory(prefix="vlm-export-") as folder:
        source, target = Path(folder, "structure.onnx"), Path(folder, "simplified.onnx")
        ir.save(structure, source)
        if source.stat().st_size > ONNXSIM_BYTES:
            return structure, f"skipped: the structure alone takes {source.stat().st_size >> 20} MiB"
        problem = onnxsim.run(source, target, seconds)
        if problem:
            return structure, f"skipped: {problem}"
        simplified = ir.load(target)
        _load_constants(simplified)
        simplified.metadata_props.update(structure.metadata_props)
        return simplified, ONNXSIM_RAN


def _load_constants(model: ir.Model) -> None:
    """Take the small constants into memory before their folder goes."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=value.name)
