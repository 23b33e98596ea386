"""Repeat layer 1 of a stack, of which layers 0 and 1 were traced, up to the stack's full depth.

Weights are graph inputs with the checkpoint's names, so they say which layer a node belongs to. Steps:

1. The hidden state after a layer is one of the values through which all that the layer's weights have computed must
   pass, its own cache outputs aside. Which one it is, step 3 decides; the last before layer 1's weights is tried first.
2. Layer 1 is what lies between the hidden states after layers 0 and 1 and depends on the first of them, on the layer's
   weights or on its cache. What depends on none of them, or only on their shapes (masks, rotary tables, sizes), is
   common to all layers and stays single.
3. Layer 0 must be the same graph: same operators, attributes, constants and wiring. Then what layer 1 does to its
   hidden state can be done again.
4. Layer 1 is cloned once for each further layer, with that layer's weights and cache.

Where kinds of layers take turns, a period of them is what is called a layer here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlm_export.spec import cache

_Own = tuple[dict[str, ir.Value], dict[str, ir.Value], dict[str, ir.Value]]  # weights, past, present
_SHAPE_ONLY = ("Shape", "Size")  # their outputs are the same in every layer: one symbol means one size


class NotRepeatable(Exception):
    """The traced layers are not what repeating takes; the message says why. `matched` values were alike until then."""

    def __init__(self, message: str, matched: float = 0):
        super().__init__(message)
        self.matched = matched


@dataclass(frozen=True)
class _Layer:
    """What belongs to one traced layer: its weights and its cache by name within it, and its hidden state.

    A name within a layer begins with the position within a period: `0.self_attn.q_proj.weight`; one of the cache is
    that of the same part in layer 0: `0.past_conv.0`.
    """

    weights: dict[str, ir.Value]
    past: dict[str, ir.Value]
    present: dict[str, ir.Value]
    hidden: ir.Value

    @property
    def own_inputs(self) -> list[ir.Value]:
        return [*self.weights.values(), *self.past.values()]

    @property
    def results(self) -> list[ir.Value]:
        return [self.hidden, *self.present.values()]


def repeat_layers(
    skeleton: ir.Model, path: str, layers: int, *, cached: bool, period: int = 1, leading: int = 0
) -> int:
    """Repeat layer 1 of the stack whose weights are named `{path}.{layer}.…`, until there are `layers`.

    With `cached`, the parts of the cache are the layers' own. New inputs and outputs
    follow the others. With a `period` above 1, that many layers are repeated together; `leading` ones come before the
    first of them. Returns how many layers were added.

    Raises:
        NotRepeatable: the two traced layers are not alike; `skeleton` is unchanged.
    """
    graph = skeleton.graph
    first, second, nodes = _find_layers(graph, path, cached, leading, period)
    users = [(use.node, use.idx) for use in second.hidden.uses() if use.node.op_type not in _SHAPE_ONLY]
    hidden, anchor = second.hidden, nodes[-1]
    for index in range(leading + 2 * period, layers, period):
        copies: dict[ir.Value, ir.Value] = {first.hidden: hidden}
        for part, weight in second.weights.items():
            copies[weight] = _input(graph, weight, f"{path}.{_of_layer(part, index)}")
        for part, past in second.past.items():
            copies[past] = _input(graph, past, _cache_of_layer(part, index))
        clones = [_clone(node, copies, f"{path}.{index}") for node in nodes]
        graph.insert_after(anchor, clones)
        anchor = clones[-1]
        for part, present in second.present.items():
            copies[present].name = _cache_of_layer(part, index)
            graph.outputs.append(copies[present])
        hidden = copies[second.hidden]
    _continue_from(graph, second.hidden, hidden, users)
    graph.sort()
    return layers - leading - 2 * period


def _of_layer(part: str, index: int) -> str:
    """The name within a layer (`0.norm.weight`) as that of a layer from `index` on (`6.norm.weight`)."""
    position, rest = part.split(".", 1)
    return f"{index + int(position)}.{rest}"


def _cache_of_layer(part: str, index: int) -> str:
    """The name within a layer of a part of the cache (`1.past_conv.0`) as that of a layer (`past_conv.7`)."""
    position, name = part.split(".", 1)
    return cache.at_layer(name, index + int(position))


def _find_layers(
    graph: ir.Graph, path: str, cached: bool, start: int = 0, period: int = 1
) -> tuple[_Layer, _Layer, list[ir.Node]]:
    """The two traced layers, and the nodes of the second in the graph's order."""
    first, second = (_own_values(graph, path, range(i, i + period), cached) for i in (start, start + period))
    after_second = _downstream(second[0].values())
    errors: list[NotRepeatable] = []
    for before in reversed([value for value in _passages(graph, first) if value not in after_second]):
        for after in _passages(graph, second):
            try:
                layers = _Layer(*first, before), _Layer(*second, after)
                _check_alike(*layers)
                nodes = _between(graph, *layers)
                _check_separate(*layers, nodes)
                return *layers, nodes
            except NotRepeatable as error:
                errors.append(error)
    nothing = NotRepeatable("no value divides layer 0 from layer 1")
    raise max(errors, key=lambda error: error.matched, default=nothing)


def _own_values(graph: ir.Graph, path: str, indices: range, cached: bool) -> _Own:
    """The weights, cache inputs and cache outputs of a traced layer, by their names within it."""

    def of_cache(values: Iterable[ir.Value], is_part: Callable[[str], bool]) -> dict[str, ir.Value]:
        parts = ((str(value.name), value) for value in values if cached and is_part(str(value.name)))
        layers = ((cache.layer_of(name), name, value) for name, value in parts)
        return {
            f"{layer - indices[0]}.{cache.at_layer(name, 0)}": value
            for layer, name, value in layers
            if layer is not None and layer in indices
        }

    pattern = re.compile(re.escape(f"{path}.") + r"(\d+)\.(.+)")
    matches = ((pattern.match(str(value.name)), value) for value in graph.inputs)
    weights = {f"{int(m[1]) - indices[0]}.{m[2]}": value for m, value in matches if m and int(m[1]) in indices}
    if not any(weight.uses() for weight in weights.values()):
        raise NotRepeatable(f"the graph uses no weight of layer {indices[0]}")
    return weights, of_cache(graph.inputs, cache.is_past), of_cache(graph.outputs, cache.is_present)


def _passages(graph: ir.Graph, own: _Own) -> list[ir.Value]:
    """The values that lie on every way from a layer's weights to the graph's outputs, its own cache aside, in order."""
    weights, _, present = own
    ends = set(graph.outputs).difference(present.values())
    reached = _downstream(weights.values())
    if reached.isdisjoint(ends):
        return []
    computed = [output for node in graph for output in node.outputs if output in reached]
    return [value for value in computed if _downstream(weights.values(), without=value).isdisjoint(ends)]


def _downstream(sources: Iterable[ir.Value], *, without: ir.Value | None = None) -> set[ir.Value]:
    """All values that are computed from `sources`' numbers (not merely from their shapes), `without` one of them."""
    reached = set(sources)
    waiting = list(reached)
    while waiting:
        for use in waiting.pop().uses():
            if use.node.op_type in _SHAPE_ONLY:
                continue
            new = {output for output in use.node.outputs if output is not without} - reached
            reached |= new
            waiting.extend(new)
    return reached


def _between(graph: ir.Graph, first: _Layer, second: _Layer) -> list[ir.Node]:
    """The nodes of the second layer, in the graph's order."""
    dependent = _downstream([first.hidden, *second.own_inputs])
    if second.hidden not in dependent:
        raise NotRepeatable("layer 1 does not follow layer 0")
    found: set[ir.Node] = set()
    waiting = list(second.results)
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is None or node in found or value is first.hidden or value not in dependent:
            continue
        found.add(node)
        waiting.extend(value for value in node.inputs if value is not None)
    return [node for node in graph if node in found]


def _check_separate(first: _Layer, second: _Layer, nodes: Sequence[ir.Node]) -> None:
    """What comes into the second layer, and what it computes, is used by no one else but through its results."""
    inside, results = set(nodes), set(second.results)
    computed = [output for node in nodes for output in node.outputs]
    for missing in results.difference(computed):
        raise NotRepeatable(f"{missing.name} is not computed in layer 1", math.inf)
    for value in (first.hidden, *second.own_inputs, *computed):
        users = {use.node for use in value.uses() if use.node.op_type not in _SHAPE_ONLY}
        if value not in results and (value.is_graph_output() or not users <= inside):
            raise NotRepeatable(f"{value.name} is used outside layer 1", math.inf)


def _check_alike(first: _Layer, second: _Layer) -> None:
    """Walk both layers from their results to their inputs, side by side.

    Raises:
        NotRepeatable: they are not one graph under two sets of names.
    """
    for kind in ("weights", "past", "present"):
        ours, theirs = getattr(first, kind), getattr(second, kind)
        if ours.keys() != theirs.keys():
            raise NotRepeatable(f"layers 0 and 1 differ in {min(ours.keys() ^ theirs.keys())}")
    own = {value: name for layer in (first, second) for name, value in (layer.weights | layer.past).items()}
    pairs: dict[ir.Value, ir.Value] = {}  # of layer 1 → of layer 0
    waiting = [(first.hidden, second.hidden), *((first.present[part], second.present[part]) for part in first.present)]
    while waiting:
        one, two = waiting.pop()
        if two in pairs and pairs[two] is not one:
            raise NotRepeatable(f"{two.name} of layer 1 has two counterparts in layer 0", len(pairs))
        if two in pairs:
            continue
        if one is not two and two is not first.hidden:
            difference = _difference(one, two, own)
            if difference:
                raise NotRepeatable(difference, len(pairs))
            waiting.extend(_inputs_side_by_side(one, two))
        pairs[two] = one
    entry = pairs.get(first.hidden)
    if entry is None:
        raise NotRepeatable("layer 1 does not follow layer 0")
    if entry in _downstream(first.own_inputs):
        raise NotRepeatable("layer 0 does not begin where layer 1 does")


def _difference(one: ir.Value, two: ir.Value, own: dict[ir.Value, str]) -> str | None:
    """What tells a value of layer 1 from its counterpart in layer 0: another source, operator or attribute."""
    ours, theirs = one.producer(), two.producer()
    if ours is None or theirs is None:
        same = own[one] == own.get(two) if one in own else _same_constant(one, two)
        return None if same else f"layer 1 uses {two.name} where layer 0 uses {one.name}"
    if ours.op_identifier() != theirs.op_identifier() or one.index() != two.index():
        return f"layer 1 has {theirs.op_type} for {two.name} where layer 0 has {ours.op_type}"
    if [v is None for v in ours.inputs] != [v is None for v in theirs.inputs]:
        return f"{theirs.op_type} for {two.name} in layer 1 has other inputs than layer 0's"
    if len(ours.outputs) != len(theirs.outputs) or not _same_attributes(ours, theirs):
        return f"{theirs.op_type} for {two.name} in layer 1 differs from layer 0's"
    return None


def _inputs_side_by_side(one: ir.Value, two: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
    ours, theirs = one.producer(), two.producer()
    if ours is None or theirs is None:
        return []
    return [(a, b) for a, b in zip(ours.inputs, theirs.inputs, strict=True) if a is not None and b is not None]


def _same_attributes(ours: ir.Node, theirs: ir.Node) -> bool:
    if ours.attributes.keys() != theirs.attributes.keys():
        return False
    return all(_same_attribute(ours.attributes[name], theirs.attributes[name]) for name in ours.attributes)


def _same_attribute(one: ir.Attr, two: ir.Attr) -> bool:
    """A graph inside an attribute is never the same: nothing here looks into it."""
    if one.type != two.type or one.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return False
    if one.type == ir.AttributeType.TENSOR:
        return _same_array(one.value.numpy(), two.value.numpy())
    return bool(one.value == two.value)


def _same_constant(one: ir.Value, two: ir.Value) -> bool:
    if one.const_value is None or two.const_value is None:
        return False
    return _same_array(one.const_value.numpy(), two.const_value.numpy())


def _same_array(one: np.ndarray, two: np.ndarray) -> bool:
    return one.dtype == two.dtype and np.array_equal(one, two)


def _input(graph: ir.Graph, like: ir.Value, name: str) -> ir.Value:
    """A new graph input of the type and shape of another."""
    value = ir.Value(name=name, type=like.type, shape=_copied(like.shape))
    graph.inputs.append(value)
    return value


def _clone(node: ir.Node, copies: dict[ir.Value, ir.Value], prefix: str) -> ir.Node:
    """The node with its inputs' copies where there are any; its outputs join `copies`."""
    clone = ir.Node(
        node.domain,
        node.op_type,
        [value if value is None else copies.get(value, value) for value in node.inputs],
        node.attributes,
        overload=node.overload,
        num_outputs=len(node.outputs),
        version=node.version,
        name=f"{prefix}.{node.name or node.outputs[0].name}",
    )
    for output, copy in zip(node.outputs, clone.outputs, strict=True):
        copy.name, copy.type, copy.shape = f"{prefix}.{output.name}", output.type, _copied(output.shape)
        copies[output] = copy
    return clone


def _copied(shape: ir.Shape | None) -> ir.Shape | None:
    return None if shape is None else shape.copy()


def _continue_from(graph: ir.Graph, before: ir.Value, after: ir.Value, users: Sequence[tuple[ir.Node, int]]) -> None:
    """Let what read the hidden state after layer 1 read the one after the last layer, the graph's outputs included."""
    for node, index in users:
        node.replace_input_with(index, after)
    for index, output in enumerate(graph.outputs):
        if output is before:
            before.name, after.name = after.name, before.name
            after.shape = before.shape
            graph.outputs[index] = after
