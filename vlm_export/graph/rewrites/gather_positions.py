"""Make one `Gather` of `hidden[:, positions, :]`.

The exporter translates it to Transpose → GatherND → Transpose, which moves the whole sequence to keep one row of it.
Behind a LayerNormalization and before a float16 MatMul it also crashes ONNX Runtime 1.31.1 (NchwcTransformer) on load.
"""

from __future__ import annotations

import onnx_ir as ir


def gather_positions(skeleton: ir.Model) -> int:
    """Rewrite `Transpose(GatherND(Transpose(x), Unsqueeze(positions)))` on axis 1 of `x`. Returns how many."""
    graph = skeleton.graph
    count = 0
    for last in [node for node in graph if node.op_type == "Transpose"]:
        parts = _match(last)
        if parts is None:
            continue
        hidden, positions = parts
        gather = ir.node("Gather", [hidden, positions], {"axis": 1})
        gather.outputs[0].type = last.outputs[0].type
        graph.insert_before(last, gather)
        last.outputs[0].replace_all_uses_with(gather.outputs[0], replace_graph_outputs=True)
        graph.remove(last, safe=True)
        count += 1
    return count


def _match(last: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The tensor and the positions, if `last` ends the pattern."""
    lookup = _producer(last, 0, "GatherND")
    first = lookup and _producer(lookup, 0, "Transpose")
    unsqueeze = lookup and _producer(lookup, 1, "Unsqueeze")
    if lookup is None or first is None or unsqueeze is None:
        return None
    swaps = all(list(node.attributes.get_ints("perm", [])) == [1, 0, 2] for node in (first, last))
    if not swaps or lookup.attributes.get_int("batch_dims", 0) != 0:
        return None
    hidden, positions = first.inputs[0], unsqueeze.inputs[0]
    return None if hidden is None or positions is None else (hidden, _unexpanded(positions))


def _unexpanded(positions: ir.Value) -> ir.Value:
    """What an `Expand` to its own shape expands: the exporter broadcasts all positions of an index, here the one."""
    expand = positions.producer()
    if expand is None or expand.op_type != "Expand" or expand.inputs[0] is None:
        return positions
    shape = _producer(expand, 1, "Shape")
    broadcast = shape and _producer(shape, 0, "Max")
    return expand.inputs[0] if broadcast and list(broadcast.inputs) == [expand.inputs[0]] else positions


def _producer(node: ir.Node, index: int, op_type: str) -> ir.Node | None:
    value = node.inputs[index]
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == op_type else None
