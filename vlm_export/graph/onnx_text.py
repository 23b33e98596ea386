"""Nodes that are written as ONNX text, to be put into a graph that is there already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

_TYPES = {
    "float32": ir.DataType.FLOAT,
    "int64": ir.DataType.INT64,
    "bool": ir.DataType.BOOL,
    "uint8": ir.DataType.UINT8,
}

Sizes = tuple[int | str, ...]


@dataclass(frozen=True)
class Parsed:
    """Nodes of a text, and what they compute by its name there."""

    nodes: list[ir.Node]
    values: Mapping[str, ir.Value]

    def __getitem__(self, name: str) -> ir.Value:
        return self.values[name]


def parsed(text: str, inputs: Mapping[str, ir.Value], opset: int, prefix: str) -> Parsed:
    """The nodes of ONNX text, reading these values by these names; names of what they compute get the prefix."""
    names = ", ".join(f"float[n] {name}" for name in inputs)
    last = text.strip().splitlines()[-1].partition("=")[0].strip()
    model = f'<ir_version: 10, opset_import: ["" : {opset}]> text ({names}) => (float[n] {last}) {{\n{text}\n}}'
    graph = ir.from_onnx_text(model).graph
    nodes = list(graph)
    values = {str(value.name): value for node in nodes for value in node.outputs}
    for value in list(graph.inputs):
        value.replace_all_uses_with(inputs[str(value.name)])
    graph.outputs.clear()
    graph.remove(nodes)
    for name, value in values.items():
        value.name, value.shape, value.type = f"{prefix}{name}", None, None
    for node in nodes:
        node.name = node.outputs[0].name
    return Parsed(nodes, values)


def typed(value: ir.Value, dtype: str, shape: Sequence[int | str] | None = None) -> ir.Value:
    """The value, with this type and shape."""
    value.type, value.shape = ir.TensorType(_TYPES[dtype]), None if shape is None else ir.Shape(shape)
    return value


def named(name: str, dtype: str, shape: Sequence[int | str] | None = None) -> ir.Value:
    """A value of this name that no node computes yet."""
    return typed(ir.Value(name=name), dtype, shape)
