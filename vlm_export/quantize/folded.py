"""8-bit weights that every runtime takes: `Cast`, with offsets `Sub`, and `Mul` before a plain MatMul.

ONNX Runtime folds these when it makes a session, so that the graph that runs is the float one: as fast, and as large in
memory; the file is a quarter. A scale for each output, not for blocks: a `Reshape` more to fold would keep another copy
of all weights until the session is made (SmolLM-135M: a peak of 1.9 GB in place of 1.4).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlm_export.quantize import graph_edits
from vlm_export.quantize.graph_edits import constant, initializer
from vlm_export.quantize.numbers import ByInput, ByOutput, Quantized, Scales, ZeroPoints


def multiply(graph: ir.Graph, node: ir.Node, quantized: Quantized) -> None:
    """Unpack the weight `[inputs, outputs]` before its MatMul."""
    dtype = graph_edits.float_type(node)
    nodes = _unpacked(graph, quantized, initializer(graph, ByInput(quantized)), dtype)
    product = ir.node("MatMul", [node.inputs[0], nodes[-1].outputs[0]])
    graph_edits.replace(graph, node, [*nodes, product])


def look_up(graph: ir.Graph, lookup: ir.Node, quantized: Quantized) -> None:
    """Gather numbers and scales of tokens, and multiply those: columns `[hidden, B, S]`, or rows `[B, S, hidden]`."""
    (_look_up_columns if graph_edits.is_by_columns(lookup) else _look_up_rows)(graph, lookup, quantized)


def _unpacked(
    graph: ir.Graph, quantized: Quantized, numbers: ir.Value, dtype: ir.DataType, ids: ir.Value | None = None
) -> list[ir.Node]:
    """Numbers `[…, outputs]` times a scale for each output; `ids` are the outputs, if not all."""
    nodes = [ir.node("Cast", [numbers], {"to": dtype})]

    def of_outputs(value: ir.Value) -> ir.Value:
        if ids is None:
            return value
        nodes.append(ir.node("Gather", [value, ids], {"axis": 0}))
        return nodes[-1].outputs[0]

    floats = nodes[0].outputs[0]
    if quantized.form.offsets:
        zero_points = of_outputs(initializer(graph, ZeroPoints(quantized)))
        nodes.append(ir.node("Cast", [zero_points], {"to": dtype}))
        nodes.append(ir.node("Sub", [floats, nodes[-1].outputs[0]]))
        floats = nodes[-1].outputs[0]
    scales = of_outputs(initializer(graph, Scales(quantized, dtype)))
    return [*nodes, ir.node("Mul", [floats, scales])]


def _look_up_columns(graph: ir.Graph, lookup: ir.Node, quantized: Quantized) -> None:
    ids, dtype = lookup.inputs[1], graph_edits.float_type(lookup)
    assert ids is not None
    numbers = ir.node("Gather", [initializer(graph, ByInput(quantized)), ids], {"axis": 1})
    graph_edits.replace(graph, lookup, [numbers, *_unpacked(graph, quantized, numbers.outputs[0], dtype, ids)])


def _look_up_rows(graph: ir.Graph, lookup: ir.Node, quantized: Quantized) -> None:
    ids, dtype = lookup.inputs[1], graph_edits.float_type(lookup)
    assert ids is not None
    gathered = ir.node("Gather", [initializer(graph, ByOutput(quantized)), ids], {"axis": 0})
    shape = constant(graph, f"rows_of_{quantized.inputs}", [0, 0, quantized.inputs], np.int64)
    rows = ir.node("Reshape", [gathered.outputs[0], shape])
    floats = ir.node("Cast", [rows.outputs[0]], {"to": dtype})
    nodes = [gathered, rows, floats]
    last = constant(graph, "last_axis", [-1], np.int64)

    def of_tokens(value: ir.Value, *, cast: bool) -> ir.Value:
        """`[B, S, 1]`, in the type that is computed in."""
        nodes.append(ir.node("Gather", [value, ids], {"axis": 0}))
        if cast:
            nodes.append(ir.node("Cast", [nodes[-1].outputs[0]], {"to": dtype}))
        nodes.append(ir.node("Unsqueeze", [nodes[-1].outputs[0], last]))
        return nodes[-1].outputs[0]

    if quantized.form.offsets:
        zero_points = of_tokens(initializer(graph, ZeroPoints(quantized)), cast=True)
    else:
        zero_points = constant(graph, "zero_point", quantized.middle, dtype.numpy())
    centred = ir.node("Sub", [floats.outputs[0], zero_points])
    scales = of_tokens(initializer(graph, Scales(quantized, dtype)), cast=False)
    graph_edits.replace(graph, lookup, [*nodes, centred, ir.node("Mul", [centred.outputs[0], scales])])
