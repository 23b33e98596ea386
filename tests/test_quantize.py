"""Weights in 8, 4 and 2 bits: numbers and scales as they are streamed, and what graphs of every form compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from vlm_export.dtypes import FOLDED_8, FOLDED_8_OFFSETS, NF4, PACKED_2, PACKED_4, PACKED_8, Form
from vlm_export.graph import weights
from vlm_export.graph.graph_file import save_graph
from vlm_export.graph.weights import TOKEN_TABLE, CheckpointTensor
from vlm_export.quantize.numbers import ByInput, ByOutput, Quantized, Scales, ZeroPoints
from vlm_export.quantize.solve import solve
from vlm_export.quantize.variants import fitted, quantize
from vlm_export.tensors.stored import TensorRef, stored_tensors

INPUTS, VOCABULARY = 40, 50
FORMS = {"packed": PACKED_8, "folded": FOLDED_8, "folded, offsets": FOLDED_8_OFFSETS}
# What a product of normally distributed numbers may be off by, as a share of the largest.
COARSE = {"4 bits": (PACKED_4, 0.15), "2 bits": (PACKED_2, 0.6), "nf4": (NF4, 0.15)}


@pytest.fixture
def tensors(tmp_path: Path) -> Mapping[str, TensorRef]:
    generator = torch.Generator().manual_seed(0)
    matrices = {name: torch.randn(rows, INPUTS, generator=generator) for name, rows in {"q": 9, "k": 3, "v": 3}.items()}
    other = {"conv1d": torch.randn(INPUTS, 7, generator=generator), "zeros": torch.zeros(4, INPUTS)}
    table = torch.randn(VOCABULARY, INPUTS, generator=generator).bfloat16()
    save_file({**matrices, **other, "table": table}, tmp_path / "model.safetensors")
    return stored_tensors(tmp_path)


def tensor(name: str, tensors: Mapping[str, TensorRef]) -> CheckpointTensor:
    return CheckpointTensor(name, tensors, ir.DataType.FLOAT)


def read_back(streamed: ir.TensorProtocol, folder: Path) -> np.ndarray:
    with (folder / "tensor.bin").open("w+b") as file:
        file.write(b"before")
        streamed.tofile(file)  # type: ignore[attr-defined]
        assert file.tell() == 6 + streamed.nbytes
    data = (folder / "tensor.bin").read_bytes()[6:]
    return np.frombuffer(data, streamed.dtype.numpy()).reshape(streamed.shape.numpy())


@pytest.mark.parametrize("block_bytes", [200, 1 << 20])
@pytest.mark.parametrize("block", [None, 8, 16, 64])
@pytest.mark.parametrize("name", ["q|transposed", "q+k+v|transposed", "conv1d", "conv1d+conv1d", "zeros|transposed"])
def test_numbers_times_scales_are_the_weight(
    name: str,
    block: int | None,
    block_bytes: int,
    tensors: Mapping[str, TensorRef],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "BLOCK_BYTES", block_bytes)
    quantized = Quantized(tensor(name, tensors), True, Form("packed", 8, block))
    weight = quantized.weight.numpy()
    by_output = read_back(ByOutput(quantized), tmp_path).astype(np.float32) - 128
    scales = read_back(Scales(quantized), tmp_path).reshape(quantized.outputs, quantized.blocks, 1).astype(np.float32)
    assert np.abs(by_output).max() <= 127
    unpacked = (by_output * scales).reshape(quantized.outputs, -1)
    assert not unpacked[:, INPUTS:].any(), "what fills the last block is zero"
    share = min(block or INPUTS, INPUTS)
    largest = [np.abs(weight[start : start + share]).max(axis=0) for start in range(0, INPUTS, share)]
    exact = np.where(np.stack(largest, 1) > 0, np.stack(largest, 1) / 127, 1).astype(np.float32)
    assert (scales[..., 0] >= exact).all() and (scales[..., 0] <= exact * (1 + 2**-10)).all()
    steps = np.repeat(scales[..., 0], share, axis=1)[:, :INPUTS].T
    assert (np.abs(unpacked[:, :INPUTS].T - weight) <= steps * 0.5001).all(), "rounded to the nearest"
    np.testing.assert_array_equal(ByOutput(quantized).numpy(), by_output + 128)
    if block is None:
        by_input = read_back(ByInput(quantized), tmp_path)
        np.testing.assert_array_equal(by_input, by_output.reshape(quantized.outputs, -1).T)
        np.testing.assert_array_equal(by_input, ByInput(quantized).numpy())


def initializer(weight: CheckpointTensor) -> ir.Value:
    return ir.Value(name=weight.name, type=ir.TensorType(weight.dtype), shape=weight.shape, const_value=weight)


def product(weight: CheckpointTensor) -> ir.Model:
    """`x [rows, inputs] @ weight`."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", weight.shape[0]]))
    value = initializer(weight)
    node = ir.node("MatMul", [x, value])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 20}, name="product")
    return ir.Model(graph, ir_version=10)


def tied(weight: CheckpointTensor) -> ir.Model:
    """Rows that are looked up, `[batch, length, hidden]`, and their products with the same table."""
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "length"]))
    value = initializer(weight)
    columns = ir.node("Gather", [value, ids], {"axis": 1})
    rows = ir.node("Transpose", [columns.outputs[0]], {"perm": [1, 2, 0]})
    head = ir.node("MatMul", [rows.outputs[0], value])
    for node, name in ((rows, "rows"), (head, "logits")):
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
    outputs = [rows.outputs[0], head.outputs[0]]
    nodes = [columns, rows, head]
    graph = ir.Graph([ids], outputs, nodes=nodes, initializers=[value], opset_imports={"": 20}, name="tied")
    model = ir.Model(graph, ir_version=10)
    model.metadata_props[TOKEN_TABLE] = str(weight.name)
    return model


def in_form(model: ir.Model, form: Form) -> int:
    """All weights in one form."""
    names = [
        name for name, value in model.graph.initializers.items() if isinstance(value.const_value, CheckpointTensor)
    ]
    return quantize(model, dict.fromkeys(names, form), {})


def run(model: ir.Model, path: Path, **feeds: np.ndarray) -> list[np.ndarray]:
    save_graph(model, path)
    return onnxruntime.InferenceSession(str(path)).run(None, feeds)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["q|transposed", "q+k+v|transposed", "conv1d"])
def test_products_are_close(form: str, name: str, tensors: Mapping[str, TensorRef], tmp_path: Path) -> None:
    weight, x = tensor(name, tensors), np.random.default_rng(0).normal(size=(3, INPUTS)).astype(np.float32)
    model = product(weight)
    assert in_form(model, FORMS[form]) == 1
    [y] = run(model, tmp_path / "graph.onnx", x=x)
    expected = x @ weight.numpy()
    assert 0 < np.abs(y - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("form", COARSE)
@pytest.mark.parametrize("name", ["q|transposed", "q+k+v|transposed", "conv1d"])
def test_products_of_few_bits_are_as_close_as_those_allow(
    form: str, name: str, tensors: Mapping[str, TensorRef], tmp_path: Path
) -> None:
    weight, x = tensor(name, tensors), np.random.default_rng(0).normal(size=(3, INPUTS)).astype(np.float32)
    model, (how, allowed) = product(weight), COARSE[form]
    assert in_form(model, how) == 1
    [y] = run(model, tmp_path / "graph.onnx", x=x)
    expected = x @ weight.numpy()
    assert 0.001 < np.abs(y - expected).max() / np.abs(expected).max() < allowed


def read(quantized: Quantized, folder: Path) -> np.ndarray:
    """The weight `[outputs, inputs]` that the packed bytes, scales and zero points stand for."""
    bits = quantized.form.bits

    def unpacked(values: np.ndarray) -> np.ndarray:
        shifts = np.arange(0, 8, bits)
        return (values[..., None] >> shifts & (1 << bits) - 1).reshape(*values.shape[:-1], -1)

    numbers = unpacked(read_back(ByOutput(quantized), folder)).astype(np.float32)
    scales = read_back(Scales(quantized), folder).astype(np.float32)
    zero_points = unpacked(ZeroPoints(quantized).numpy())[:, : quantized.blocks]
    return ((numbers - zero_points[..., None]) * scales[..., None]).reshape(quantized.outputs, -1)[
        :, : quantized.inputs
    ]


@pytest.mark.parametrize("block_bytes", [200, 1 << 20])
@pytest.mark.parametrize("form", [PACKED_4, PACKED_2], ids=str)
@pytest.mark.parametrize("name", ["q|transposed", "q+k+v|transposed", "conv1d", "conv1d+conv1d", "zeros|transposed"])
def test_packed_numbers_are_the_nearest(
    name: str,
    form: Form,
    block_bytes: int,
    tensors: Mapping[str, TensorRef],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "BLOCK_BYTES", block_bytes)
    quantized = fitted(Quantized(tensor(name, tensors), True, form))
    assert quantized.share == 16, "40 inputs fill blocks of 16 with fewer zeros than blocks of 32"
    steps = np.repeat(quantized.scales.astype(np.float32), 16, axis=1)[:, :INPUTS]
    error = np.abs(read(quantized, tmp_path) - quantized.weight.numpy().T)
    assert (error <= steps * 1.001).all(), "half a step, and half a step more where the zero point was rounded"


def correlated(rows: int) -> np.ndarray:
    """Inputs `[rows, INPUTS]` as activations are: they go together, and a few are large."""
    random = np.random.default_rng(1)
    x = random.normal(size=(rows, 6)) @ random.normal(size=(6, INPUTS)) + 0.1 * random.normal(size=(rows, INPUTS))
    return (x * np.where(np.arange(INPUTS) % 9, 1, 8)).astype(np.float32)


@pytest.mark.parametrize("form", [PACKED_4, PACKED_2], ids=str)
def test_solved_numbers_do_better_on_other_inputs_of_the_kind(
    form: Form, tensors: Mapping[str, TensorRef], tmp_path: Path
) -> None:
    x = correlated(600)
    samples, others = x[:500], x[500:]
    quantized = fitted(Quantized(tensor("q+k+v|transposed", tensors), True, form))
    solved = Quantized(quantized.weight, True, quantized.form, solve(quantized, samples.T @ samples))
    expected = others @ quantized.weight.numpy()

    def error(of: Quantized) -> float:
        return float(np.square(others @ read(of, tmp_path).T - expected).mean())

    assert error(solved) < 0.5 * error(quantized)
    model = product(quantized.weight)
    quantize(model, {str(quantized.weight.name): form}, {str(quantized.weight.name): solved.solution})
    [y] = run(model, tmp_path / "graph.onnx", x=others)
    assert np.square(y - expected).mean() < 0.6 * error(quantized), "a kernel multiplies by the solved numbers"


def test_inputs_that_no_sample_has_are_rounded_to_the_nearest(tensors: Mapping[str, TensorRef], tmp_path: Path) -> None:
    quantized = fitted(Quantized(tensor("q|transposed", tensors), True, PACKED_4))
    solved = Quantized(quantized.weight, True, quantized.form, solve(quantized, np.zeros((INPUTS, INPUTS), np.float32)))
    weight = quantized.weight.numpy().T
    assert np.square(read(solved, tmp_path) - weight).sum() <= np.square(read(quantized, tmp_path) - weight).sum()


@pytest.mark.parametrize("form", FORMS)
def test_a_tied_table_is_one_tensor(form: str, tensors: Mapping[str, TensorRef], tmp_path: Path) -> None:
    weight, ids = tensor("table|transposed", tensors), np.array([[0, 7, VOCABULARY - 1], [3, 3, 2]])
    model = tied(weight)
    assert in_form(model, FORMS[form]) == 2
    rows, logits = run(model, tmp_path / "graph.onnx", ids=ids)
    table = weight.numpy().T
    np.testing.assert_allclose(rows, table[ids], atol=np.abs(table).max() / 127)
    assert np.abs(logits - table[ids] @ table.T).max() < 0.02 * np.abs(logits).max()
    large = [value for value in model.graph.initializers.values() if value.const_value.size >= INPUTS * VOCABULARY]
    assert [value.dtype.itemsize for value in large] == [1], "one tensor, of bytes"
    empty = run(model, tmp_path / "graph.onnx", ids=np.zeros((2, 0), np.int64))
    assert [array.shape for array in empty] == [(2, 0, INPUTS), (2, 0, VOCABULARY)]


@pytest.mark.parametrize("form", FORMS)
def test_other_products_and_lookups_stay(form: str, tensors: Mapping[str, TensorRef]) -> None:
    """Of two computed values, and in a table of positions."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", INPUTS]))
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["rows"]))
    positions = initializer(tensor("table", tensors))
    looked_up = ir.node("Gather", [positions, ids], {"axis": 0})
    turned = ir.node("Transpose", [looked_up.outputs[0]], {"perm": [1, 0]})
    node = ir.node("MatMul", [x, turned.outputs[0]])
    nodes = [looked_up, turned, node]
    graph = ir.Graph([x, ids], node.outputs, nodes=nodes, initializers=[positions], opset_imports={"": 20}, name="g")
    model = ir.Model(graph, ir_version=10)
    model.metadata_props[TOKEN_TABLE] = "another"
    assert in_form(model, FORMS[form]) == 0
    assert [n.op_type for n in model.graph] == ["Gather", "Transpose", "MatMul"]


EXTREMES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "of one sign": np.ones_like,
    "of the weights' sign": np.sign,
    "of the other sign": lambda weight: -np.sign(weight),
}


@pytest.mark.parametrize("signs", EXTREMES)
def test_packed_products_of_the_largest_numbers_do_not_saturate(signs: str, tmp_path: Path) -> None:
    """All weights and activations at the ends of their ranges: the sums are exact in whatever a kernel adds up in."""
    weight = np.where(np.arange(4 * 64).reshape(4, 64) % 3 == 0, -1.0, 1.0).astype(np.float32)
    weight[0] = 1
    save_file({"w": torch.from_numpy(weight)}, tmp_path / "model.safetensors")
    model = product(tensor("w|transposed", stored_tensors(tmp_path)))
    in_form(model, PACKED_8)
    x = EXTREMES[signs](weight).astype(np.float32)
    [y] = run(model, tmp_path / "graph.onnx", x=x)
    np.testing.assert_allclose(y, x @ weight.T, rtol=2e-3, atol=0.1)  # scales of 1 / 127 are rounded up
