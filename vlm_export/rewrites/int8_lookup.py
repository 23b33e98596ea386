"""Token tables in int8: gather the quantized numbers, then scale the few that were gathered.

A tied table (`fold_transposes` stored it as `[hidden, vocabulary]`) has just been quantized as the head's MatMul
weight; the lookup takes those same numbers and scales. A table of its own is quantized here, one scale a row. Written
as Gather, Cast and Mul because the browser's default WASM build has no kernel for GatherBlockQuantized.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

TOKEN_TABLE = "vlm_export.token_table"  # model metadata: the weight that token ids look up


def quantize_lookups(model: ir.Model) -> int:
    """Quantize every lookup in the token table; position tables stay as they are. Returns how many."""
    graph = model.graph
    name = model.metadata_props.get(TOKEN_TABLE)
    lookups = [
        node
        for node in graph
        if node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].name == name
    ]
    for node in lookups:
        table = node.inputs[0]
        assert table is not None and table.name is not None
        axis = node.attributes.get_int("axis", 0)
        quantized, scale = _shared_with_head(graph, table) or _quantize(graph, table, axis)
        _rewrite(graph, node, quantized, scale, axis)
        if not table.uses():
            graph.initializers.pop(table.name)
    return len(lookups)


def _shared_with_head(graph: ir.Graph, table: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """What ONNX Runtime's quantizer made of weight `w`: `w_quantized` and `w_scale`, symmetric, zero point 0."""
    quantized = graph.initializers.get(f"{table.name}_quantized")
    scale = graph.initializers.get(f"{table.name}_scale")
    return (quantized, scale) if quantized is not None and scale is not None else None


def _quantize(graph: ir.Graph, table: ir.Value, axis: int) -> tuple[ir.Value, ir.Value]:
    assert table.const_value is not None
    weights = table.const_value.numpy()
    scale = np.abs(weights).max(axis=1 - axis, keepdims=True) / 127
    scale[scale == 0] = 1
    quantized = np.clip(np.rint(weights / scale), -127, 127).astype(np.int8)
    return (
        _initializer(graph, f"{table.name}_quantized", quantized),
        _initializer(graph, f"{table.name}_scale", scale.reshape(-1).astype(np.float32)),
    )


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _rewrite(graph: ir.Graph, lookup: ir.Node, quantized: ir.Value, scale: ir.Value, axis: int) -> None:
    """`Gather(table, ids)` → `Cast(Gather(quantized, ids)) * Gather(scale, ids)`, the scale along the other axis."""
    ids = lookup.inputs[1]
    numbers = ir.node("Gather", [quantized, ids], {"axis": axis})
    floats = ir.node("Cast", [numbers.outputs[0]], {"to": ir.DataType.FLOAT})
    scales = ir.node("Gather", [scale, ids], {"axis": 0})
    nodes = [numbers, floats, scales]
    factor = scales.outputs[0]
    if axis == 0:  # [B, S, H] * [B, S, 1]; for axis 1 it is [H, B, S] * [B, S] as it stands
        last = _initializer(graph, f"{lookup.outputs[0].name}.last_axis", np.array([-1], dtype=np.int64))
        nodes.append(ir.node("Unsqueeze", [factor, last]))
        factor = nodes[-1].outputs[0]
    nodes.append(ir.node("Mul", [floats.outputs[0], factor]))
    before, after = lookup.outputs[0], nodes[-1].outputs[0]
    after.name, after.type, after.shape = before.name, before.type, before.shape
    graph.insert_before(lookup, nodes)
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(lookup, safe=True)
