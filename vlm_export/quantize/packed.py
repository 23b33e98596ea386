"""Weights in 8, 4 or 2 bits for processors and graphics adapters: `com.microsoft::MatMulNBits`.

Its kernels multiply the packed numbers themselves. With `accuracy_level` 4 a processor's kernel rounds the activations
of each block to 8 bits, by that block's own range, and adds up integer products; without it, it unpacks the whole
weight at every call. In WASM it does so in any case: ten times slower than float32. For that, `folded.py`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlm_export.quantize import graph_edits
from vlm_export.quantize.graph_edits import constant, initializer, stored_as
from vlm_export.quantize.numbers import ByOutput, Quantized, Scales, ZeroPoints

ACCURACY_LEVEL = 4
DOMAIN = "com.microsoft"


def multiply(graph: ir.Graph, node: ir.Node, quantized: Quantized) -> None:
    """Replace a MatMul of floats by one of packed numbers."""
    dtype = graph_edits.float_type(node)
    numbers = initializer(graph, ByOutput(quantized))
    # float16 scales of a float32 product are cast once, when the session is made.
    casts, scales = stored_as(graph, Scales(quantized), dtype)
    inputs = [node.inputs[0], numbers, scales]
    if quantized.form.offsets:
        inputs.append(initializer(graph, ZeroPoints(quantized)))
    attributes = {
        "K": quantized.inputs,
        "N": quantized.outputs,
        "bits": quantized.form.bits,
        "block_size": quantized.share,
        "accuracy_level": ACCURACY_LEVEL,
    }
    graph_edits.replace(graph, node, [*casts, ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN)])
    graph.opset_imports[DOMAIN] = 1


def look_up(graph: ir.Graph, lookup: ir.Node, quantized: Quantized) -> None:
    """Gather rows of 8-bit numbers and of scales, and multiply the few that were gathered: `[B, S] → [B, S, hidden]`.

    Gather, Cast and Mul, because the browser's default WASM build has no kernel for GatherBlockQuantized.
    """
    dtype = graph_edits.float_type(lookup)
    ids = lookup.inputs[1]
    numbers = ir.node("Gather", [initializer(graph, ByOutput(quantized)), ids], {"axis": 0})
    # Cast as a whole, when the session is made: not every graphics adapter has float16.
    casts, all_scales = stored_as(graph, Scales(quantized), dtype)
    scales = ir.node("Gather", [all_scales, ids], {"axis": 0})
    floats = ir.node("Cast", [numbers.outputs[0]], {"to": dtype})
    zero_point = constant(graph, "zero_point", quantized.middle, dtype.numpy())
    centred = ir.node("Sub", [floats.outputs[0], zero_point])
    last = constant(graph, "last_axis", [-1], np.int64)
    # Scales are `[B, S, blocks]`; numbers are `[B, S, blocks, share]`.
    factors = ir.node("Unsqueeze", [scales.outputs[0], last])
    values = ir.node("Mul", [centred.outputs[0], factors.outputs[0]])
    length = quantized.blocks * quantized.share
    flat = ir.node("Reshape", [values.outputs[0], constant(graph, f"rows_of_{length}", [0, 0, length], np.int64)])
    new = [numbers, *casts, scales, floats, centred, factors, values, flat]
    if length > quantized.inputs:
        start, end = (constant(graph, f"at_{place}", [place], np.int64) for place in (0, quantized.inputs))
        new.append(ir.node("Slice", [flat.outputs[0], start, end, last]))
    graph_edits.replace(graph, graph_edits.take_lookup(graph, lookup), new)
