"""Simplify a skeleton: our rewrites, then onnxsim within a budget of size and time.

Weights are inputs here, so onnxsim never sees one and its memory does not grow with them.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlm_export.atomic import scratch_folder
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
ONNXSIM = "onnxsim"
ONNXSIM_SECONDS = 120
ONNXSIM_BYTES = 64 << 20  # a skeleton this large is no skeleton: something folded a weight into it


def simplify(
    skeleton: ir.Model,
    component: Component,
    onnxsim: Onnxsim,
    *,
    seconds: float = ONNXSIM_SECONDS,
    watch: passes.Watch = passes.nobody,
) -> tuple[ir.Model, SimplifyReport]:
    """Returns the simplified skeleton and the report; past a budget, the graph stays as our rewrites left it."""
    before = len(skeleton.graph)
    declared = {spec.name for spec in component.inputs}
    plain, with_weights = passes.BEFORE_ONNXSIM
    rewrites = {
        **json.loads(skeleton.metadata_props.pop(REWRITES, "{}")),
        **passes.run(plain, skeleton, watch),
        **passes.run_with_weights(with_weights, skeleton, declared, watch),
    }
    RemoveUnusedNodesPass()(skeleton)
    simplified, outcome = _onnxsim(skeleton, onnxsim, seconds)
    watch(ONNXSIM, simplified)
    attention, rotary = (simplified.metadata_props.get(name, "") for name in (UNFUSED, UNFUSED_ROTARY))
    report = SimplifyReport(
        before, len(simplified.graph), rewrites, count_fused(simplified), attention, outcome, unfused_rotary=rotary
    )
    return simplified, report


def count_fused(skeleton: ir.Model) -> dict[str, int]:
    """How many nodes are ONNX Runtime's own operators, by operator."""
    return dict(Counter(node.op_type for node in skeleton.graph if node.op_type in _FUSED))


def _onnxsim(skeleton: ir.Model, onnxsim: Onnxsim, seconds: float) -> tuple[ir.Model, str]:
    with scratch_folder() as folder:
        source, target = Path(folder, "skeleton.onnx"), Path(folder, "simplified.onnx")
        ir.save(skeleton, source)
        if source.stat().st_size > ONNXSIM_BYTES:
            return skeleton, f"skipped: the graph alone takes {source.stat().st_size >> 20} MiB"
        problem = onnxsim.run(source, target, seconds)
        if problem:
            return skeleton, f"skipped: {problem}"
        simplified = ir.load(target)
        _load_constants(simplified)
        simplified.metadata_props.update(skeleton.metadata_props)
        return simplified, ONNXSIM_RAN


def _load_constants(model: ir.Model) -> None:
    """Take the small constants into memory before their folder goes."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=value.name)
