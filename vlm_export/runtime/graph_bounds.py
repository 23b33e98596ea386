"""What a graph may ask for, whoever wrote it, looked at before ONNX Runtime loads it: trips of loops, elements, nodes.

What a client feeds is bounded where it is made. Here are the numbers that stand in the file itself: constants, and what
follows from them by the operators that shapes and counts are computed with. What only a run can tell has the limit in
time of `run_limit.py`.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, helper, numpy_helper

from vlm_export.errors import InputError

MOST_TRIPS = 1_000_000  # of a loop, with those of the loops around it
MOST_ELEMENTS = 2**31  # of a tensor: 8 GB in float32
MOST_NODES = 200_000  # with those of functions, wherever they are used
_MOST_VALUES = 64  # of a constant that counts or says a shape

# Constants are flat lists here: of shapes and counts nothing else matters.
_Values = np.ndarray
_Known = ChainMap[str, _Values]


def _first(*values: _Values) -> _Values:
    return values[0]


def _joined(*values: _Values) -> _Values:
    return np.concatenate(values)


def _quotient(left: _Values, right: _Values) -> _Values:
    if np.issubdtype(left.dtype, np.integer) and np.issubdtype(right.dtype, np.integer):
        return left // right
    return left / right


_OPERATORS: dict[str, Callable[..., _Values]] = {
    **dict.fromkeys(("Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Cast", "CastLike"), _first),
    "Concat": _joined,
    "Neg": np.negative,
    "Abs": np.abs,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": _quotient,
    "Pow": np.power,
    "Min": lambda *values: np.minimum.reduce(np.broadcast_arrays(*values)),
    "Max": lambda *values: np.maximum.reduce(np.broadcast_arrays(*values)),
    "Gather": lambda values, places: values[places.astype(np.int64)],
    "ReduceProd": lambda *values: np.atleast_1d(np.prod(values[0])),
    "ReduceSum": lambda *values: np.atleast_1d(np.sum(values[0])),
}


def check_graph(path: Path, message: onnx.ModelProto) -> None:
    """Look at all that the constants of a graph ask for; `path` is its file.

    Raises:
        InputError: it is more of something than any model has; the message says how much is taken.
    """
    with np.errstate(all="ignore"):
        check = _Check(path, message)
        check.count(message.graph.node)
        check.graph(message.graph, ChainMap(), trips=1)


class _Check:
    """One look at a file, and the functions that its nodes may be uses of."""

    def __init__(self, path: Path, message: onnx.ModelProto):
        self.path = path
        self.functions = {(one.domain, one.name): one for one in message.functions}
        self._counted: dict[tuple[str, str], int] = {}

    def count(self, nodes: Sequence[onnx.NodeProto]) -> int:
        """How many nodes these are with all within them, functions written out as ONNX Runtime does when it loads."""
        total = len(nodes)
        for node in nodes:
            total += sum(self.count(graph.node) for graph in _graphs(node))
            name = (node.domain, node.op_type)
            if name in self.functions:
                if name not in self._counted:
                    self._counted[name] = MOST_NODES + 1  # of one that uses itself
                    self._counted[name] = self.count(self.functions[name].node)
                total += self._counted[name]
            if total > MOST_NODES:
                raise InputError(f"{self.path}: has more than {MOST_NODES:,} nodes, its functions written out")
        return total

    def graph(self, graph: onnx.GraphProto, outer: _Known, trips: int) -> None:
        """A graph, which may be one within another, run so many times."""
        for value in graph.input:
            self._input(value)
        constants = {one.name: _values(one) for one in graph.initializer}
        known = outer.new_child({name: values for name, values in constants.items() if values is not None})
        self.nodes(graph.node, known, trips)

    def nodes(self, nodes: Sequence[onnx.NodeProto], known: _Known, trips: int) -> None:
        """Nodes in their order; what is known of their outputs is added to `known`."""
        for node in nodes:
            self._elements(node, known)
            function = self.functions.get((node.domain, node.op_type))
            if function is not None:
                given = {
                    name: known[fed] for name, fed in zip(function.input, node.input, strict=False) if fed in known
                }
                self.nodes(function.node, ChainMap(given), trips)
            else:
                made = _made(node, known)
                if made is not None and len(made) <= _MOST_VALUES:
                    known[node.output[0]] = made
            self._within(node, known, trips)

    def _within(self, node: onnx.NodeProto, known: _Known, trips: int) -> None:
        if node.op_type == "Loop" and node.input and node.input[0] in known:
            trips *= max(1, _whole(known[node.input[0]][:1]))
            if trips > MOST_TRIPS:
                raise InputError(f"{self._name(node)}: a loop of {trips:,} trips; at most {MOST_TRIPS:,} are run")
        for graph in _graphs(node):
            self.graph(graph, known, trips)

    def _elements(self, node: onnx.NodeProto, known: Mapping[str, _Values]) -> None:
        for sizes in _sizes(node, known):
            self._check_sizes(self._name(node), sizes)

    def _input(self, value: onnx.ValueInfoProto) -> None:
        """What is fed as zeros has the sizes that the graph says."""
        dimensions = value.type.tensor_type.shape.dim
        self._check_sizes(
            f"{self.path}: {value.name}", [one.dim_value for one in dimensions if one.HasField("dim_value")]
        )

    def _check_sizes(self, what: str, sizes: Sequence[int]) -> None:
        if min(sizes, default=0) < 0:
            raise InputError(
                f"{what}: sizes of {min(sizes):,} elements; at least 0, at most {MOST_ELEMENTS:,} are taken"
            )
        if (elements := math.prod(sizes)) > MOST_ELEMENTS:
            raise InputError(f"{what}: a tensor of {elements:,} elements; at most {MOST_ELEMENTS:,} are computed")

    def _name(self, node: onnx.NodeProto) -> str:
        return f"{self.path}: {node.name or next(iter(node.output), '')} ({node.op_type})"


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Those that a node runs: the body of a loop, the branches of an if."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _values(tensor: onnx.TensorProto) -> _Values | None:
    """The numbers of a constant, flat; None of one that neither counts nor says a shape."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL or math.prod(tensor.dims) > _MOST_VALUES:
        return None
    try:
        values = numpy_helper.to_array(tensor).reshape(-1)
    except (ValueError, TypeError, KeyError):  # ONNX Runtime says what is wrong with it
        return None
    return values if values.dtype.kind in "iuf" else None


def _made(node: onnx.NodeProto, known: Mapping[str, _Values]) -> _Values | None:
    """What a node gives, flat, if all that it takes is known."""
    if node.op_type == "Constant":
        return _constant(node)
    inputs = [known[name] for name in node.input if name in known]
    if node.op_type not in _OPERATORS or len(inputs) < len(node.input) or not inputs or not node.output:
        return None
    try:
        return _OPERATORS[node.op_type](*inputs)
    except (ValueError, TypeError, IndexError, ZeroDivisionError):
        return None


def _constant(node: onnx.NodeProto) -> _Values | None:
    for attribute in node.attribute:
        if attribute.name == "value":
            return _values(attribute.t)
        if attribute.name in ("value_int", "value_ints", "value_float", "value_floats"):
            return np.atleast_1d(np.asarray(helper.get_attribute_value(attribute)))
    return None


def _sizes(node: onnx.NodeProto, known: Mapping[str, _Values]) -> Iterator[list[int]]:
    """Sizes that a node's output has at least, as far as constants say."""
    attributes = {one.name: one for one in node.attribute}
    inputs = [known.get(name) for name in node.input] + [None] * 4
    given = {
        "ConstantOfShape": inputs[0],
        "Expand": inputs[1],
        "Tile": inputs[1],
        "OneHot": inputs[1],
        "Resize": inputs[3],
        "CenterCropPad": inputs[1],
        "AffineGrid": inputs[1],
    }.get(node.op_type)
    if given is not None:
        yield [_whole(one) for one in np.array_split(given, len(given) or 1)]
    if node.op_type == "Range" and all(one is not None and len(one) for one in inputs[:3]):
        start, limit, step = (float(one[0]) for one in inputs[:3])  # type: ignore[index]
        yield [max(0, _whole(np.array([(limit - start) / step if step else math.inf])))]
    if node.op_type == "Pad" and inputs[1] is not None:
        yield [max(0, *(_whole(one) for one in np.array_split(inputs[1], len(inputs[1]) or 1)))]
    if node.op_type in ("RandomNormal", "RandomUniform") and "shape" in attributes:
        yield list(attributes["shape"].ints)
    if "pads" in attributes:
        yield [max(0, *attributes["pads"].ints)]


def _whole(values: _Values) -> int:
    """The first of some numbers; one that is none is larger than any."""
    number = float(values[0]) if len(values) else 1.0
    return int(values[0]) if math.isfinite(number) else 2**63
