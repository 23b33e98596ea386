"""A token table that is the decoder's head too, once in a graph that holds both.

Apart, `embed_tokens` has it by rows and the decoder, which multiplies by it, by columns.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir


def share(embedding: ir.Graph, weights: Iterable[ir.Value]) -> None:
    """Have a table of `embedding` looked up in the one of `weights` that holds the same numbers, if any does.

    Of one that holds them by columns, columns are looked up.
    """
    weights = list(weights)
    for node in [node for node in embedding if node.op_type == "Gather"]:
        table, ids = node.inputs
        if table is None or ids is None or not _is_matrix(table):
            continue
        for other in weights:
            if other is table or not _is_matrix(other) or other.dtype != table.dtype:
                continue
            if _sizes(other) == _sizes(table) and np.array_equal(_numbers(other), _numbers(table)):
                node.replace_input_with(0, other)
                break
            if _sizes(other) == _sizes(table)[::-1] and np.array_equal(_numbers(other).T, _numbers(table)):
                _look_up_columns(embedding, node, other, ids)
                break


def _look_up_columns(graph: ir.Graph, node: ir.Node, by_columns: ir.Value, ids: ir.Value) -> None:
    """Put in the place of a Gather of rows, for ids `[B, S]`, one of columns `[H, B, S]`, turned to `[B, S, H]`."""
    [rows] = node.outputs
    columns = ir.Node("", "Gather", [by_columns, ids], [ir.AttrInt64("axis", 1)], name=f"{node.name}_columns")
    columns.outputs[0].name = f"{rows.name}_columns"
    turned = ir.Node("", "Transpose", columns.outputs, [ir.AttrInt64s("perm", [1, 2, 0])], name=node.name)
    turned.outputs[0].name, turned.outputs[0].type, turned.outputs[0].shape = rows.name, rows.type, rows.shape
    graph.insert_before(node, [columns, turned])
    rows.replace_all_uses_with(turned.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _is_matrix(value: ir.Value) -> bool:
    return value.const_value is not None and value.shape is not None and len(value.shape) == 2


def _sizes(value: ir.Value) -> list[int]:
    assert value.const_value is not None
    return list(value.const_value.shape.numpy())


def _numbers(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()
