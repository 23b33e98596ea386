"""The check of other sizes: right graphs pass; a size that a graph kept is named, with its axis and its tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pico_chat
import pytest
from exported import Exported, record, write_images

from vlm_export.verify import limits
from vlm_export.verify.report import Check, Report

DECODER = "decoder_model_merged"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("llava")
    pico_chat.write_adapter(folder / "adapter", pico_chat.write_llava(folder / "checkpoint"))
    write_images(folder / "images")
    golden = {"images": ["images/*.png"], "prompts": ["<image>a cat"]}
    made = record(folder, adapters=[{"path": "adapter"}], layout="chat", golden=golden)
    made.export("chat")
    return made


def edit(path: Path, change: Callable[[ir.Graph], None]) -> None:
    model = ir.load(path)
    change(model.graph)
    ir.save(model, path)


def constant(graph: ir.Graph, name: str, values: object) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.Tensor(np.array(values, dtype=np.int64), name=name))
    graph.register_initializer(value)
    return value


def put_behind(graph: ir.Graph, value: ir.Value, *nodes: ir.Node) -> None:
    """All that read the value read the last node's output; the nodes, which read the value themselves, come first."""
    value.replace_all_uses_with(nodes[-1].outputs[0])
    for node in nodes:
        for place, read in enumerate(node.inputs):
            if read is nodes[-1].outputs[0]:
                node.replace_input_with(place, value)
    graph.insert_before(graph[0], list(nodes))


def other_sizes(report: Report) -> list[Check]:
    return [check for check in report.checks if check.metric == limits.OTHER_SIZES]


def failures(report: Report) -> dict[tuple[str, str], str]:
    """What is wrong, by component and axis."""
    return {
        (check.component, check.detail.partition(":")[0]): check.detail
        for check in other_sizes(report)
        if check.verdict == "fail"
    }


def test_every_axis_of_a_right_repo(exported: Exported) -> None:
    report = exported.verify("ort")
    assert report.verdict == "pass"
    length = "sequence_length"
    assert {(check.component, check.detail) for check in other_sizes(report)} == {
        ("vision_encoder", "num_images 1, 2, 3, 13"),
        (DECODER, "batch_size 1, 2, 3"),
        (DECODER, "num_images 1, 2"),
        (DECODER, f"{length} 1, 2, 7, 33"),
        (DECODER, f"{length} after a past of 1 1, 2, 7, 33"),
        (DECODER, f"{length} after a past 1, 2, 7, 33"),
        (DECODER, "batch_size after a past of 1 1, 2, 3"),
        (DECODER, "batch_size, rows padded 3"),
    }
    assert all(0 <= check.value < 1e-5 for check in other_sizes(report))


def test_a_baked_batch_of_one(exported: Exported, tmp_path: Path) -> None:
    broken = exported.copy(tmp_path / "copy")

    def bake(graph: ir.Graph) -> None:
        logits = next(value for value in graph.outputs if value.name == "logits")
        sizes = constant(graph, "baked", [1, -1, logits.shape[-1]])
        node = ir.node("Reshape", [logits, sizes], name="baked_reshape")
        graph.append(node)
        made = node.outputs[0]
        made.type, made.shape, made.name = logits.type, logits.shape, "logits"
        logits.name = "logits_before"
        graph.outputs[list(graph.outputs).index(logits)] = made

    edit(broken.graph(DECODER), bake)
    found = failures(broken.verify("ort"))
    assert found[DECODER, "batch_size 2"].endswith("logits has shape [1, 288], not [2, 288]; right with 1")
    assert (DECODER, "sequence_length 1") not in found


def test_a_baked_length(exported: Exported, tmp_path: Path) -> None:
    """Positions that end at 30: no golden is so long."""
    broken = exported.copy(tmp_path / "copy")

    def bake(graph: ir.Graph) -> None:
        positions = next(value for value in graph.inputs if value.name == "position_ids")
        last = constant(graph, "last", 30)
        put_behind(graph, positions, ir.node("Min", [positions, last], name="baked"))

    edit(broken.graph(DECODER), bake)
    report = broken.verify("ort")
    found = failures(report)
    assert {check.metric for check in report.failures} == {limits.OTHER_SIZES}, "the golden does not see it"
    detail = found[DECODER, "sequence_length 33"]
    assert "present.0.key is not PyTorch's; right with 1, 2, 7" in detail
    assert (DECODER, "batch_size 2") not in found


def test_positions_that_count_padding(exported: Exported, tmp_path: Path) -> None:
    broken = exported.copy(tmp_path / "copy")

    def bake(graph: ir.Graph) -> None:
        by_name = {str(value.name): value for value in graph.inputs}
        positions, mask = by_name["position_ids"], by_name["attention_mask"]
        zero, step, axis = (constant(graph, f"const_{value}", value) for value in (0, 1, [0]))
        sizes = ir.node("Shape", [mask], name="sizes", attributes={"start": 1})
        total = ir.node("Squeeze", [sizes.outputs[0]], name="total")
        all_positions = ir.node("Range", [zero, total.outputs[0], step], name="all")
        new = ir.node("Shape", [positions], name="new", attributes={"start": 1})
        start = ir.node("Sub", [sizes.outputs[0], new.outputs[0]], name="start")
        last = ir.node("Slice", [all_positions.outputs[0], start.outputs[0], sizes.outputs[0]], name="last")
        row = ir.node("Unsqueeze", [last.outputs[0], axis], name="row")
        nothing = ir.node("Mul", [positions, zero], name="nothing")
        counted = ir.node("Add", [row.outputs[0], nothing.outputs[0]], name="counted")
        put_behind(graph, positions, sizes, total, all_positions, new, start, last, row, nothing, counted)

    edit(broken.graph(DECODER), bake)
    report = broken.verify("ort")
    assert {check.metric for check in report.failures} == {limits.OTHER_SIZES}, "the golden does not see it"
    [(where, detail)] = failures(report).items()
    assert where == (DECODER, "batch_size, rows padded 3")
    assert "present.0.key of row 2 is not PyTorch's" in detail


def test_a_tower_that_reads_four_images(exported: Exported, tmp_path: Path) -> None:
    broken = exported.copy(tmp_path / "copy")

    def bake(graph: ir.Graph) -> None:
        pixels = next(value for value in graph.inputs if value.name == "pixel_values")
        start, end = constant(graph, "start", [0]), constant(graph, "end", [4])
        put_behind(graph, pixels, ir.node("Slice", [pixels, start, end], name="baked"))

    edit(broken.graph("vision_encoder"), bake)
    detail = failures(broken.verify("ort"))["vision_encoder", "num_images 13"]
    assert "image_features has shape [4, " in detail
    assert "right with 1, 2, 3" in detail


def test_a_graph_that_refuses_a_size(exported: Exported, tmp_path: Path) -> None:
    broken = exported.copy(tmp_path / "copy")

    def bake(graph: ir.Graph) -> None:
        positions = next(value for value in graph.inputs if value.name == "position_ids")
        table = constant(graph, "table", list(range(30)))
        put_behind(graph, positions, ir.node("Gather", [table, positions], name="baked_gather"))

    edit(broken.graph(DECODER), bake)
    detail = failures(broken.verify("ort"))[DECODER, "sequence_length 33"]
    assert "ONNX Runtime:" in detail and "baked_gather" in detail and "right with 1, 2, 7" in detail
