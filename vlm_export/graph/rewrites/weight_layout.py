"""Make every weight lie in the graph as the operator wants it, so that nothing is transposed at run time.

1. `Gemm` on a weight becomes `MatMul` + `Add`: the dynamic quantizer and MatMulNBits know MatMul only.
2. `Transpose(weight)` becomes a weight of its own name, transposed once when the weights join (`weights.py`).
3. A token table that is looked up *and* transposed (a tied head) stays one tensor: it is stored transposed, and the
   lookup gathers columns.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from vlm_export.graph.weights import WeightRef, weight_inputs


def gemm_to_matmul(skeleton: ir.Model, declared: Collection[str]) -> int:
    """Rewrite `Gemm(x, weight, bias)` with unit alpha and beta. Returns how many."""
    graph = skeleton.graph
    weights = weight_inputs(graph, declared)
    count = 0
    for node in list(graph):
        if node.op_type != "Gemm" or node.inputs[1] not in weights:
            continue
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0 or attributes.get("transA", 0):
            continue
        weight = node.inputs[1]
        new: list[ir.Node] = []
        if attributes.get("transB", 0):
            new.append(ir.node("Transpose", [weight], {"perm": [1, 0]}))
            weight = new[0].outputs[0]
        new.append(ir.node("MatMul", [node.inputs[0], weight]))
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            new.append(ir.node("Add", [new[-1].outputs[0], node.inputs[2]]))
        _replace(graph, node, new)
        count += 1
    return count


def fold_transposes(skeleton: ir.Model, declared: Collection[str]) -> int:
    """Give each transposed 2-D weight an input of its own, in the layout of its use. Returns how many.

    A weight that is also gathered by rows is gathered by columns instead, so that one copy serves both.
    """
    graph = skeleton.graph
    count = 0
    weights = weight_inputs(graph, declared)
    for value in [value for value in graph.inputs if value in weights]:
        consumers = [(usage.node, usage.idx) for usage in value.uses()]
        transposes = [node for node, _ in consumers if node.op_type == "Transpose" and _swaps_two_axes(node)]
        others = [node for node, index in consumers if node not in transposes and not _is_row_lookup(node, index)]
        if not transposes or others:
            continue
        folded = ir.Value(
            name=WeightRef((str(value.name),), transposed=True).name, type=value.type, shape=_reversed(value.shape)
        )
        graph.inputs[list(graph.inputs).index(value)] = folded
        for node in transposes:
            node.outputs[0].replace_all_uses_with(folded)
            graph.remove(node, safe=True)
        for node in [node for node, _ in consumers if node not in transposes]:
            _gather_columns(graph, node, folded)
        count += 1
    return count


def _gather_columns(graph: ir.Graph, lookup: ir.Node, table: ir.Value) -> None:
    """`Gather(rows)` `[B, S] → [B, S, H]` as `Gather(columns)` `[H, B, S]`, transposed back."""
    columns = ir.node("Gather", [table, lookup.inputs[1]], {"axis": 1})
    _replace(graph, lookup, [columns, ir.node("Transpose", [columns.outputs[0]], {"perm": [1, 2, 0]})])


def _is_row_lookup(node: ir.Node, index: int) -> bool:
    return node.op_type == "Gather" and index == 0 and node.attributes.get_int("axis", 0) == 0


def _swaps_two_axes(node: ir.Node) -> bool:
    return list(node.attributes.get_ints("perm", [1, 0])) == [1, 0]


def _reversed(shape: ir.Shape | None) -> ir.Shape | None:
    return None if shape is None else ir.Shape(list(shape)[::-1])


def _replace(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    """Put `new` in the place of `old`; the last one's output takes the name and uses of the old output."""
    before, after = old.outputs[0], new[-1].outputs[0]
    after.name, after.type, after.shape = before.name, before.type, before.shape
    graph.insert_before(old, new)
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)
