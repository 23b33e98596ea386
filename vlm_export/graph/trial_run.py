"""Run a graph before it is called done: a kernel may refuse at the first run what ONNX allows.

The weights are zeros in place of what the graph will hold: arrays that nobody wrote to take no memory, so that a trial
costs what its few positions cost, however large the model is. What a graph computes is for `verify` to judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from vlm_export.errors import CheckFailed
from vlm_export.machine import own_threads
from vlm_export.runtime.sessions import GRAPH_ERRORS
from vlm_export.spec.graph import Component, TensorSpec
from vlm_export.tensors.graph_message import SMALL_BYTES

_BATCH = 2
_IMAGE = {"num_images": 2, "height": 128, "width": 192}
# Positions without a past, and with one.
_FIRST = {
    "sequence_length": 3,
    "past_sequence_length": 0,
    "total_sequence_length": 3,
    "past_encoder_sequence_length": 0,
}
_NEXT = {"sequence_length": 1, "past_sequence_length": 4, "total_sequence_length": 5, "past_encoder_sequence_length": 3}
_ALWAYS = {"batch_size": _BATCH, "decoder_sequence_length": 1, "encoder_sequence_length": 3, **_IMAGE}
_OTHER = 2  # any other symbol


def run_once(model: ir.Model, component: Component, name: str) -> None:
    """Run the graph of a component on zeros: a decoder without a past and with one. `model` stays as it is.

    Raises:
        CheckFailed: ONNX Runtime refuses the graph, or fails to run it; `name` is the file's.
    """
    trial, weights = _without_weights(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = own_threads()
    options.log_severity_level = 4  # the error is raised too
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # what was used is given back at once
    try:
        session = onnxruntime.InferenceSession(
            ir.to_proto(trial).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        for sizes in (_FIRST, _NEXT) if component.has_cache else (_FIRST,):
            all_sizes = {**_ALWAYS, **sizes, **component.sample_sizes}
            fed = {spec.name: _sample(spec, all_sizes, component.sample_values) for spec in component.inputs}
            session.run(None, weights | fed)
    except GRAPH_ERRORS as error:
        raise CheckFailed(f"{name}: ONNX Runtime cannot run it: {' '.join(str(error).split())}") from error


def _without_weights(model: ir.Model) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """A copy whose weights are inputs, and zeros to feed them: one input for all weights of a type and shape.

    So what the graph, or ONNX Runtime itself, casts or unpacks is done once for all layers.
    """
    trial = model.clone()
    graph = trial.graph
    alike: dict[tuple[ir.DataType, tuple[int, ...]], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if isinstance(tensor, ir.LazyTensor) and tensor.nbytes >= SMALL_BYTES:
            graph.initializers.pop(name)
            value.const_value = None
            first = alike.setdefault((tensor.dtype, tensor.shape.numpy()), value)
            if first is value:
                graph.inputs.append(value)
            else:
                value.replace_all_uses_with(first)
    return trial, {str(value.name): np.zeros(shape, dtype=dtype.numpy()) for (dtype, shape), value in alike.items()}


def _sample(spec: TensorSpec, sizes: Mapping[str, int], values: Mapping[str, Any]) -> np.ndarray:
    """Zeros; ones where they mean that something is there (masks) or how many (a scalar); what the component says."""
    if spec.name in values:
        return np.array(values[spec.name], dtype=np.dtype(spec.dtype))
    shape = [size if isinstance(size, int) else sizes.get(size, _OTHER) for size in spec.shape]
    means_one = spec.name.endswith("mask") or not shape
    return (np.ones if means_one else np.zeros)(shape, dtype=np.dtype(spec.dtype))
