"""Runs a graph in float32 with its weights fed to it: to read values inside it, or to see what another weight does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime

from vlm_export.graph.rewrites.front_end import PREFIX
from vlm_export.graph.weights import CheckpointTensor
from vlm_export.machine import own_threads
from vlm_export.tensors.graph_message import SMALL_BYTES

KEPT = f"{PREFIX}kept_positions"  # which positions a decoder computes logits of, where a front end says so
POSITIONS = "kept_positions"


class Probe:
    """A session of a graph whose weights are in memory, and fed.

    A decoder that otherwise computes the logits of its last position alone computes those of every position.
    """

    def __init__(self, model: ir.Model, outputs: Sequence[str] = ()):
        """`model` is a graph whose weights have joined; `outputs` are values inside it, or inputs, to be returned."""
        model = model.clone()
        graph = model.graph
        self.weights: dict[str, onnxruntime.OrtValue] = {}
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if isinstance(tensor, CheckpointTensor) and tensor.nbytes >= SMALL_BYTES:
                graph.initializers.pop(name)
                value.const_value = None
                graph.inputs.append(value)
                self.weights[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor.numpy()))
        self.keeps_all = keep_every_position(graph)
        self.outputs = tuple(outputs)
        _add_outputs(graph, self.outputs)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = own_threads()
        options.log_severity_level = 3
        content = ir.to_proto(model).SerializeToString()
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._inputs = {value.name for value in self._session.get_inputs()}

    def run(
        self, feeds: Mapping[str, np.ndarray], names: Sequence[str], weights: Mapping[str, np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """The outputs of these names, with some `weights` in the place of the graph's own.

        `feeds` are a client's; the number of new positions is that of `input_ids` or `inputs_embeds`.
        """
        given = {name: value for name, value in feeds.items() if name in self._inputs}
        if self.keeps_all:
            given[POSITIONS] = np.arange(_positions(feeds), dtype=np.int64)
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in given.items()}
        replaced = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in (weights or {}).items()}
        computed = [name for name in names if name not in given]
        found = self._session.run_with_ort_values(computed, {**self.weights, **values, **replaced})
        by_name = {name: value.numpy() for name, value in zip(computed, found, strict=True)}
        return [by_name[name] if name in by_name else given[name] for name in names]


def keep_every_position(graph: ir.Graph) -> bool:
    """Make an input of the positions that logits are computed of. Returns whether there are such."""
    found = next((value for node in graph for value in node.outputs if value.name == KEPT), None)
    if found is None:
        return False
    given = ir.Value(name=POSITIONS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["kept"]))
    found.replace_all_uses_with(given)
    graph.inputs.append(given)
    return True


def _add_outputs(graph: ir.Graph, names: Sequence[str]) -> None:
    inside = {value.name: value for node in graph for value in node.outputs}
    for name in dict.fromkeys(names):
        value = inside.get(name)
        if value is not None and value not in graph.outputs:
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
            graph.outputs.append(value)


def _positions(feeds: Mapping[str, np.ndarray]) -> int:
    """New positions of a run: of embeddings, of a prefix and ids, or of a prefix in the start token's place and ids."""
    if "inputs_embeds" in feeds:
        return int(feeds["inputs_embeds"].shape[1])
    ids = int(feeds["input_ids"].shape[1])
    if "prefix_embeddings" in feeds:
        return int(feeds["prefix_embeddings"].shape[1]) + ids
    past = next(value for name, value in feeds.items() if name.startswith("past_key_values."))
    prefix = feeds.get("encoder_hidden_states")
    return ids if past.shape[2] or prefix is None else int(prefix.shape[1]) + ids - 1
