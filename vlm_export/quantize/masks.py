"""Constants that only mask: so far below any score that a softmax makes nothing of what they are added to.

They are often the lowest number of float32. As halves they are -65504, which masks as well: the conversion sees to it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from vlm_export.graph.weights import CheckpointTensor

LARGEST = float(np.finfo(np.float16).max)
_PASS_ON = (
    *("Add", "Cast", "Concat", "Div", "Expand", "Gather", "Identity", "Max", "Min", "Mul", "Reshape", "ScatterND"),
    *("Slice", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where"),
)
_END = ("Softmax", "MultiHeadAttention", "GroupQueryAttention")


def masked(graph: ir.Graph) -> dict[ir.Value, float]:
    """The constants below -65504 that only mask, and the values that they come into, each with its magnitude."""
    found: dict[ir.Value, float] = {}
    for value, tensor in _constants(graph):
        lowest = _lowest(tensor)
        if lowest < -LARGEST and (reached := _reached(value)) is not None:
            found.update({each: min(-lowest, found.get(each, np.inf)) for each in reached})
    return found


def _constants(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """The graph's own numbers in float32, not those of a checkpoint."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if value.dtype == ir.DataType.FLOAT and tensor is not None and not isinstance(tensor, CheckpointTensor):
            yield value, tensor
    for node in graph:
        attribute = node.attributes.get("value") if node.op_type in ("Constant", "ConstantOfShape") else None
        if attribute is not None and attribute.as_tensor().dtype == ir.DataType.FLOAT:
            yield node.outputs[0], attribute.as_tensor()


def _lowest(tensor: ir.TensorProtocol) -> float:
    return float(tensor.numpy().min()) if tensor.size else 0.0


def _reached(constant: ir.Value) -> set[ir.Value] | None:
    """The constant and the values that it comes into before a softmax; nothing if it comes into others too."""
    found: set[ir.Value] = set()
    waiting = [constant]
    while waiting:
        value = waiting.pop()
        if value in found:
            continue
        if value.is_graph_output() or not value.uses():
            return None
        found.add(value)
        for node, _ in value.uses():
            if node.op_type in _END:
                continue
            if node.op_type not in _PASS_ON:
                return None
            waiting += node.outputs
    return found
