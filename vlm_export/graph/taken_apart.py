"""A finished graph taken apart, so that its nodes can be put into another: weights go to the outermost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Part:
    """Nodes that are in no graph, what they are fed, and what they give, by its name in their own."""

    nodes: list[ir.Node]
    fed: Mapping[str, ir.Value]
    given: Mapping[str, ir.Value]


def move_weights(inner: ir.Graph, outer: ir.Graph, prefix: str) -> None:
    """Move the weights of a graph that are used to another; one whose name is taken there gets the prefix."""
    taken = {str(value.name) for node in outer for value in node.outputs} | set(outer.initializers)
    for name, value in list(inner.initializers.items()):
        inner.initializers.pop(name)
        if not value.uses():
            continue
        if name in taken:
            value.name = f"{prefix}{name}"
        outer.register_initializer(value)


def take_apart(graph: ir.Graph, prefix: str) -> Part:
    """The nodes of a graph without weights of its own; names of what they are fed and compute get the prefix."""
    nodes = list(graph)
    part = Part(
        nodes,
        {str(value.name): value for value in graph.inputs},
        {str(value.name): value for value in graph.outputs},
    )
    graph.remove(nodes)
    graph.inputs.clear()
    graph.outputs.clear()
    for value in [*part.fed.values(), *(value for node in nodes for value in node.outputs)]:
        if value.name:
            value.name = f"{prefix}{value.name}"
    for node in nodes:
        node.name = f"{prefix}{node.name}" if node.name else None
    return part
