"""`preprocess: graph`: the vision graph resizes and normalizes pictures of any size as Pillow does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pico
import pico_chat
import pytest
from exported import Exported, record, silent
from PIL import Image

from vlm_export import pipeline
from vlm_export.apps.load import load
from vlm_export.errors import InputError
from vlm_export.manifest import load_manifest
from vlm_export.models import pixels
from vlm_export.models.pixels import PIXELS, Steps
from vlm_export.publish.findings import PAGE
from vlm_export.quantize.full_precision import PREPARED
from vlm_export.runtime.images import ImageProcessor, open_image
from vlm_export.spec.graph import Component, TensorSpec
from vlm_export.verify import limits
from vlm_export.verify.pixels_in_graph import PixelsInGraph
from vlm_export.verify.saved import load_report

SIZES = ((16, 16), (31, 40), (300, 200))  # width and height
PLAIN = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 16, "width": 16}}
CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 20},
    "crop_size": {"height": 16, "width": 16},
    "do_center_crop": True,
    "resample": 3,
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}


def write_pictures(folder: Path) -> None:
    """Seeded noise, the hardest to resize, in several sizes."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for index, (width, height) in enumerate(SIZES):
        noise = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")


def prepare(folder: Path, **recipe: Any) -> Exported:
    pico.write_checkpoint(folder / "checkpoint")
    write_pictures(folder / "images")
    return record(folder, preprocess="graph", **recipe)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    made = prepare(tmp_path_factory.mktemp("captioner"))
    made.export("captioner", ["fp16", "q8"])
    return made


def metrics(made: Exported, metric: str, runtime: str = "ort") -> dict[str, float]:
    """Values of a metric by dtype."""
    report = made.verify("ort", "node")
    return {c.dtype: c.value for c in report.checks if (c.metric, c.runtime) == (metric, runtime)}


@pytest.mark.node
@pytest.mark.parametrize("layout", ["captioner", "chat"])
def test_every_runtime_sees_the_same(tmp_path: Path, layout: str) -> None:
    made = prepare(tmp_path)
    made.export(layout, ["fp16", "q8"])
    report = made.verify("ort", "node")
    assert report.verdict == "pass", report.failures
    found = {(c.metric, c.runtime, c.dtype): c.value for c in report.checks if c.component in ("all", "files")}
    assert found[limits.PIXELS, "ort", "fp32"] < 1e-6
    assert found[limits.PIXELS_FROM_FILE, "node", "fp32"] < 1e-6
    assert found[limits.TOKENS_EXACT, "node", "fp32"] == 1
    assert found[limits.FROM_FILE_EXACT, "node", "fp32"] == 1, "noise, and made smaller: by a client it is not the same"
    photographs = {each.file: each for each in report.from_files if not each.is_golden}
    assert len(photographs) == 6
    plain = [each for each in photographs.values() if not each.peculiarity]
    assert {each.file for each in plain} == {"astronaut.jpg", "cat.jpg", "coffee.jpg", "photographer-grey.jpg"}
    assert all(each.pixel_difference is not None and each.pixel_difference < 0.05 for each in plain)
    assert all(each.text == each.expected for each in plain)
    [in_graph] = [c for c in report.checks if c.metric == limits.PIXELS_IN_GRAPH]
    assert in_graph.value <= 1 and in_graph.detail.endswith("of 21 pictures")


def test_a_client_that_resizes_sees_something_else(tmp_path: Path) -> None:
    """What the graph is for: the same checkpoint and pictures, prepared by the client."""
    pico.write_checkpoint(tmp_path / "checkpoint")
    write_pictures(tmp_path / "images")
    made = record(tmp_path, preprocess="client")
    made.export("captioner")
    assert load_manifest(made.work.repo).in_graph == {}
    found = metrics(made, limits.PIXELS_FROM_FILE, "node")
    assert found["fp32"] > 0.01
    report = load_report(made.work)
    assert report is not None
    photographs = [each for each in report.from_files if not each.is_golden and not each.peculiarity]
    assert all(each.pixel_difference is not None and each.pixel_difference > 1 for each in photographs)
    assert {each.file for each in report.from_files if each.is_golden} == {"0.png", "1.png", "2.png"}
    page = (made.work.report / PAGE).read_text(encoding="utf-8")
    assert "From image files" in page and all(each.file in page for each in photographs)


def test_kinds_that_decoders_read_in_different_ways_are_named(exported: Exported) -> None:
    report = exported.verify("node")
    kinds = {each.file: each.peculiarity for each in report.from_files}
    assert kinds["cat-transparent.png"] == "transparent"
    assert kinds["photographer-16-bits.png"] == "more than 8 bits"
    [rate] = [c for c in report.checks if (c.metric, c.dtype) == (limits.PHOTOGRAPHS, "fp32")]
    assert rate.verdict == "reported" and "of 255" in rate.detail
    assert not [c for c in report.checks if (c.metric, c.dtype) == (limits.PHOTOGRAPHS, "q8")], "of one dtype"


def test_preprocess_by_itself(tmp_path: Path) -> None:
    """The graph prepares a captioner's pictures; of a chat the client does, which may feed several of any sizes."""
    pico.write_checkpoint(tmp_path / "checkpoint")
    write_pictures(tmp_path / "images")
    made = record(tmp_path)
    for layout, expected in (("captioner", True), ("chat", False)):
        made.export(layout)
        assert bool(load_manifest(made.work.repo).in_graph) is expected


def test_a_captioner_that_the_graph_cannot_prepare_pictures_for(tmp_path: Path) -> None:
    pico.write_checkpoint(tmp_path / "checkpoint")
    write_pictures(tmp_path / "images")
    made = record(tmp_path, image_processor={"resample": 1})
    said: list[str] = []
    pipeline.run_export(made.recipe, made.work, silent, notify=said.append)
    assert load_manifest(made.work.repo).in_graph == {}
    [line] = said
    assert line.startswith("the client resizes pictures, each in its own way: resample 1 has no operator")


def test_what_the_repo_says(exported: Exported) -> None:
    settings = json.loads((exported.work.repo / "preprocessor_config.json").read_text())
    assert not any(settings[name] for name in ("do_resize", "do_rescale", "do_normalize", "do_center_crop"))
    in_graph = load_manifest(exported.work.repo).in_graph
    assert in_graph["do_resize"] and in_graph["size"] == {"height": 16, "width": 16}
    pixel_values = onnxruntime.InferenceSession(exported.graph("encoder_model")).get_inputs()[0]
    assert pixel_values.shape == ["batch_size", 3, "height", "width"]


def test_float16_prepares_pictures_in_float32(exported: Exported) -> None:
    graph = ir.load(exported.work.repo / "onnx" / "encoder_model_fp16.onnx").graph
    [made] = [node for node in graph if any(value.name == PREPARED for value in node.outputs)]
    assert [use.node.op_type for use in made.outputs[0].uses()] == ["Cast"]


def test_pytorch_in_its_place_sees_the_same_pictures(exported: Exported) -> None:
    """The fallback prepares pictures itself, though the repo's processor is told to do nothing."""
    ours, theirs = (load(exported.work.repo, dtype="fp32", backend=name) for name in ("onnx", "torch"))
    for path in sorted((exported.work.root.parent / "images").glob("*.png")):
        said = [list(model.generate([open_image(path)]).token_ids) for model in (ours, theirs)]
        assert said[0] == said[1]


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        pytest.param(PLAIN | {"resample": 2}, SIZES, id="bilinear"),
        pytest.param(PLAIN | {"resample": 3}, SIZES, id="bicubic"),
        pytest.param(CLIP, SIZES, id="shorter side and crop"),
        pytest.param(CLIP | {"crop_size": {"height": 15, "width": 13}}, SIZES, id="odd crop"),
        pytest.param(CLIP | {"size": {"height": 21, "width": 18}}, SIZES, id="size and crop"),
        pytest.param(PLAIN | {"do_normalize": False}, SIZES, id="without normalizing"),
        pytest.param(PLAIN | {"do_resize": False}, ((16, 16),), id="without resizing"),
    ],
)
def test_steps_are_those_of_the_processor(
    tmp_path: Path, settings: dict[str, Any], sizes: tuple[tuple[int, int], ...]
) -> None:
    graph = steps_alone(tmp_path, settings)
    in_graph = PixelsInGraph(graph, settings)
    random = np.random.default_rng(1)
    for width, height in sizes:
        picture = Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8))
        expected = ImageProcessor(settings)([picture]).arrays[PIXELS]
        found = in_graph.made_of(np.moveaxis(np.asarray(picture), -1, 0)[None])
        assert found.shape == expected.shape
        steps = Steps.of(settings)
        assert np.abs(steps.bytes_of(found) - steps.bytes_of(expected)).max() <= 1.01
        again = in_graph.made_of(steps.undone(expected))
        assert np.abs(again - expected).max() < 1e-5, "a golden's pixels come through as they are"


def steps_alone(folder: Path, settings: dict[str, Any]) -> Path:
    """A graph of the steps alone."""
    text = Steps.of(settings).text().replace(pixels.TRACED, "made")
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 20]> steps (float[batch_size, 3, height, width] {PIXELS}) '
        f"=> (float[b, 3, h, w] made) {{ {text} }}"
    )
    [made] = model.graph.outputs
    made.name = PREPARED
    ir.save(model, folder / "steps.onnx")
    return folder / "steps.onnx"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PLAIN | {"resample": 1}, "resample 1 has no operator"),
        (CLIP | {"size": {"shortest_edge": 12}}, "crop_size is larger than what is left"),
        ({"image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 32}}, "makes tiles of pictures"),
    ],
)
def test_steps_that_a_graph_cannot_do(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"preprocess: graph: .*{message}.*: set `preprocess: client`"):
        Steps.of(settings)


@pytest.mark.parametrize(
    "shape", [("batch_size", "num_images", 3, 16, 16), ("num_images", 3, "height", "width")], ids=["tiles", "any size"]
)
def test_towers_that_take_something_else(shape: tuple[int | str, ...]) -> None:
    inputs = [TensorSpec(PIXELS, "float32", shape)]
    inputs += [TensorSpec("pixel_attention_mask", "bool", shape)] if len(shape) == 5 else []
    tower = Component("vision_encoder", lambda model: model, tuple(inputs), ())
    with pytest.raises(InputError, match="preprocess: graph: the model takes"):
        pixels.published([tower], PLAIN)


@pytest.mark.parametrize("settings", [PLAIN | {"do_resize": False}, CLIP | {"do_center_crop": False}, CLIP], ids=str)
def test_steps_that_make_another_size_than_the_tower_takes(settings: dict[str, Any]) -> None:
    tower = Component("encoder_model", lambda model: model, (TensorSpec(PIXELS, "float32", ("b", 3, 18, 18)),), ())
    with pytest.raises(InputError, match=r"preprocess: graph: the steps make pictures of .*the tower takes \(18, 18\)"):
        pixels.published([tower], settings)


def spoil_filter(graph: ir.Graph) -> None:
    [resize] = [node for node in graph if node.op_type == "Resize"]
    resize.attributes["mode"] = ir.AttrString("mode", "linear")


def spoil_coefficient(graph: ir.Graph) -> None:
    """OpenCV's bicubic."""
    [resize] = [node for node in graph if node.op_type == "Resize"]
    resize.attributes["cubic_coeff_a"] = ir.AttrFloat32("cubic_coeff_a", -0.75)


@pytest.mark.parametrize("spoil", [spoil_filter, spoil_coefficient])
def test_a_wrong_resize_is_caught(exported: Exported, tmp_path: Path, spoil: Callable[[ir.Graph], None]) -> None:
    broken = exported.copy(tmp_path / "copy")
    model = ir.load(broken.graph("encoder_model"))
    spoil(model.graph)
    ir.save(model, broken.graph("encoder_model"))
    report = broken.verify("ort")
    failed = {(check.component, check.metric) for check in report.failures}
    assert ("encoder_model", limits.PIXELS_IN_GRAPH) in failed


def test_several_pictures_of_one_conversation(tmp_path: Path) -> None:
    """Pictures of several sizes cannot be run together; each is."""
    pico_chat.write_llava(tmp_path / "checkpoint")
    write_pictures(tmp_path / "images")
    golden = {"images": ["images/*.png"], "prompts": ["<image>a cat"]}
    made = record(tmp_path, preprocess="graph", layout="chat", golden=golden)
    made.export("chat")
    assert made.verify("ort").verdict == "pass"
    model = load(made.work.repo, backend="onnx")
    pictures = [open_image(path) for path in sorted((tmp_path / "images").glob("*.png"))]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "a cat"}]
    assert model.generate(pictures[1:], [{"role": "user", "content": content}]).token_ids
