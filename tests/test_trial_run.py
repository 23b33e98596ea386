"""A graph that ONNX Runtime does not run is never called done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pico
import pytest
from exported import prepare

from vlm_export.errors import CheckFailed
from vlm_export.graph import trial_run
from vlm_export.models import attention
from vlm_export.spec.graph import Component, TensorSpec


def component(inputs: tuple[TensorSpec, ...]) -> Component:
    return Component("graph", lambda model: model, inputs, ())


def parse(text: str) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]> {text}')


X = TensorSpec("x", "float32", ("batch_size", 6))


def test_a_graph_that_runs() -> None:
    trial_run.run_once(parse("g (float[batch_size, 6] x) => (float[a, b] y) { y = Relu (x) }"), component((X,)), "g")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("g (float[batch_size, 6] x) => (float[a, b] y) { y = Unheard (x) }", "Unheard"),
        (
            "g (float[batch_size, 6] x) => (float[a, b] y) <int64[2] s = { -1, 5 }> { y = Reshape (x, s) }",
            "cannot be reshaped",
        ),
    ],
    ids=["when it loads", "when it runs"],
)
def test_one_that_does_not(text: str, problem: str) -> None:
    with pytest.raises(CheckFailed, match=rf"^graph.onnx: ONNX Runtime cannot run it: .*{problem}") as failure:
        trial_run.run_once(parse(text), component((X,)), "graph.onnx")
    assert "\n" not in str(failure.value)


def test_a_decoder_is_run_with_a_past_too() -> None:
    """Right without one, wrong with one: 3 positions are added to a past of another length."""
    past = TensorSpec("past_key_values.0.key", "float32", ("batch_size", 1, "past_sequence_length", 6))
    model = parse("""
        g (float[batch_size, 1, p, 6] past) => (float[a, b, c, 6] y)
        <int64[4] s = { 2, 1, 0, 6 }> { y = Reshape <allowzero = 1> (past, s) }""")
    model.graph.inputs[0].name = past.name
    with pytest.raises(CheckFailed, match="cannot be reshaped"):
        trial_run.run_once(model, component((past,)), "graph.onnx")


def test_weights_are_not_read() -> None:
    def never() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    weight = ir.LazyTensor(never, dtype=ir.DataType.FLOAT, shape=ir.Shape([6, 600]), name="w")
    value = ir.Value(name="w", type=ir.TensorType(weight.dtype), shape=weight.shape, const_value=weight)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch_size", 6]))
    node = ir.node("MatMul", [x, value])
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 20}, name="g")
    model = ir.Model(graph, ir_version=10)
    trial_run.run_once(model, component((X,)), "g")
    assert model.graph.initializers["w"].const_value is weight, "the model is as it was"
    assert np.shape(weight) == (6, 600)


def test_an_export_that_does_not_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 12, were they given to an operator that takes multiples of 8 only."""
    settings = pico.config()
    settings["text_config"] |= {"head_dim": 12}
    made = prepare(tmp_path, settings)
    monkeypatch.setattr(attention, "HEAD_MULTIPLE", 1)
    with pytest.raises(CheckFailed, match=r"^decoder_model_merged.onnx: ONNX Runtime cannot run it: .*multiple of 8"):
        made.export()
    assert not made.work.repo.exists()
