"""8-bit weights for processors: `com.microsoft::MatMulNBits`, whose kernels multiply the packed numbers themselves.

With `accuracy_level` 4 a kernel rounds the activations of each block to 8 bits, by that block's own range, and adds up
integer products. Without it, the CPU unpacks the whole weight at every call. In WASM it does so in any case: ten times
slower than float32. For that, `folded.py`.
"""

from __future__ import annotations

import onnx_ir as ir

from vlm_export.dtypes import ACTIVATIONS, BY_ROW
from vlm_export.graph.weights import CheckpointTensor
from vlm_export.quantize import graph_edits
from vlm_export.quantize.eight_bits import ByOutput, EightBits, Scales

# Inputs that share a scale, by preference. Decoder of SmolLM2-135M, 1,283 tokens of English: blocks of 32 with float16
# scales cost 0.0035 nats, blocks of 64 with float32 scales, which make as large a file, 0.0062.
BLOCKS = (32, 16)
ACCURACY_LEVEL = 4


def quantize(model: ir.Model) -> int:
    """Pack every weight of a MatMul, and the token table, which stays one tensor with a tied head.

    Returns how many products and lookups there were.
    """
    graph = model.graph
    tables = list(graph_edits.lookups(model))
    for lookup, table in tables:
        graph_edits.look_up_rows(graph, lookup, _in_blocks(table, outputs_last=graph_edits.is_by_columns(lookup)))
    weights = list(graph_edits.products(graph))
    for node, weight in weights:
        graph_edits.replace(graph, node, _product(graph, node, _in_blocks(weight, outputs_last=True)))
    graph_edits.drop_unused(graph)
    model.metadata_props[ACTIVATIONS] = BY_ROW
    if weights:
        graph.opset_imports["com.microsoft"] = 1
    return len(weights) + len(tables)


def _in_blocks(weight: CheckpointTensor, *, outputs_last: bool) -> EightBits:
    """The weight in blocks of the size, of `BLOCKS`, that leaves the fewest zeros to be filled in."""
    inputs = EightBits(weight, outputs_last=outputs_last).inputs
    return EightBits(weight, outputs_last, min(BLOCKS, key=lambda block: -inputs % block))


def _product(graph: ir.Graph, node: ir.Node, quantized: EightBits) -> list[ir.Node]:
    """The scales, which ONNX Runtime casts once, when the session is made, and the product."""
    numbers = graph_edits.initializer(graph, ByOutput(quantized))
    scales = ir.node("Cast", [graph_edits.initializer(graph, Scales(quantized))], {"to": ir.DataType.FLOAT})
    attributes = {
        "K": quantized.inputs,
        "N": quantized.outputs,
        "bits": 8,
        "block_size": quantized.share,
        "accuracy_level": ACCURACY_LEVEL,
    }
    inputs = [node.inputs[0], numbers, scales.outputs[0]]
    return [scales, ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft")]
