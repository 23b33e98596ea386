"""Weights on their way from a checkpoint into a graph: layouts, casts, and blocks that are never a whole tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

from vlm_export.graph import graph_file, weights
from vlm_export.tensors.graph_message import SMALL_BYTES
from vlm_export.tensors.stored import TensorRef, stored_tensors

HALF = ir.DataType.FLOAT16
FULL = ir.DataType.FLOAT


@pytest.fixture
def tensors(tmp_path: Path) -> Mapping[str, TensorRef]:
    generator = torch.Generator().manual_seed(0)
    matrices = {name: torch.randn(rows, 6, generator=generator) for name, rows in {"q": 9, "k": 3, "v": 3}.items()}
    other = {"kernel": torch.randn(4, 3, 2, 2, generator=generator), "bias": torch.randn(7), "scale": torch.tensor(2.0)}
    large = torch.tensor([[1e6, -1e6, float("inf"), 1.0]]).bfloat16()
    save_file({**matrices, **other, "large": large}, tmp_path / "model.safetensors")
    return stored_tensors(tmp_path)


@pytest.mark.parametrize("block_bytes", [16, 100, 1 << 20])
@pytest.mark.parametrize("name", ["q", "q|transposed", "q+k+v|transposed", "bias", "kernel", "scale", "bias+bias"])
@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_is_written_as_it_is(
    name: str,
    dtype: ir.DataType,
    block_bytes: int,
    tensors: Mapping[str, TensorRef],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "BLOCK_BYTES", block_bytes)
    parts = [tensors[part].load() for part in weights.WeightRef.parse(name).parts]
    parts = [part.T for part in parts] if name.endswith("transposed") else parts
    expected = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
    tensor = weights.CheckpointTensor(name, tensors, dtype)
    with (tmp_path / "weight.bin").open("w+b") as file:
        file.write(b"before")
        tensor.tofile(file)
        file.write(b"after")
    written = (tmp_path / "weight.bin").read_bytes()
    assert written.startswith(b"before") and written.endswith(b"after")
    values = np.frombuffer(written[6:-5], dtype.numpy()).reshape(tensor.shape.numpy())
    np.testing.assert_array_equal(values, expected.numpy().astype(dtype.numpy()))
    np.testing.assert_array_equal(values, tensor.numpy())


def test_float16_has_no_new_infinities(tensors: Mapping[str, TensorRef]) -> None:
    assert weights.CheckpointTensor("large", tensors, HALF).numpy().tolist() == [[65504, -65504, float("inf"), 1]]


def test_weights_inside_a_file_are_read_by_the_library(tensors: Mapping[str, TensorRef], tmp_path: Path) -> None:
    size = 300 * SMALL_BYTES  # its length needs three bytes, and a small constant stays in the skeleton
    large = ir.Tensor(np.arange(size, dtype=np.float32), name="large")
    small = ir.Tensor(np.array([1, 2], dtype=np.float32), name="small")
    values = [ir.Value(name=t.name, type=ir.TensorType(t.dtype), shape=t.shape, const_value=t) for t in (large, small)]
    node = ir.node("Concat", values, {"axis": 0}, name="joined")
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 20})
    assert graph_file.save_graph(ir.Model(graph, ir_version=10), tmp_path / "graph.onnx") == 0
    read = onnx.load(tmp_path / "graph.onnx")
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in read.graph.initializer}
    assert arrays.keys() == {"large", "small"}
    np.testing.assert_array_equal(arrays["large"], large.numpy())
    assert [node.op_type for node in read.graph.node] == ["Concat"]
