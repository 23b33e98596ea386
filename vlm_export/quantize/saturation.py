"""Whether integer products of a graph can saturate on some processor, computed from the graph's weights.

x86 processors without VNNI (Intel before Cascade Lake and Ice Lake, AMD before Zen 4) multiply unsigned 8-bit
activations by signed 8-bit weights with `vpmaddubsw`, which adds the products of two neighbours in 16 bits. Above 32767
the sum is cut off, silently: activations of 255 and two weights of one sign whose magnitudes add up to more than 128
are enough. Processors with VNNI, and ARM, add in 32 bits, so that a test on one of those sees nothing.

Unsigned weights are safe: kernels widen them first. So is MatMulNBits with `accuracy_level` 4, whose activations are
signed: 2 · 127 · 128 is below 32767.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

LIMIT = 128  # of what two neighbours of one sign add up to
UNKNOWN = 256.0  # of weights that a graph computes: the most that any can be

# Operator → the input that holds its weights, and the axes along which it adds up, as the kernel lays them out.
_SUMS_OVER = {
    "MatMulInteger": (1, (-2,)),
    "MatMulIntegerToFloat": (1, (-2,)),
    "DynamicQuantizeMatMul": (1, (-2,)),
    "QLinearMatMul": (3, (-2,)),
    "QGemm": (3, (-2,)),
    "QAttention": (1, (-2,)),
    "QOrderedMatMul": (2, (-2,)),
    "ConvInteger": (1, (1, 2, 3)),
    "QLinearConv": (3, (1, 2, 3)),
}
_TRANSPOSED = {"QGemm": "transB"}  # the attribute that says so


@dataclass(frozen=True)
class Product:
    """An integer product of a graph, and the most that two neighbouring weights of one sign in it add up to."""

    node: str
    largest_pair: float

    def __str__(self) -> str:
        return (
            f"{self.node}: neighbouring weights add up to {self.largest_pair:g}, above {LIMIT}, which saturates on "
            "processors without VNNI"
        )


def integer_products(graph: ir.Graph) -> list[Product]:
    """Every product of signed 8-bit weights, explicit or one that ONNX Runtime makes of DequantizeLinear."""
    return [Product(str(node.name or node.outputs[0].name), pair) for node, pair in _pairs(graph)]


def worst(graph: ir.Graph) -> Product | None:
    """The product that saturates most, if one does."""
    found = max(integer_products(graph), key=lambda product: product.largest_pair, default=None)
    return found if found is not None and found.largest_pair > LIMIT else None


def _pairs(graph: ir.Graph) -> Iterator[tuple[ir.Node, float]]:
    for node in graph.all_nodes():
        if node.op_type in _SUMS_OVER:
            place, axes = _SUMS_OVER[node.op_type]
            weight = node.inputs[place]
            if node.attributes.get_int(_TRANSPOSED.get(node.op_type, ""), 0):
                axes = (-1,)
        elif node.op_type in ("MatMul", "Gemm", "Conv") and all(map(_dequantized, node.inputs[:2])):
            weight = _dequantized(node.inputs[1])
            axes = (1, 2, 3) if node.op_type == "Conv" else (-1,) if node.attributes.get_int("transB", 0) else (-2,)
        else:
            continue
        if weight is None or weight.dtype != ir.DataType.UINT8:
            yield node, _largest_pair(weight, axes)


def _dequantized(value: ir.Value | None) -> ir.Value | None:
    """The integers that a value is computed of by DequantizeLinear alone."""
    producer = None if value is None else value.producer()
    return producer.inputs[0] if producer is not None and producer.op_type == "DequantizeLinear" else None


def _largest_pair(weight: ir.Value | None, axes: tuple[int, ...]) -> float:
    """The most that two neighbours of one sign along the axes, flattened into one, add up to.

    It is `UNKNOWN` for a weight that is no constant.
    """
    constant = None if weight is None else ir.convenience.get_const_tensor(weight)
    if constant is None:
        return UNKNOWN
    values = constant.numpy().astype(np.int16)
    values = np.moveaxis(values, axes[0], -1) if len(axes) == 1 else values.reshape(len(values), -1)
    if not values.size:
        return 0.0
    pairs = [np.maximum(sign * values, 0) for sign in (1, -1)]
    return float(max((one[..., 1:] + one[..., :-1]).max(initial=one.max()) for one in pairs))
