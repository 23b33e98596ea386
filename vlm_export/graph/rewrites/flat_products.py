"""Multiply `[batch, positions, size]` by a weight directly, where a model reshapes it to a matrix first and back after.

transformers' `Conv1D` (GPT-2) does, with `addmm`: a `Gemm` between two reshapes that move nothing, four times a layer.
Needs the tracer's shapes, before they are dropped.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlm_export.graph.rewrites.same_shape import same_sizes


def unflatten_products(skeleton: ir.Model) -> int:
    """Rewrite `Reshape(Gemm(Reshape(x), weight, bias))` as `MatMul` and `Add`. Returns how many."""
    graph = skeleton.graph
    count = 0
    for node in [node for node in graph if node.op_type == "Gemm"]:
        x = _unflattened(node)
        shaped = [use.node.outputs[0] for use in node.outputs[0].uses() if use.node.op_type == "Reshape"]
        if x is None or len(shaped) != len(node.outputs[0].uses()) or not all(_fits(x, value) for value in shaped):
            continue
        product = ir.node("MatMul", [x, node.inputs[1]])
        sum_ = ir.node("Add", [product.outputs[0], node.inputs[2]])
        for made in (product.outputs[0], sum_.outputs[0]):
            made.type, made.shape = shaped[0].type, shaped[0].shape
        graph.insert_before(node, [product, sum_])
        for value in shaped:
            value.replace_all_uses_with(sum_.outputs[0], replace_graph_outputs=True)
        graph.remove([*(reshape for value in shaped if (reshape := value.producer()) is not None), node], safe=True)
        count += 1
    RemoveUnusedNodesPass()(skeleton)
    return count


def _unflattened(gemm: ir.Node) -> ir.Value | None:
    """`[batch, positions, size]` whose rows a plain `x · weight + bias` multiplies."""
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    if len(gemm.inputs) < 3 or any(plain[name] != attribute.value for name, attribute in gemm.attributes.items()):
        return None
    rows = gemm.inputs[0]
    reshape = None if rows is None else rows.producer()
    x = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
    if rows is None or x is None or x.shape is None or rows.shape is None or len(x.shape) != 3 or len(rows.shape) != 2:
        return None
    return x if same_sizes(x.shape[2:], rows.shape[1:]) else None


def _fits(x: ir.Value, made: ir.Value) -> bool:
    """Whether what the product is shaped into has the batch and the positions of `x`."""
    if x.shape is None or made.shape is None or len(made.shape) != 3:
        return False
    return same_sizes(x.shape[:2], made.shape[:2])
