"""4-bit weights as bitsandbytes stores them, NF4: `com.microsoft::MatMulBnb4`.

A number is one of sixteen quantiles of a normal distribution, times the largest magnitude of its block. Kernels unpack
the whole weight at every call, so that the file is small and the graph slow on a processor.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import onnx_ir as ir
from onnxruntime.capi import _pybind_state as ort_state

from vlm_export.graph.weights import CheckpointTensor
from vlm_export.quantize import graph_edits
from vlm_export.quantize.numbers import Quantized
from vlm_export.quantize.packed import DOMAIN

_NF4 = 1  # attribute `quant_type`; 0 is FP4


def multiply(graph: ir.Graph, node: ir.Node, quantized: Quantized) -> None:
    """Replace a MatMul of float32 by one of NF4 numbers."""
    block = quantized.share
    numbers = _Lazy(quantized, "nf4", 0, ir.DataType.UINT8, (quantized.inputs * quantized.outputs + 1) // 2)
    count = -(-quantized.inputs * quantized.outputs // block)
    largest = _Lazy(quantized, "absmax", 1, ir.DataType.FLOAT, count)
    inputs = [node.inputs[0], *(graph_edits.initializer(graph, tensor) for tensor in (numbers, largest))]
    attributes = {"K": quantized.inputs, "N": quantized.outputs, "block_size": block, "quant_type": _NF4}
    graph_edits.replace(graph, node, [ir.node("MatMulBnb4", inputs, attributes, domain=DOMAIN)])
    graph.opset_imports[DOMAIN] = 1


class _Lazy(ir.LazyTensor):
    """The numbers, two a byte, or the largest magnitude of each block: the inputs of an output, then the next's."""

    def __init__(self, quantized: Quantized, name: str, place: int, dtype: ir.DataType, size: int):
        weight, block = quantized.weight, quantized.share
        name = f"{weight.name}.{name}"
        super().__init__(
            lambda: ir.Tensor(_quantized(weight, block)[place], name=name),
            dtype=dtype,
            shape=ir.Shape([size]),
            name=name,
        )


@lru_cache(maxsize=1)  # of the weight that is being written
def _quantized(weight: CheckpointTensor, block: int) -> tuple[np.ndarray, np.ndarray]:
    values = np.ascontiguousarray(weight.numpy().T, dtype=np.float32)
    outputs, inputs = values.shape
    numbers = np.zeros((inputs * outputs + 1) // 2, dtype=np.uint8)
    largest = np.zeros(-(-inputs * outputs // block), dtype=np.float32)
    quantize = ort_state.quantize_matmul_bnb4  # type: ignore[attr-defined]
    quantize(numbers, values, largest, block, _NF4, outputs, inputs)
    return numbers, largest
