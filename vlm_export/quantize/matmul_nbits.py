"""8-bit weights for processors: `com.microsoft::MatMulNBits`, whose kernels multiply the packed numbers themselves.

With `accuracy_level` 4 a kernel rounds the activations of each block to 8 bits, by that block's own range, and adds up
integer products. Without it, the CPU unpacks the whole weight at every call. In WASM it does so in any case: ten times
slower than float32. For that, `folded.py`.
"""

from __future__ import annotations

import onnx_ir as ir

from vlm_export.dtypes import ACTIVATIONS, BY_ROW
from vlm_export.quantize import graph_edits
from vlm_export.quantize.eight_bits import ByOutput, EightBits, Scales
from vlm_export.weights import CheckpointTensor

BLOCKS = (64, 32, 16)  # inputs that share a scale, by preference; KERNELS
ACCURACY_LEVEL = 4


def quantize(model: ir.Model) -> int:
    """Pack every weight of a MatMul, and the token table, which stays one tensor with a tied head.

    Returns how many products and lookups there were.
    """
    graph = model.graph
    tables = list(graph_edits.lookups(model))
    for lookup, table in tables:
        graph_edits.look_up_rows(graph, lookup, _in_blocks(table, graph_edits.is_by_columns(lookup)))
    weights = list(graph_edits.products(graph))
    for node, weight in weights:
        graph_edits.replace(graph, node, [_product(graph, node, _in_blocks(weight, True))])
    graph_edits.drop_unused(graph)
    model.metadata_props[ACTIVATIONS] = BY_ROW
    if weights:
        graph.opset_imports["com.microsoft"] = 1
    return len(weights) + len(tables)


def _in_blocks(weight: CheckpointTensor, outputs_last: bool) -> EightBits:
    """In blocks that leave the shortest one to be filled up."""
    inputs = EightBits(weight, outputs_last).inputs
    return EightBits(weight, outputs_last, min(BLOCKS, key=lambda block: -inputs % block))


def _product(graph: ir.Graph, node: ir.Node, quantized: EightBits) -> ir.Node:
    numbers = graph_edits.initializer(graph, ByOutput(quantized))
    scales = graph_edits.initializer(graph, Scales(quantized))
    attributes = {
        "K": quantized.inputs,
        "N": quantized.outputs,
        "bits": 8,
        "block_size": quantized.share,
        "accuracy_level": ACCURACY_LEVEL,
    }
    return ir.node("MatMulNBits", [node.inputs[0], numbers, scales], attributes, domain="com.microsoft")
