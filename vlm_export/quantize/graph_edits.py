"""What every quantized form does to a graph: find the weights, and put nodes in the place of those that read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from vlm_export.graph.weights import TOKEN_TABLE, CheckpointTensor
from vlm_export.quantize.eight_bits import ZERO_POINT, ByOutput, EightBits, Scales


def products(graph: ir.Graph) -> Iterator[tuple[ir.Node, CheckpointTensor]]:
    """Every MatMul by a matrix of weights, `[inputs, outputs]`."""
    for node in list(graph):
        weight = node.inputs[1].const_value if node.op_type == "MatMul" and node.inputs[1] is not None else None
        if isinstance(weight, CheckpointTensor) and len(weight.shape) == 2:
            yield node, weight


def lookups(model: ir.Model) -> Iterator[tuple[ir.Node, CheckpointTensor]]:
    """Every lookup in the token table; position tables are none."""
    name = model.metadata_props.get(TOKEN_TABLE)
    for node in list(model.graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is not None and table.name == name and isinstance(table.const_value, CheckpointTensor):
            yield node, table.const_value


def is_by_columns(lookup: ir.Node) -> bool:
    """Whether a lookup finds tokens in the columns of `[hidden, vocabulary]`, as the weight of a tied head lies."""
    return lookup.attributes.get_int("axis", 0) == 1


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """The tensor as an initializer; the one that is there already, if it was made before."""
    assert tensor.name is not None
    if tensor.name not in graph.initializers:
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        graph.register_initializer(ir.Value(name=tensor.name, type=kind, shape=shape, const_value=tensor))
    return graph.initializers[tensor.name]


def constant(graph: ir.Graph, name: str, value: object, dtype: type[np.generic]) -> ir.Value:
    """A small constant, shared by all that ask for one of that name."""
    return initializer(graph, ir.Tensor(np.array(value, dtype=dtype), name=f"quantize.{name}"))


def replace(graph: ir.Graph, old: ir.Node, new: Sequence[ir.Node]) -> None:
    """Put nodes in the place of one; the last one's output takes the name and the uses of the old output."""
    before, after = old.outputs[0], new[-1].outputs[0]
    for index, node in enumerate(new[:-1]):
        node.outputs[0].name = f"{before.name}.quantized.{index}"
    after.name, after.type, after.shape = before.name, before.type, before.shape
    graph.insert_before(old, new)
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def drop_unused(graph: ir.Graph) -> None:
    """Forget the weights that nothing reads any more."""
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            graph.initializers.pop(name)


def look_up_rows(graph: ir.Graph, lookup: ir.Node, quantized: EightBits) -> None:
    """Gather rows of numbers and of scales, and multiply the few that were gathered: `[B, S] → [B, S, hidden]`.

    Gather, Cast and Mul, because the browser's default WASM build has no kernel for GatherBlockQuantized.
    """
    ids = lookup.inputs[1]
    numbers = ir.node("Gather", [initializer(graph, ByOutput(quantized)), ids], {"axis": 0})
    # Cast as a whole, when the session is made: not every graphics adapter has float16.
    wide = ir.node("Cast", [initializer(graph, Scales(quantized))], {"to": ir.DataType.FLOAT})
    scales = ir.node("Gather", [wide.outputs[0], ids], {"axis": 0})
    floats = ir.node("Cast", [numbers.outputs[0]], {"to": ir.DataType.FLOAT})
    centred = ir.node("Sub", [floats.outputs[0], constant(graph, "zero_point", ZERO_POINT, np.float32)])
    last = constant(graph, "last_axis", [-1], np.int64)
    # Scales are `[B, S, blocks]`, or `[B, S]` where a row has one; numbers are `[B, S, blocks, share]`.
    axes = last if quantized.block else constant(graph, "last_axes", [-2, -1], np.int64)
    factors = ir.node("Unsqueeze", [scales.outputs[0], axes])
    values = ir.node("Mul", [centred.outputs[0], factors.outputs[0]])
    length = quantized.blocks * quantized.share
    flat = ir.node("Reshape", [values.outputs[0], constant(graph, f"rows_of_{length}", [0, 0, length], np.int64)])
    new = [numbers, wide, scales, floats, centred, factors, values, flat]
    if length > quantized.inputs:
        start, end = (constant(graph, f"at_{place}", [place], np.int64) for place in (0, quantized.inputs))
        new.append(ir.node("Slice", [flat.outputs[0], start, end, last]))
    replace(graph, _transposed_back(graph, lookup) if is_by_columns(lookup) else lookup, new)


def _transposed_back(graph: ir.Graph, lookup: ir.Node) -> ir.Node:
    """The node that makes rows of `[hidden, B, S]`, moved to the lookup's input: both are replaced as one."""
    [(transpose, _)] = [(use.node, use.idx) for use in lookup.outputs[0].uses()]
    assert transpose.op_type == "Transpose" and list(transpose.attributes.get_ints("perm")) == [1, 2, 0]
    transpose.replace_input_with(0, lookup.inputs[1])
    graph.remove(lookup, safe=True)
    return transpose
