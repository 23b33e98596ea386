"""Compute cosines and sines for half a head, where a model computes them twice, once for each half.

transformers' rotary embedding joins its angles with themselves before it takes the cosine and the sine of each, and
ONNX Runtime's operators take the first half (`rotary.py`). A decoder computes them in every step, over all positions.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def halve_tables(skeleton: ir.Model) -> int:
    """Rewrite `Reshape(f(Concat(x, x)))[:, : size / 2]` as `f(Reshape(x))`. Returns how often."""
    graph = skeleton.graph
    reshaped: dict[ir.Value, ir.Value] = {}
    count = 0
    for node in [node for node in graph if node.op_type == "Slice"]:
        steps = _match(node)
        if steps is None:
            continue
        angles, size, functions = steps
        if angles not in reshaped:
            shape = ir.node("Constant", [], {"value": ir.tensor(np.array([-1, size], dtype=np.int64))})
            flat = ir.node("Reshape", [angles, shape.outputs[0]])
            graph.insert_before(functions[0], [shape, flat])
            reshaped[angles] = flat.outputs[0]
        value, before = reshaped[angles], functions[0].inputs[0]
        for function in functions:
            inputs = [value if given is before else given for given in function.inputs]
            clone = ir.Node(function.domain, function.op_type, inputs, function.attributes.values(), num_outputs=1)
            clone.outputs[0].type = function.outputs[0].type
            graph.insert_before(node, clone)
            value, before = clone.outputs[0], function.outputs[0]
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)
        count += 1
    return count


def _match(node: ir.Node) -> tuple[ir.Value, int, list[ir.Node]] | None:
    """What is joined with itself, the size of its rows, and the functions of each number up to the reshape."""
    starts, ends, axes = (_numbers(node, index) for index in (1, 2, 3))
    reshape = _producer(node.inputs[0], "Reshape")
    sizes = None if reshape is None else _numbers(reshape, 1)
    if reshape is None or sizes is None or ends is None or (starts, axes) != ([0], [1]) or sizes != [-1, 2 * ends[0]]:
        return None
    if len(node.inputs) > 4 and _numbers(node, 4) != [1]:
        return None
    functions: list[ir.Node] = []
    value = reshape.inputs[0]
    while (function := _producer(value, "Cos", "Sin", "Mul")) is not None and (data := _argument(function)) is not None:
        functions.insert(0, function)
        value = data
    joined = _producer(value, "Concat")
    if joined is None or not functions or len(joined.inputs) != 2 or joined.inputs[0] is not joined.inputs[1]:
        return None
    half = joined.inputs[0]
    assert half is not None
    last = joined.attributes.get_int("axis", 0) == -1
    return (half, ends[0], functions) if last else None


def _argument(function: ir.Node) -> ir.Value | None:
    """What a function of one number is applied to: of a product, the other factor is a constant of one element."""
    if function.op_type != "Mul":
        return function.inputs[0]
    constants = [value for value in function.inputs if (found := _constant(value)) is not None and found.size == 1]
    others = [value for value in function.inputs if value not in constants]
    return others[0] if len(constants) == 1 and len(others) == 1 else None


def _numbers(node: ir.Node, index: int) -> list[int] | None:
    found = _constant(node.inputs[index]) if index < len(node.inputs) else None
    return None if found is None else [int(number) for number in found.ravel()]


def _constant(value: ir.Value | None) -> np.ndarray | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _producer(value: ir.Value | None, *operators: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in operators else None
