"""Keep what half precision would decide otherwise in float32 while a graph is converted to float16.

- Angles of rotary embedding: half precision has eleven bits; at position 1000 it tells angles apart by half a radian,
  and keys came out 6 % wrong.
- Pictures that the graph prepares itself: bytes, and what is made of them before the tower.
- Comparisons of numbers that no layer has computed, such as which row of a position table a patch is at: 5/26 in half
  precision is below 5/26.
- Places between the entries of a position table, and how much of each is taken: at place 40 half precision has steps of
  1/32.
- What makes or takes numbers that are too large for half precision (`ranges.py`), with the weights of such nodes.
The nodes are taken out before the conversion and put back after it, because the converter would round between them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from vlm_export.graph.rewrites.front_end import PREFIX
from vlm_export.graph.weights import WeightRef, weight_inputs
from vlm_export.models.pixels import TRACED
from vlm_export.quantize.graph_edits import is_float

PREPARED = f"{PREFIX}{TRACED}"  # pixels, where a graph prepares pictures itself
_SIZES = ("Shape", "Size")
_OF_ANGLES = ("Cos", "Sin")
_OF_PLACES = ("Floor", "Abs")
_COMPARISONS = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal")
_OF_LAYERS = ("MatMul", "Gemm", "Conv", "LayerNormalization", "BatchNormalization", "Gather")


@dataclass(frozen=True)
class Kept:
    """Nodes that compute in float32, taken out of a graph, with constants and weights of their own.

    Attributes:
        names: of what the graph uses of them: inputs of the graph in the meantime.
        outputs: those of them that the graph returns, by their place among its outputs.
        floats: float32 values that other nodes compute and these use.
    """

    nodes: tuple[ir.Node, ...]
    constants: tuple[ir.Value, ...]
    weights: tuple[ir.Value, ...]
    names: tuple[str, ...]
    outputs: Mapping[int, ir.Value]
    floats: frozenset[str]


def cut(model: ir.Model, declared: Collection[str], too_large: Collection[str] = ()) -> Kept:
    """Take the nodes out; their results become inputs of the graph.

    Args:
        model: is changed.
        declared: names of the inputs that are not weights.
        too_large: names of values, weights among them, that half precision is not to hold.
    """
    graph = model.graph
    weights = weight_inputs(graph, declared)
    inside = _inside(graph) | _around(graph, too_large, weights)
    nodes = tuple(node for node in graph if node in inside)
    own = [value for value in graph.inputs if value in weights and all(use.node in inside for use in value.uses())]
    constants = _own_constants(nodes)
    outputs = {place: value for place, value in enumerate(graph.outputs) if value.producer() in inside}
    floats = {str(v.name) for node in nodes for v in node.inputs if v is not None and v.producer() and is_float(v)}
    results = [v for node in nodes for v in node.outputs if any(use.node not in inside for use in v.uses())]
    for value in results:
        given = ir.Value(name=value.name, type=_type(value), shape=value.shape)
        for use in tuple(value.uses()):
            if use.node not in inside:
                use.node.replace_input_with(use.idx, given)
        graph.inputs.append(given)
    for value in (*own, *outputs.values()):
        (graph.inputs if value in own else graph.outputs).remove(value)
    graph.remove(nodes)
    return Kept(nodes, constants, tuple(own), tuple(str(v.name) for v in results), outputs, frozenset(floats))


def join(model: ir.Model, kept: Kept) -> None:
    """Put the nodes back into the converted graph, whose other values kept their names; it must be sorted then."""
    graph = model.graph
    known = {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
    known |= {value.name: value for node in graph for value in node.outputs}
    own = {value for node in kept.nodes for value in node.outputs} | {*kept.constants, *kept.weights}
    graph.inputs.extend(kept.weights)
    for value in kept.constants:
        graph.register_initializer(value)
    casts = {name: _cast(known[name]) for name in kept.floats if name in known}
    for node in kept.nodes:
        for index, source in enumerate(node.inputs):
            if source is not None and source not in own:
                cast = casts.get(str(source.name))
                node.replace_input_with(index, cast.outputs[0] if cast else known[source.name])
    for made in (output for node in kept.nodes for output in node.outputs):
        if made.name in kept.names:
            known[made.name].replace_all_uses_with(made)
            graph.inputs.remove(known[made.name])
    for place, value in kept.outputs.items():
        graph.outputs.insert(place, value)
    graph.extend([*casts.values(), *kept.nodes])


def _cast(value: ir.Value) -> ir.Node:
    """To float32."""
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
    cast.outputs[0].name = f"{value.name}.float32"
    return cast


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
    """The nodes to keep: pictures, angles, comparisons, and what makes those, back to where integers become floats."""
    found = _before(node for node in graph if node.op_type in _OF_ANGLES) | _of_pixels(graph) | _of_places(graph)
    for node in graph:
        if node.op_type in _COMPARISONS and any(is_float(value) for value in node.inputs):
            before = _before([node])
            if not any(other.domain or other.op_type in _OF_LAYERS for other in before):
                found |= before
    return found


def _of_places(graph: ir.Graph) -> set[ir.Node]:
    """What whole numbers or distances are made of, if no layer computes it, and all that follows of both alone."""
    counted: set[ir.Node] = set()
    for node in graph:
        if node.op_type in _SIZES or all(value is None or _is_counted(value, counted) for value in node.inputs):
            counted.add(node)
    places = [node for node in graph if node.op_type in _OF_PLACES and node in counted]
    found = _before(places)
    numbers = (producer for node in places if (value := node.inputs[0]) and (producer := value.producer()))
    waiting = [*places, *numbers]
    while waiting:
        behind = {use.node for value in waiting.pop().outputs for use in value.uses()} & counted - found
        found |= behind
        waiting += behind
    return found


def _is_counted(value: ir.Value, counted: Collection[ir.Node]) -> bool:
    """Whether a value is a constant, or comes of whole numbers alone."""
    producer = value.producer()
    return producer in counted if producer else value.is_initializer() or not is_float(value)


def _of_pixels(graph: ir.Graph) -> set[ir.Node]:
    """All nodes that prepare pictures."""
    found: set[ir.Node] = set()
    waiting = [node for node in graph if any(value.name == PREPARED for value in node.outputs)]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [producer for value in node.inputs if value is not None and (producer := value.producer())]
    return found


def _around(graph: ir.Graph, too_large: Collection[str], weights: set[ir.Value]) -> set[ir.Node]:
    """The nodes that make or take one of the values, and those that share a weight with one of these."""
    names = {value: WeightRef.parse(str(value.name)).initializer for value in weights}
    found: set[ir.Node] = set()
    waiting = [
        node
        for node in graph
        for value in (*node.inputs, *node.outputs)
        if value is not None and names.get(value, value.name) in too_large
    ]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [use.node for value in weights.intersection(node.inputs) for use in value.uses()]
            if node.op_type == "Gather":  # a lookup of columns is one with the Transpose behind it
                waiting += [use.node for use in node.outputs[0].uses() if use.node.op_type == "Transpose"]
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


def _type(value: ir.Value) -> ir.TypeProtocol:
    """The dtype of a kept node's result: bool of a comparison; float32 where none is told."""
    producer = value.producer()
    compares = producer is not None and producer.op_type in _COMPARISONS
    return ir.TensorType(ir.DataType.BOOL) if compares else value.type or ir.TensorType(ir.DataType.FLOAT)
