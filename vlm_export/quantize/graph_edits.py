"""What every quantized form does to a graph: find the weights, and put nodes in the place of those that read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import DTypeLike

from vlm_export.graph.weights import TOKEN_TABLE, CheckpointTensor


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


def constant(graph: ir.Graph, name: str, value: object, dtype: DTypeLike) -> ir.Value:
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


def stored_as(graph: ir.Graph, tensor: ir.LazyTensor, dtype: ir.DataType) -> tuple[list[ir.Node], ir.Value]:
    """A tensor in the type that is computed in: as it is, or by a Cast, which a session does once, when it is made."""
    value = initializer(graph, tensor)
    if tensor.dtype == dtype:
        return [], value
    cast = ir.node("Cast", [value], {"to": dtype})
    return [cast], cast.outputs[0]


def float_type(node: ir.Node) -> ir.DataType:
    """What a node that multiplies or looks up computes in: float32 or float16."""
    weight = next(value for value in node.inputs if value is not None and value.is_initializer())
    assert weight.dtype is not None
    return weight.dtype


def is_float(value: ir.Value | None) -> bool:
    """Whether a value is float32. One whose type is not told is of the type of what it is computed from."""
    if value is None:
        return False
    producer = value.producer()
    if value.dtype is None and producer is not None:
        return bool(producer.inputs) and is_float(producer.inputs[0])
    return value.dtype == ir.DataType.FLOAT


def heads(model: ir.Model) -> set[str]:
    """Names of the weights that are a token table, or the head: what the `logits` come of last."""
    graph = model.graph
    found = {str(model.metadata_props[TOKEN_TABLE])} if TOKEN_TABLE in model.metadata_props else set()
    if any(value.name == "logits" for value in graph.outputs):
        *_, (_, last) = products(graph)
        found.add(str(last.name))
    return found


def take_lookup(graph: ir.Graph, lookup: ir.Node) -> ir.Node:
    """The node to replace where rows take the place of a lookup: of columns, also what turns them back into rows.

    A lookup of columns gives `[hidden, B, S]`; the Transpose behind it takes its input.
    """
    if not is_by_columns(lookup):
        return lookup
    [(transpose, _)] = [(use.node, use.idx) for use in lookup.outputs[0].uses()]
    assert transpose.op_type == "Transpose" and list(transpose.attributes.get_ints("perm")) == [1, 2, 0]
    transpose.replace_input_with(0, lookup.inputs[1])
    graph.remove(lookup, safe=True)
    return transpose
