"""Join a structure with the weights of a merged checkpoint, tensor by tensor, into a file that clients can load.

External data follows transformers.js: `<file>.onnx_data`, then `_data_1`, …; each chunk below 1 GB, so that a browser
can fetch it into one ArrayBuffer; small constants stay inside the graph, which shape inference needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vlm_export.checkpoint import TensorRef
from vlm_export.families.base import Component
from vlm_export.rewrites.weight_layout import TRANSPOSED

INLINE_BYTES = 1_000_000_000  # a file above this keeps its weights beside it
CHUNK_BYTES = 1_000_000_000
SMALL_BYTES = 1024  # constants below this are inline in every case


def attach_weights(structure: ir.Model, component: Component, tensors: Mapping[str, TensorRef]) -> ir.Model:
    """Turn the weight inputs of a structure into float32 initializers that are read from the checkpoint when saved.

    Changes `structure` and returns it.

    Raises:
        KeyError: the graph asks for a weight that the checkpoint does not have.
    """
    graph = structure.graph
    declared = [spec.name for spec in component.inputs]
    for value in [value for value in graph.inputs if value.name not in declared]:
        assert value.name is not None
        name = value.name.removesuffix(TRANSPOSED)
        value.const_value = _float32(tensors[name], transposed=value.name.endswith(TRANSPOSED))
        value.name = name
        value.shape = ir.Shape(value.const_value.shape)
        graph.inputs.remove(value)
        graph.register_initializer(value)
    by_name = {value.name: value for value in graph.inputs}
    graph.inputs[:] = [by_name[name] for name in declared]
    by_name = {value.name: value for value in graph.outputs}
    graph.outputs[:] = [by_name[spec.name] for spec in component.outputs]
    return structure


def _float32(ref: TensorRef, *, transposed: bool) -> ir.LazyTensor:
    def load() -> ir.Tensor:
        array = ref.load().float().numpy()
        return ir.Tensor(np.ascontiguousarray(array.T) if transposed else array)

    shape = ref.shape[::-1] if transposed else ref.shape
    return ir.LazyTensor(load, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=ref.key)


def save_graph(model: ir.Model, path: Path, *, inline_bytes: int = INLINE_BYTES, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Write a graph, with external data where it would pass `inline_bytes`. Returns the number of data chunks."""
    large = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= SMALL_BYTES
    ]
    if sum(value.const_value.nbytes for value in large if value.const_value is not None) <= inline_bytes:
        ir.save(model, path)
        return 0
    chunks: list[list[ir.Value]] = []
    filled = chunk_bytes
    for value in large:
        assert value.const_value is not None
        if filled + value.const_value.nbytes > chunk_bytes and (not chunks or chunks[-1]):
            chunks.append([])
            filled = 0
        chunks[-1].append(value)
        filled += value.const_value.nbytes
    for index, chunk in enumerate(chunks):
        name = f"{path.name}_data{f'_{index}' if index else ''}"
        tensors = [value.const_value for value in chunk if value.const_value is not None]
        external = ir.external_data.convert_tensors_to_external(tensors, path.parent, name)
        for value, tensor in zip(chunk, external, strict=True):
            value.const_value = tensor
    ir.save(model, path)
    return len(chunks)
