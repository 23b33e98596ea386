"""A search with beams in the loop of layout single, beside transformers' and beside ours in Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import encoder_decoders
import numpy as np
import onnx
import pytest
import yaml
from exported import Exported, record, silent
from PIL import Image

from vlm_export import pipeline
from vlm_export.apps.load import load
from vlm_export.doctor.examine import examine
from vlm_export.doctor.repo_view import open_repo as view
from vlm_export.errors import InputError
from vlm_export.files import Work
from vlm_export.recipe import find_recipe, load_recipe
from vlm_export.runtime import Options
from vlm_export.verify import limits
from vlm_export.verify.golden import load_golden
from vlm_export.verify.report import Report

SEARCH = {"num_beams": 3, "length_penalty": 1.5, "early_stopping": "never"}
WAYS: list[dict[str, Any]] = [
    {},
    {"num_beams": 1, "repetition_penalty": 1.3},
    {"num_beams": 4, "length_penalty": 0.6, "early_stopping": True},
    {"num_beams": 5, "length_penalty": -1.0, "early_stopping": False},
    {"num_beams": 2, "length_penalty": 0.0, "min_new_tokens": 9, "no_repeat_ngram_size": 2},
    {"max_new_tokens": 1},
]


def pictures() -> list[Image.Image]:
    golden = find_recipe("shapes-captioner").golden_dir / "images"
    return [Image.open(path).convert("RGB") for path in sorted(golden.iterdir())]


@pytest.fixture(scope="module")
def unsure() -> list[Image.Image]:
    """Noise, and two pictures at once: what they are said to be depends on how a text is searched for."""
    values = np.random.default_rng(0)
    noise = [Image.fromarray(values.integers(0, 255, (48, 48, 3), dtype=np.uint8)) for _ in range(3)]
    first, second = pictures()[:2]
    return [*noise, Image.blend(first, second.resize(first.size), 0.5)]


@pytest.fixture(scope="module")
def shapes(unsure: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The bundled captioner as one file that searches, in float32 and q8."""
    folder = tmp_path_factory.mktemp("beams")
    bundled = find_recipe("shapes-captioner")
    (folder / "images").mkdir()
    for place, picture in enumerate([*unsure, *pictures()[:2]]):
        picture.save(folder / "images" / f"{place}.png")
    recipe = {
        "name": "shapes",
        "model": str(bundled.path.parent / bundled.recipe.model),
        "model_type": "prefix_conditioning_vlm",
        "generation": SEARCH,
        "golden": {"images": ["images/*.png"]},
        "hub": {"license": "apache-2.0"},
    }
    (folder / "shapes.yaml").write_text(yaml.safe_dump(recipe))
    made = Exported(load_recipe(folder / "shapes.yaml"), Work(folder / "work"))
    pipeline.run_golden(made.recipe, silent)
    pipeline.run_merge(made.recipe, made.work, silent)
    made.export("single", ["q8"])
    return made


@pytest.fixture(scope="module")
def encoder_decoder(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A pico ViT-GPT2, whose cross-attention has a row for each beam, as one file of several pictures."""
    folder = tmp_path_factory.mktemp("beams-of-encoder-decoder")
    encoder_decoders.write_checkpoint(folder / "checkpoint", encoder_decoders.config())
    rules = {"max_new_tokens": 8, "repetition_penalty": 1.2}
    made = record(folder, preprocess="client", layout="single", generation=rules | SEARCH)
    made.export("single")
    return made


def rates(report: Report) -> dict[str, float]:
    return {check.metric: check.value for check in report.checks if check.dtype == "fp32"}


@pytest.mark.node
@pytest.mark.browser
@pytest.mark.verifies("prefix_conditioning_vlm", "single", ort="fp32 q8", node="fp32", wasm="fp32")
def test_it_finds_what_pytorch_finds(shapes: Exported) -> None:
    golden = load_golden(shapes.recipe.golden_dir)
    assert golden.facts.search == SEARCH
    assert examine(view(shapes.work.repo)).found == ()
    for runtime in ("ort", "node", "wasm"):
        report = shapes.verify(runtime, dtypes=["fp32"])  # type: ignore[arg-type]
        assert report.verdict == "pass", report.failures
        assert rates(report)[limits.SEARCHED_EXACT] == rates(report)[limits.TOKENS_EXACT] == 1.0
    assert shapes.verify("ort", dtypes=["q8"]).verdict == "pass"


@pytest.mark.node
@pytest.mark.browser
@pytest.mark.verifies("vision-encoder-decoder", "single", ort="fp32", node="fp32", wasm="fp32")
def test_cross_attention_has_a_row_for_each_beam(encoder_decoder: Exported) -> None:
    images = load_golden(encoder_decoder.recipe.golden_dir).facts.images
    assert all(image.searched != image.token_ids for image in images), "a search finds other texts"
    for runtime in ("ort", "node", "wasm"):
        report = encoder_decoder.verify(runtime, dtypes=["fp32"])  # type: ignore[arg-type]
        assert report.verdict == "pass", report.failures
        assert rates(report)[limits.SEARCHED_EXACT] == rates(report)[limits.TOKENS_EXACT] == 1.0


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_it_searches_as_the_runtime_does(
    options: dict[str, Any], shapes: Exported, default_repo: Path, unsure: list[Image.Image]
) -> None:
    one, apart = load(shapes.work.repo, dtype="fp32"), load(default_repo, dtype="fp32")
    for picture in unsure:
        said = one.generate([picture], options=Options(**options))
        expected = apart.generate([picture], options=Options(**{**SEARCH, **options}))
        assert (said.token_ids, said.finish_reason) == (expected.token_ids, expected.finish_reason)
        if expected.score is not None:
            assert said.score == pytest.approx(expected.score, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_prompts_do_not_see_each_other(options: dict[str, Any], encoder_decoder: Exported) -> None:
    model = load(encoder_decoder.work.repo, dtype="fp32")
    pictures = [Image.open(path) for path in load_golden(encoder_decoder.recipe.golden_dir).image_paths()]
    options = {**options, "max_new_tokens": min(options.get("max_new_tokens", 12), 12)}
    alone = [model.generate([picture], options=Options(**options)).token_ids for picture in pictures]
    together = model.generate_batch([([picture], None) for picture in pictures], Options(**options))
    assert [answer.token_ids for answer in together] == alone


def test_a_search_is_for_layout_single(shapes: Exported) -> None:
    with pytest.raises(InputError, match=r"shapes\.yaml: generation\.num_beams: layout captioner is greedy"):
        shapes.export("captioner")


def test_a_golden_is_of_its_search(shapes: Exported) -> None:
    generation = replace(shapes.recipe.recipe.generation, num_beams=4)
    other = replace(shapes.recipe, recipe=replace(shapes.recipe.recipe, generation=generation))
    with pytest.raises(InputError, match="generation: changed since the golden was recorded"):
        Exported(other, shapes.work).verify("ort", dtypes=["fp32"])


def _cache_stays(body: onnx.GraphProto) -> None:
    """Keys and values of a beam go on with another's tokens."""
    for node in body.node:
        if node.op_type == "Gather" and not node.attribute and node.input[1] == "next.origins":
            node.op_type = "Identity"
            del node.input[1]


def _shorter_is_better(body: onnx.GraphProto) -> None:
    """What has ended is compared without regard to its length."""
    [node] = [node for node in body.node if node.output[0] == "next.per_length"]
    node.op_type = "Identity"
    del node.input[1]


@pytest.mark.parametrize("change, repo", [(_cache_stays, "encoder_decoder"), (_shorter_is_better, "shapes")])
def test_a_wrong_search_is_caught(
    change: Callable[[onnx.GraphProto], None], repo: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    made = request.getfixturevalue(repo).copy(tmp_path)
    path = made.graph("model")
    model = onnx.load(path)
    [loop] = [node for node in model.graph.node if node.op_type == "Loop"]
    change(loop.attribute[0].g)
    path.write_bytes(model.SerializeToString())
    report = made.verify("ort", dtypes=["fp32"])
    assert {check.metric for check in report.failures} == {limits.SEARCHED_EXACT}
