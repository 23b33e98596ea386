"""8-bit weights that every runtime takes: `Cast` and `Mul` before a plain MatMul.

ONNX Runtime folds both when it makes a session, so that the graph that runs is the float32 one: as fast, and as large
in memory; the file is a quarter. A scale for each output, not for blocks: a `Reshape` more to fold would keep another
copy of all weights until the session is made (SmolLM-135M: a peak of 1.9 GB in place of 1.4).
"""

from __future__ import annotations

import onnx_ir as ir

from vlm_export.dtypes import ACTIVATIONS, BY_ROW
from vlm_export.quantize import graph_edits
from vlm_export.quantize.eight_bits import ByInput, EightBits, Scales


def quantize(model: ir.Model) -> int:
    """Quantize every weight of a MatMul, and the token table, which stays one tensor with a tied head.

    Returns how many products and lookups there were.
    """
    graph = model.graph
    tables = list(graph_edits.lookups(model))
    for lookup, table in tables:
        if graph_edits.is_by_columns(lookup):
            _look_up_columns(graph, lookup, EightBits(table, outputs_last=True))
        else:
            graph_edits.look_up_rows(graph, lookup, EightBits(table, outputs_last=False))
    weights = list(graph_edits.products(graph))
    for node, weight in weights:
        unpacked = _unpacked(graph, EightBits(weight, outputs_last=True))
        product = ir.node("MatMul", [node.inputs[0], unpacked[-1].outputs[0]])
        graph_edits.replace(graph, node, [*unpacked, product])
    graph_edits.drop_unused(graph)
    model.metadata_props[ACTIVATIONS] = BY_ROW
    return len(weights) + len(tables)


def _unpacked(graph: ir.Graph, quantized: EightBits) -> list[ir.Node]:
    """`[inputs, outputs] int8` times a scale for each output."""
    numbers = graph_edits.initializer(graph, ByInput(quantized))
    scales = graph_edits.initializer(graph, Scales(quantized))
    floats = ir.node("Cast", [numbers], {"to": ir.DataType.FLOAT})
    return [floats, ir.node("Mul", [floats.outputs[0], scales])]


def _look_up_columns(graph: ir.Graph, lookup: ir.Node, quantized: EightBits) -> None:
    """Gather columns of numbers and their scales, and multiply those: `[B, S] → [hidden, B, S]`."""
    ids = lookup.inputs[1]
    numbers = ir.node("Gather", [graph_edits.initializer(graph, ByInput(quantized)), ids], {"axis": 1})
    floats = ir.node("Cast", [numbers.outputs[0]], {"to": ir.DataType.FLOAT})
    scales = ir.node("Gather", [graph_edits.initializer(graph, Scales(quantized)), ids], {"axis": 0})
    product = ir.node("Mul", [floats.outputs[0], scales.outputs[0]])
    graph_edits.replace(graph, lookup, [numbers, floats, scales, product])
