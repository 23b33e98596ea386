"""A tower whose activations are too coarse is caught and named, where no other limit would."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from exported import Exported, silent

from vlm_export import bundled, pipeline
from vlm_export.commands import Commands
from vlm_export.files import Work
from vlm_export.recipe import Tolerance, find_recipe
from vlm_export.verify import limits
from vlm_export.verify.causes import explain
from vlm_export.verify.report import Report

ACTIVATIONS = ("MatMul", "Add", "Gelu", "LayerNormalization", "MultiHeadAttention")
LENIENT = tuple(
    Tolerance(metric, "int8", limit, "so that nothing but a collapse can fail")
    for metric, limit in (
        (limits.COSINE_SIMILARITY, -1.0),
        (limits.TOKENS_EXACT, 0.0),
        (limits.TOP1_AGREEMENT, 0.0),
    )
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The bundled captioner, trained, in float32 and int8."""
    exported = Exported(find_recipe(bundled.DEFAULT_RECIPE), Work(tmp_path_factory.mktemp("shapes")))
    pipeline.run_merge(exported.recipe, exported.work, silent)
    exported.export(dtypes=["int8"])
    return exported


@pytest.fixture
def spoil(shapes: Exported, tmp_path: Path) -> Callable[[Callable[[ir.Graph], None]], Report]:
    """Changes the int8 tower of a copy, and verifies it under limits that let any output and any token pass."""

    def verified(change: Callable[[ir.Graph], None]) -> Report:
        recipe = replace(shapes.recipe, recipe=replace(shapes.recipe.recipe, tolerances=LENIENT))
        spoilt = Exported(recipe, Work(tmp_path / "work"))
        shutil.copytree(shapes.work.root, spoilt.work.root)
        path = spoilt.graph("encoder_model_int8")
        model = ir.load(path)
        change(model.graph)
        ir.save(model, path)
        return spoilt.verify("ort")

    return verified


def quantize_dequantize(graph: ir.Graph, values: Sequence[ir.Value], levels: int) -> None:
    """Round each value to so many levels between its least and its largest element, for all that read it."""
    steps = ir.Value(name="steps", const_value=ir.Tensor(np.array(levels - 1, dtype=np.float32), name="steps"))
    graph.register_initializer(steps)
    for value in values:
        readers, producer = list(value.uses()), value.producer()
        assert producer is not None
        nodes: list[ir.Node] = []

        def add(kind: str, *inputs: ir.Value, nodes: list[ir.Node] = nodes, **attributes: int) -> ir.Value:
            nodes.append(ir.node(kind, inputs, attributes))
            return nodes[-1].outputs[0]

        least = add("ReduceMin", value, keepdims=0)
        step = add("Div", add("Sub", add("ReduceMax", value, keepdims=0), least), steps)
        level = add("Round", add("Div", add("Sub", value, least), step))
        rounded = add("Add", add("Mul", level, step), least)
        graph.insert_after(producer, nodes)
        for reader, index in readers:
            reader.replace_input_with(index, rounded)


def activations(graph: ir.Graph) -> list[ir.Value]:
    """Everything between two operators of the tower's layers."""
    return [node.outputs[0] for node in graph if node.op_type in ACTIVATIONS and not node.outputs[0].is_graph_output()]


def test_a_tower_of_four_levels_is_named_a_collapse(spoil: Callable[[Callable[[ir.Graph], None]], Report]) -> None:
    report = spoil(lambda graph: quantize_dequantize(graph, activations(graph), 4))
    assert report.verdict == "fail"
    assert {check.metric: check.dtype for check in report.failures} == {
        limits.IMAGE_SWAP: "int8",
        limits.LOOPING_CAPTIONS: "int8",
    }
    cause, _ = explain(report, Commands(" shapes-captioner", "", ""))
    assert cause.startswith(
        "int8: it has collapsed: its tokens hardly depend on the image and it says the same words again and again; "
        "take another dtype: fp32; captions in ort: 0 of 20 images as PyTorch's"
    )


def test_a_tower_that_gives_the_same_of_every_image(spoil: Callable[[Callable[[ir.Graph], None]], Report]) -> None:
    def forget(graph: ir.Graph) -> None:
        nothing = ir.Value(name="nothing", const_value=ir.Tensor(np.array(0, dtype=np.float32), name="nothing"))
        graph.register_initializer(nothing)
        pixels = next(value for value in graph.inputs if value.name == "pixel_values")
        [(patches, place)] = pixels.uses()
        black = ir.node("Mul", [pixels, nothing])
        graph.insert_before(patches, black)
        patches.replace_input_with(place, black.outputs[0])

    report = spoil(forget)
    assert {check.metric for check in report.failures} == {limits.IMAGE_SWAP, limits.DISTINCT_CAPTIONS}
    [distinct] = [check for check in report.failures if check.metric == limits.DISTINCT_CAPTIONS]
    assert distinct.detail.startswith("1 distinct captions of 20 images, 20 in PyTorch; not told apart: 00.png")
    assert (
        "its tokens hardly depend on the image and it says the same of different images"
        in explain(report, Commands(" s", "", ""))[0]
    )


def test_four_levels_of_one_layer_are_coarse_and_no_collapse(
    spoil: Callable[[Callable[[ir.Graph], None]], Report],
) -> None:
    report = spoil(lambda graph: quantize_dequantize(graph, [_last_layer(graph)], 4))
    assert report.verdict == "pass"
    swap = [check.value for check in report.checks if check.metric == limits.IMAGE_SWAP]
    assert swap[0] == pytest.approx(1, abs=1e-3) and 0.5 < swap[1] < 0.95, "fp32, int8"


def _last_layer(graph: ir.Graph) -> ir.Value:
    """What the tower's last norm reads."""
    norms = [node for node in graph if node.op_type == "LayerNormalization"]
    found = norms[-1].inputs[0]
    assert found is not None
    return found
