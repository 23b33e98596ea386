"""What a client is fed, as stages of verify: prompt ids, pixels, ends. Each names what differs, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pico_chat
import pytest
import yaml
from PIL import Image

from vlm_export import pipeline
from vlm_export.commands import Commands
from vlm_export.files import Work
from vlm_export.recipe import RecipeFile, load_recipe
from vlm_export.targets import Target
from vlm_export.verify import limits
from vlm_export.verify.causes import explain
from vlm_export.verify.report import Check, Report

Change = Callable[[dict[str, Any]], None]
OF_FILES = (limits.PROMPT_IDS, limits.ENDS, limits.PIXELS, limits.PIXELS_FROM_FILE)


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def slope(height: int, width: int) -> np.ndarray:
    """Dark at the top left, blue at the bottom."""
    down, across = np.mgrid[0:height, 0:width]
    return np.stack([across * 255 / width, (across + down) * 120 / width, down * 255 / height], -1).astype(np.uint8)


PICTURES: dict[str, Callable[[Path], None]] = {
    "0.png": lambda path: Image.fromarray(slope(32, 32)).save(path),
    "1.jpg": lambda path: Image.fromarray(noise(40, 24, 3)).resize((240, 400)).save(path, quality=95),
    "2-grey-alpha.png": lambda path: Image.fromarray(noise(16, 16, 2), "LA").save(path),
    "3-alpha.png": lambda path: Image.fromarray(noise(16, 16, 4), "RGBA").save(path),
    "4-16-bits.png": lambda path: Image.fromarray(noise(16, 16).astype(np.uint16) * 257).save(path),
}


def write(folder: Path) -> RecipeFile:
    pico_chat.write_llava(folder / "base")
    (folder / "images").mkdir()
    for name, save in PICTURES.items():
        save(folder / "images" / name)
    recipe = {
        "name": "m",
        "model": "base",
        "layout": "chat",
        "generation": {"max_new_tokens": 6},
        "golden": {"images": ["images/*"], "prompts": [pico_chat.CONVERSATION]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return load_recipe(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    recipe, work = write(folder), Work(folder / "work")
    pipeline.run_golden(recipe, silent)
    pipeline.run_merge(recipe, work, silent)
    pipeline.run_export(recipe, work, silent)
    return folder


def verified(folder: Path, *runtimes: Target) -> Report:
    asked = runtimes or ("ort", "node")
    return pipeline.run_verify(load_recipe(folder / "recipe.yaml"), Work(folder / "work"), silent, runtimes=asked)


def of_files(report: Report) -> dict[tuple[str, str], Check]:
    return {(check.runtime, check.metric): check for check in report.checks if check.metric in OF_FILES}


def test_all_agree_and_odd_pictures_are_named(exported: Path) -> None:
    report = verified(exported)
    assert report.verdict == "pass", report.failures
    checks = of_files(report)
    assert checks.keys() == {
        *(("ort", metric) for metric in (limits.PROMPT_IDS, limits.ENDS, limits.PIXELS)),
        *(("node", metric) for metric in (limits.PROMPT_IDS, limits.ENDS, limits.PIXELS_FROM_FILE)),
    }
    assert all(check.verdict == "pass" for check in checks.values())
    assert checks["ort", limits.PIXELS].value == pytest.approx(0, abs=1e-6)
    assert checks["ort", limits.PIXELS].detail.endswith("of 5 pictures")
    detail = checks["node", limits.PIXELS_FROM_FILE].detail
    assert "of 2 pictures; not judged: 2-grey-alpha.png (grey with transparency, which transformers.js" in detail
    assert "3-alpha.png (transparent), 4-16-bits.png (more than 8 bits)" in detail
    [from_file] = [check for check in report.checks if check.metric == limits.FROM_FILE_EXACT]
    assert "2-grey-alpha.png from token 1 (grey with transparency" in from_file.detail


FAULTS: dict[str, tuple[str, Change, set[tuple[str, str]], str]] = {
    "another template": (
        "tokenizer_config.json",
        lambda values: values.update(chat_template=values["chat_template"].replace("assistant:", "answer:")),
        {("ort", limits.PROMPT_IDS), ("node", limits.PROMPT_IDS)},
        "the repo's tokenizer or chat template makes other prompt ids than PyTorch was fed",
    ),
    "another splitting": (
        "tokenizer.json",
        lambda values: values.update(normalizer={"type": "Replace", "pattern": {"String": "it"}, "content": "this"}),
        {("ort", limits.PROMPT_IDS), ("node", limits.PROMPT_IDS)},
        "the repo's tokenizer or chat template makes other prompt ids than PyTorch was fed",
    ),
    "another end": (
        "generation_config.json",
        lambda values: values.update(eos_token_id=[100, 101]),
        {("ort", limits.ENDS), ("node", limits.ENDS)},
        "the repo's generation_config.json ends texts elsewhere than the model does",
    ),
    "another mean": (
        "preprocessor_config.json",
        lambda values: values.update(image_mean=[0.9, 0.9, 0.9]),
        {("ort", limits.PIXELS), ("node", limits.PIXELS_FROM_FILE)},
        "the repo's preprocessor_config.json makes other pixels than PyTorch was fed",
    ),
    "another crop": (
        "preprocessor_config.json",
        lambda values: values.update(size={"shortest_edge": 32}),
        {("ort", limits.PIXELS), ("node", limits.PIXELS_FROM_FILE)},
        "the repo's preprocessor_config.json makes other pixels than PyTorch was fed",
    ),
    "a number where sides have names": (
        "preprocessor_config.json",
        lambda values: values.update(size=32, crop_size=16),
        {("ort", limits.PIXELS), ("node", limits.PIXELS_FROM_FILE)},
        "the repo's preprocessor_config.json makes other pixels than PyTorch was fed",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_stage_that_differs_is_named(fault: str, exported: Path, tmp_path: Path) -> None:
    file, change, expected, cause = FAULTS[fault]
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "work" / "repo" / file
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    report = verified(tmp_path)
    assert {key for key, check in of_files(report).items() if check.verdict == "fail"} == expected
    assert report.verdict == "fail"
    assert cause in explain(report, Commands(" m", "", ""))[0]


@pytest.mark.browser
def test_in_a_browser(exported: Path, tmp_path: Path) -> None:
    """Its own tokenizer, template, canvas and rules; and it names each that was changed."""
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    report = verified(tmp_path, "wasm")
    assert report.verdict == "pass", report.failures
    of = (limits.PROMPT_IDS, limits.ENDS, limits.PIXELS_FROM_FILE)
    assert of_files(report).keys() == {("wasm", metric) for metric in of}
    for fault in ("another splitting", "another end", "another mean"):
        file, change, _, _ = FAULTS[fault]
        path = tmp_path / "work" / "repo" / file
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
    failed = {key for key, check in of_files(verified(tmp_path, "wasm")).items() if check.verdict == "fail"}
    assert failed == {("wasm", metric) for metric in of}
