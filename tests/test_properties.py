"""Of whatever stands at a door of the package: it is taken, or it is refused in one line. By Hypothesis."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad.requests import asking, post, served
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_export.apps.openai_format import ApiError, ChatRequest, parse
from vlm_export.errors import LONGEST_LINE, InputError, one_line, shown
from vlm_export.forms import generation, image_processor, model_config, reading, tokenizer
from vlm_export.merging.adapter_settings import read_settings
from vlm_export.recipe import Recipe, load_recipe
from vlm_export.runtime import Model
from vlm_export.runtime.images import ImageProcessor, open_image

FEW = settings(
    max_examples=40,
    deadline=None,
    database=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TEXTS = st.text(max_size=12) | st.sampled_from(["\ud800", "a\nb", "\0", "../x", "x" * 3000, "{{ 1 // 0 }}", "(a+)+$"])
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**30, -1, 2**63, 1e308, 5e-324])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def documents(keys: Sequence[str]) -> st.SearchStrategy[dict[str, Any]]:
    """JSON objects, most of whose keys are known at their door."""
    return st.dictionaries(st.sampled_from(sorted(keys)) | TEXTS, VALUES, max_size=6)


def taken(call: Callable[[], Any]) -> Any:
    """What a door gives; None where it refuses, in one line."""
    try:
        return call()
    except InputError as error:
        line = one_line(f"error: {error}")
        assert len(line) <= LONGEST_LINE and line.isprintable() and line.count("\n") == 0
    return None


FORMS = {
    "config.json": [*model_config._KINDS, *model_config._SECTIONS, "model_type", "architectures", "rope_parameters"],
    "generation_config.json": generation.Generation.model_fields,
    "preprocessor_config.json": image_processor.OfPatches.model_fields,
    "processor_config.json": image_processor.Processor.model_fields,
    "tokenizer_config.json": tokenizer.Tokenizer.model_fields,
}


@pytest.mark.parametrize("name", FORMS)
def test_json_of_a_model(name: str, tmp_path: Path) -> None:
    @FEW
    @given(documents(list(FORMS[name])))
    def check(values: dict[str, Any]) -> None:
        (tmp_path / name).write_text(json.dumps(values))
        taken(lambda: reading.json_of(tmp_path, name))

    check()


@FEW
@given(st.binary(max_size=60) | TEXTS.map(lambda text: text.encode(errors="surrogatepass")))
@example(b"{" * 5000)
@example(b"\xff\xfe{}")
def test_what_is_no_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    taken(lambda: reading.json_of(tmp_path, "config.json"))


@FEW
@given(documents(["target_modules", "exclude_modules", "rank_pattern", "r", "lora_alpha", "peft_type", "bias"]))
def test_settings_of_an_adapter(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **values}))
    taken(lambda: read_settings(tmp_path))


RECIPE = {"name": "t", "model": "base"}


@FEW
@given(documents([field.name for field in fields(Recipe)]))
def test_a_recipe(tmp_path: Path, values: dict[str, Any]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(RECIPE | values, allow_unicode=False))
    found = taken(lambda: load_recipe(path))
    assert found is None or found.name


@FEW
@given(st.text(max_size=80) | st.binary(max_size=40).map(lambda data: data.decode("latin-1")))
@example("a: &a [*a, *a]")
@example("name: t\nname: u\nmodel: x")
@example("[" * 300)
@example("a: !!python/object/apply:os.system [x]")
def test_a_text_in_place_of_a_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    taken(lambda: load_recipe(path))


def picture(form: str) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(made, form)
    return made.getvalue()


@FEW
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]),
    st.integers(0, 200),
    st.binary(max_size=8),
    st.booleans(),
)
def test_a_picture(tmp_path: Path, form: str, place: int, other: bytes, is_cut: bool) -> None:
    data = picture(form)
    path = tmp_path / "picture.png"
    path.write_bytes(data[:place] + other + (b"" if is_cut else data[place + len(other) :]))
    found = taken(lambda: open_image(path))
    assert found is None or found.mode == "RGB"


@FEW
@given(documents(["size", "patch_size", "merge_size", "min_pixels", "max_pixels", "crop_size", "image_mean"]))
def test_settings_of_an_image_processor_make_pixels(tmp_path: Path, values: dict[str, Any]) -> None:
    """What is taken can be used, on a picture of few pixels."""
    for kind in ("SiglipImageProcessor", "CLIPImageProcessor", "Qwen2VLImageProcessor", "PixtralImageProcessor"):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**values, "image_processor_type": kind}))
        read = taken(lambda: reading.json_of(tmp_path, "preprocessor_config.json"))
        small = read is not None and all(_is_small(value) for value in read.values())
        if small and (made := taken(lambda found=read: ImageProcessor(found))) is not None:
            taken(lambda processor=made: processor([Image.new("RGB", (9, 7))]))


def _is_small(value: Any) -> bool:
    each = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return all(not isinstance(one, int) or abs(one) <= 300 for one in each)


@FEW
@given(documents([*ChatRequest.model_fields]))
def test_the_body_of_a_request(values: dict[str, Any]) -> None:
    try:
        parse(json.dumps(asking() | values).encode())
    except ApiError as error:
        assert 400 <= error.status < 500
        assert len(error.message) < LONGEST_LINE and error.message.isprintable()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return served(tmp_path_factory.mktemp("served"))


@settings(FEW, max_examples=30)
@given(documents([*ChatRequest.model_fields]))
def test_a_request(model: Model, values: dict[str, Any]) -> None:
    status, answer = post(model, json.dumps(asking(max_tokens=3) | values).encode())
    assert status in (200, 400, 404), answer


@FEW
@given(TEXTS | st.text(max_size=500))
def test_a_line_is_a_line(text: str) -> None:
    for line in (one_line(text), one_line(f"error: {shown(text)}: do this")):
        assert len(line) <= LONGEST_LINE and line.isprintable()
