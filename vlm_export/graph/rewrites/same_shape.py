"""Remove reshapes that together give a tensor the shape that it had before them.

An attention layer splits a projection into heads and our operators take the heads side by side again: two reshapes that
move nothing, three times a layer, and a pair after attention. Needs the tracer's shapes, before they are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def join_reshapes(skeleton: ir.Model) -> int:
    """Replace the result of a `Reshape` by the earlier value of the same shape. Returns how often."""
    count = 0
    for node in skeleton.graph:
        made = node.outputs[0]
        if node.op_type != "Reshape" or made.is_graph_output():
            continue
        source = next((value for value in _before(node) if _same(value, made)), None)
        if source is not None:
            made.replace_all_uses_with(source)
            count += 1
    RemoveUnusedNodesPass()(skeleton)
    return count


def _before(node: ir.Node | None) -> list[ir.Value]:
    """What a chain of `Reshape` nodes takes, the nearest first."""
    values: list[ir.Value] = []
    while node is not None and node.op_type == "Reshape" and node.inputs[0] is not None:
        values.append(node.inputs[0])
        node = node.inputs[0].producer()
    return values


def _same(one: ir.Value, two: ir.Value) -> bool:
    return one.shape is not None and two.shape is not None and same_sizes(list(one.shape), list(two.shape))


def same_sizes(one: Sequence[int | ir.SymbolicDim], two: Sequence[int | ir.SymbolicDim]) -> bool:
    """Equal sizes, where a symbol is a size of its own and an unknown one equals nothing."""
    return len(one) == len(two) and all(_known(a) and a == b for a, b in zip(one, two, strict=True))


def _known(size: int | ir.SymbolicDim) -> bool:
    return isinstance(size, int) or size.value is not None
