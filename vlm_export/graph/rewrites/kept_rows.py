"""Compute what comes after the last attention only for the positions whose logits are asked for.

A client wants the logits of one position, and the model picks its row behind the final norm: until there, the last
layer has computed the output projection and the MLP of every position, 2.5% of SmolLM-135M's first run. Each of these
operators computes its rows one by one, so the row can be picked in front of them: from attention's output and from the
residual that it is added to.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from vlm_export.graph.weights import weight_inputs

KEPT = "kept_positions"  # what a decoder's core calls the positions, behind any prefix
_ATTENTION = ("GroupQueryAttention", "MultiHeadAttention")
_UNARY = ("Gelu", "QuickGelu", "Relu", "Sigmoid", "Tanh")
_BINARY = ("Add", "Div", "Mul", "Sub")
_NORMS = ("LayerNormalization", "SimplifiedLayerNormalization")
_SKIP_NORM = "SkipSimplifiedLayerNormalization"
_POSITIONS_AXIS = 1


def pick_rows_early(skeleton: ir.Model, declared: Collection[str]) -> int:
    """Move the lookup of kept positions up to attention. Returns how many operators see fewer rows for it."""
    graph = skeleton.graph
    lookup = next((node for node in graph if _is_lookup(node)), None)
    if lookup is None or lookup.inputs[0] is None:
        return 0
    rows = _Rows(graph, declared)
    moved = _computed_for(lookup, rows)
    picked: dict[ir.Value, ir.Value] = {}
    for node in [node for node in graph if node in moved]:
        for index in rows.inputs_of(node):
            value = node.inputs[index]
            assert value is not None
            if value.producer() in moved:
                continue
            if value not in picked:
                gather = ir.node("Gather", [value, lookup.inputs[1]], {"axis": _POSITIONS_AXIS})
                gather.outputs[0].name, gather.outputs[0].type = f"{value.name}.{KEPT}", value.type
                graph.insert_before(node, gather)
                picked[value] = gather.outputs[0]
            node.replace_input_with(index, picked[value])
    if moved:
        lookup.outputs[0].replace_all_uses_with(lookup.inputs[0])
        graph.remove(lookup, safe=True)
        graph.sort()  # the positions may be computed behind the first operator that needs them now
    return len(moved)


def _is_lookup(node: ir.Node) -> bool:
    positions = node.inputs[1] if node.op_type == "Gather" else None
    return (
        positions is not None
        and str(positions.name).rpartition(".")[2] == KEPT
        and node.attributes.get_int("axis", 0) == _POSITIONS_AXIS
        and not node.outputs[0].is_graph_output()
    )


class _Rows:
    """Which values have one row a position, `[batch, positions, size]`, because attention or what follows made them."""

    def __init__(self, graph: ir.Graph, declared: Collection[str]):
        self._constant = weight_inputs(graph, declared) | set(graph.initializers.values())
        self._known: set[ir.Value] = set()
        for node in graph:
            if all(value is None or value in self._constant for value in node.inputs):
                self._constant |= set(node.outputs)
            elif node.op_type in _ATTENTION:
                self._known.add(node.outputs[0])
            elif any(node.inputs[index] in self._known for index in self.inputs_of(node)):
                self._known |= set(node.outputs)

    def inputs_of(self, node: ir.Node) -> list[int]:
        """Which inputs an operator takes row by row; none if it is not of those that do."""
        if node.op_type in _UNARY or (node.op_type in _NORMS and node.attributes.get_int("axis", -1) == -1):
            return [0]
        if node.op_type == "MatMul":
            return [0] if node.inputs[1] in self._constant else []
        if node.op_type == "Split":
            return [0] if node.attributes.get_int("axis", 0) in (-1, 2) else []
        if node.op_type in (_SKIP_NORM, *_BINARY):
            return [index for index, value in enumerate(node.inputs[:2]) if value not in self._constant]
        return []

    def computed_by(self, node: ir.Node) -> bool:
        """Whether the operator takes rows, and rows alone, row by row."""
        inputs = self.inputs_of(node)
        return bool(inputs) and all(node.inputs[index] in self._known for index in inputs)


def _computed_for(lookup: ir.Node, rows: _Rows) -> set[ir.Node]:
    """The operators that compute rows for the lookup alone."""
    graph = lookup.graph
    assert graph is not None
    found: set[ir.Node] = set()
    for node in reversed(graph):
        used = [value for value in node.outputs if value.uses()]
        if (
            used
            and not any(value.is_graph_output() for value in used)
            and all(use.node is lookup or use.node in found for value in used for use in value.uses())
            and rows.computed_by(node)
        ):
            found.add(node)
    return found
