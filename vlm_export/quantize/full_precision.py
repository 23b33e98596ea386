"""Keep what half precision would decide otherwise in float32 while a graph is converted to float16.

- Angles of rotary embedding: half precision has eleven bits; at position 1000 it tells angles apart by half a radian,
  and keys came out 6 % wrong.
- Comparisons of numbers that no layer has computed, such as which row of a position table a patch is at: 5/26 in half
  precision is below 5/26.
The nodes are taken out before the conversion and put back after it, because the converter would round between them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

_OF_ANGLES = ("Cos", "Sin")
_COMPARISONS = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal")
_OF_LAYERS = ("MatMul", "Gemm", "Conv", "LayerNormalization", "BatchNormalization", "Gather")


@dataclass(frozen=True)
class Kept:
    """Nodes that compute in float32, taken out of a graph, with constants of their own."""

    nodes: tuple[ir.Node, ...]
    constants: tuple[ir.Value, ...]
    names: tuple[str, ...]  # of what the graph uses of them: inputs of the graph in the meantime


def cut(model: ir.Model) -> Kept:
    """Take the nodes out; their results become inputs of the graph. Changes `model`."""
    graph = model.graph
    inside = _inside(graph)
    nodes = tuple(node for node in graph if node in inside)
    constants = _own_constants(nodes)
    results = [v for node in nodes for v in node.outputs if any(use.node not in inside for use in v.uses())]
    for value in results:
        given = ir.Value(name=value.name, type=_type(value), shape=value.shape)
        for use in tuple(value.uses()):
            if use.node not in inside:
                use.node.replace_input_with(use.idx, given)
        graph.inputs.append(given)
    graph.remove(nodes)
    return Kept(nodes, constants, tuple(str(value.name) for value in results))


def join(model: ir.Model, kept: Kept) -> None:
    """Put the nodes back into the converted graph, whose other values kept their names; it must be sorted then."""
    graph = model.graph
    known = {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
    known |= {value.name: value for node in graph for value in node.outputs}
    own = {value for node in kept.nodes for value in node.outputs} | set(kept.constants)
    for value in kept.constants:
        graph.register_initializer(value)
    for node in kept.nodes:
        for index, source in enumerate(node.inputs):
            if source is not None and source not in own:
                node.replace_input_with(index, known[source.name])
    for made in (output for node in kept.nodes for output in node.outputs):
        if made.name in kept.names:
            known[made.name].replace_all_uses_with(made)
            graph.inputs.remove(known[made.name])
    graph.extend(kept.nodes)


def _own_constants(nodes: tuple[ir.Node, ...]) -> tuple[ir.Value, ...]:
    """Copies of the initializers that the nodes use, in their place: the graph's own will be converted."""
    copies: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is None or not value.is_initializer():
                continue
            if value not in copies:
                name = f"{value.name}.float32"
                copies[value] = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
            node.replace_input_with(index, copies[value])
    for value in copies:
        if not value.uses() and value.graph is not None:
            value.graph.initializers.pop(str(value.name))
    return tuple(copies.values())


def _inside(graph: ir.Graph) -> set[ir.Node]:
    """The nodes to keep: angles and comparisons, and what lies before them back to where integers become floats."""
    found = _before(node for node in graph if node.op_type in _OF_ANGLES)
    for node in graph:
        if node.op_type in _COMPARISONS and any(_is_float(value) for value in node.inputs):
            before = _before([node])
            if not any(other.domain or other.op_type in _OF_LAYERS for other in before):
                found |= before
    return found


def _before(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    found: set[ir.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        if node.op_type != "Cast":
            waiting += [producer for v in node.inputs if v is not None and (producer := v.producer()) is not None]
    return found


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def _type(value: ir.Value) -> ir.TypeProtocol:
    """The dtype of a kept node's result: bool of a comparison, else float32."""
    producer = value.producer()
    compares = producer is not None and producer.op_type in _COMPARISONS
    return ir.TensorType(ir.DataType.BOOL if compares else ir.DataType.FLOAT)
