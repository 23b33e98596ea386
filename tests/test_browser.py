"""The bundled recipe's exports in a real browser: stock transformers.js on WASM says what PyTorch said.

Every test exports a repo, serves it at the Hub's addresses, opens `browser/page.html` in headless Chromium, and
compares the captions of the golden's pixels with the golden's, and the graphs that were fetched with those meant.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import Exported, silent
from PIL import Image

from vlm_export import bundled, pipeline
from vlm_export.apps.load import load
from vlm_export.files import Work
from vlm_export.manifest import load_manifest
from vlm_export.preprocessing import pixel_values
from vlm_export.recipe import find_recipe
from vlm_export.runtime.images import open_image
from vlm_export.verify.golden import GoldenImage, load_golden
from vlm_export.verify.limits import TOKENS_EXACT, limit_for
from vlm_export.web.node_runtime import Layout, node_home
from vlm_export.web.site_server import ISOLATION, SiteServer, files_under

BROWSER = Path(__file__).parent / "browser"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WASM = ("--disable-gpu",)
SOFTWARE_WEBGPU = (
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
    "--use-vulkan=swiftshader",
    "--ignore-gpu-blocklist",
)
MODEL = "tester/model"
RECIPE = find_recipe(bundled.DEFAULT_RECIPE)

Options = dict[str, str]
Export = Callable[[Layout, str], Path]


@dataclass(frozen=True)
class Inputs:
    """What PyTorch said of some images; in `folder` their `pixels.f32` of this `shape` and the same as PNG files."""

    folder: Path
    shape: tuple[int, ...]
    images: Sequence[GoldenImage]

    @property
    def urls(self) -> list[str]:
        return [f"/inputs/{image.file}" for image in self.images]


@dataclass(frozen=True)
class Visit:
    """What the page answered, and the files of the repo that it asked for."""

    answer: dict[str, Any]
    fetched: list[str]

    @property
    def graphs(self) -> list[str]:
        return sorted(file.removeprefix("onnx/") for file in self.fetched if file.startswith("onnx/"))

    @property
    def sessions(self) -> set[tuple[str, str]]:
        return {(session["device"], session["dtype"]) for session in self.answer["sessions"].values()}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports the bundled recipe in a layout, in fp32 and one more dtype, once each."""
    root = tmp_path_factory.mktemp("export")
    exported = Exported(RECIPE, Work(root / "work"))
    pipeline.run_merge(RECIPE, exported.work, silent)

    @cache
    def once(layout: Layout, dtype: str) -> Path:
        exported.export(layout, [dtype])
        return exported.work.repo.rename(root / f"{layout}-{dtype}")

    return once


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def write_inputs(folder: Path, count: int | None = None) -> Inputs:
    """The golden images, or the first of them.

    The PNG files are of the model's size, so that the browser, which resizes in a way of its own, need not.
    """
    golden = load_golden(RECIPE.golden_dir, RECIPE.name)
    pixels = pixel_values(golden.image_paths()[:count], golden.facts.image_processor)
    pixels.astype("<f4").tofile(folder / "pixels.f32")
    images = golden.facts.images[:count]
    for image, array in zip(images, pixels, strict=True):
        Image.fromarray(to_bytes(array, golden.facts.image_processor)).save(folder / image.file)
    return Inputs(folder, pixels.shape, images)


def to_bytes(pixels: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """The image `[H, W, 3] uint8` that these settings make `pixels` `[3, H, W] float32` of."""
    unit = pixels.transpose(1, 2, 0) * settings["image_std"] + settings["image_mean"]
    return (unit / settings["rescale_factor"]).round().astype(np.uint8)


def chromium() -> str:
    own = os.environ.get("CHROMIUM")
    path = next(filter(None, map(shutil.which, [own] if own else CHROMIUM_NAMES)), None)
    if path is None:
        looked_for = own or ", ".join(CHROMIUM_NAMES)
        pytest.fail(
            f"no Chromium ({looked_for}): install one, with `apt-get install chromium` on Debian, "
            "or set CHROMIUM to its path"
        )
    return path


def visit(
    repo: Path,
    layout: Layout,
    inputs: Inputs,
    options: Options,
    flags: Sequence[str] = WASM,
    images: Sequence[str] = (),
    asked: dict[str, str] | None = None,
    logs: Sequence[str] = (),
) -> Visit:
    """Captions the inputs' pixels in Chromium, then the `images`, with what a user passes as `options`.

    `asked` is the prompt of a chat, and the URL of the image that the pixels were made of; `logs` is all that the page
    may log.
    """
    packages = node_home() / "node_modules"
    repo_url = f"/{MODEL}/resolve/main/"
    folders = {
        "/": BROWSER,
        "/inputs/": inputs.folder,
        "/transformers/": packages / "@huggingface/transformers/dist",
        "/onnxruntime/": packages / "onnxruntime-web/dist",
        repo_url: repo,
    }
    request = {"id": MODEL, "layout": layout, "options": options, "shape": inputs.shape, "images": images}
    request |= {"asked": asked} if asked else {}
    with SiteServer(files_under(folders), ISOLATION) as server:
        result = drive(f"{server.url}/page.html", [["evaluate", f"run({json.dumps(request)})"]], flags)
    assert [answer for answer in server.answers if answer[0] not in (200, 206)] == []
    assert result["console"] == [*logs]
    assert result["foreign"] == []
    fetched = [
        path.removeprefix(repo_url) for status, path in server.answers if status == 200 and path.startswith(repo_url)
    ]
    (answer,) = result["answers"]
    return Visit(answer, fetched)


def drive(url: str, steps: Sequence[Sequence[Any]], flags: Sequence[str]) -> dict[str, Any]:
    job = {"chromium": chromium(), "flags": [*FLAGS, *flags], "url": url, "steps": steps, "seconds": 150}
    command = ["node", str(node_home(BROWSER) / "drive.mjs")]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def graphs(repo: Path, dtype: str) -> list[str]:
    return sorted(graph.file for graph in load_manifest(repo).graphs if graph.dtype == dtype)


def assert_golden(dtype: str, said: Sequence[object], golden: Sequence[object]) -> None:
    """As many of them are equal as `vlm-export verify` demands."""
    different = [(one, other) for one, other in zip(said, golden, strict=True) if one != other]
    limit = limit_for(TOKENS_EXACT, [dtype], RECIPE.recipe.tolerances)
    assert limit is not None
    assert limit.holds(1 - len(different) / len(golden)), different


@pytest.mark.verifies("prefix_conditioning_vlm", "captioner", wasm="fp32 int8 q8")
@pytest.mark.verifies("prefix_conditioning_vlm", "chat", wasm="fp32 q8")
@pytest.mark.parametrize(
    ("layout", "exported_dtype", "options", "dtype"),
    [
        pytest.param("captioner", "q8", {}, "q8", id="captioner"),
        pytest.param("captioner", "q8", {"dtype": "fp32"}, "fp32", id="captioner-fp32"),
        pytest.param("captioner", "int8", {}, "fp32", id="captioner-without-q8"),  # int8 is slow there
        pytest.param("captioner", "int8", {"dtype": "int8"}, "int8", id="captioner-int8"),
        pytest.param("chat", "q8", {}, "q8", id="chat"),
        pytest.param("chat", "q8", {"dtype": "fp32"}, "fp32", id="chat-fp32"),
    ],
)
def test_wasm(
    export: Export, inputs: Inputs, layout: Layout, exported_dtype: str, options: Options, dtype: str
) -> None:
    repo = export(layout, exported_dtype)
    images = inputs.urls if layout == "captioner" else []
    seen = visit(repo, layout, inputs, options, images=images)
    assert seen.sessions == {("wasm", dtype)}
    assert seen.graphs == graphs(repo, dtype)
    assert seen.answer["isolated"], "the headers that allow threads have no effect"

    captions, golden = seen.answer["captions"], inputs.images
    assert_golden(dtype, [caption["token_ids"] for caption in captions], [image.token_ids for image in golden])
    assert_golden(dtype, [caption["text"] for caption in captions], [image.caption for image in golden])
    if images:
        assert_golden(dtype, seen.answer["image_texts"], [image.caption for image in golden])


def in_onnxruntime(repo: Path, dtype: str, inputs: Inputs) -> list[list[int]]:
    """The tokens of the same graphs and pixels here."""
    model = load(repo, dtype=dtype, backend="onnx")
    return [list(model.generate([open_image(inputs.folder / image.file)]).token_ids) for image in inputs.images]


@pytest.mark.parametrize("dtype", ["fp16", "uint8", "q4", "q4f16", "bnb4", "q2", "q2f16"])
def test_every_dtype_in_wasm(export: Export, tmp_path: Path, dtype: str) -> None:
    """In the browser's default build; `verify` and `bench` run them in Node and in the plain build."""
    repo, inputs = export("captioner", "all"), write_inputs(tmp_path, count=2)
    seen = visit(repo, "captioner", inputs, {"dtype": dtype})
    assert seen.sessions == {("wasm", dtype)}
    assert seen.graphs == graphs(repo, dtype)
    said = [caption["token_ids"] for caption in seen.answer["captions"]]
    assert said == in_onnxruntime(repo, dtype, inputs)


@pytest.mark.parametrize("dtype", ["uint8", "q4", "bnb4", "q2"])
def test_every_dtype_in_webgpu(export: Export, tmp_path: Path, dtype: str) -> None:
    """The software adapter has no float16, so that fp16, q4f16 and q2f16 can only be run on another."""
    repo, inputs = export("captioner", "all"), write_inputs(tmp_path, count=1)
    seen = visit(repo, "captioner", inputs, {"device": "webgpu", "dtype": dtype}, SOFTWARE_WEBGPU)
    assert seen.sessions == {("webgpu", dtype)}
    assert [caption["token_ids"] for caption in seen.answer["captions"]] == in_onnxruntime(repo, dtype, inputs)


@pytest.mark.verifies("prefix_conditioning_vlm", "captioner", webgpu="fp32 int8 q8")
@pytest.mark.parametrize(("options", "dtype"), [({}, "fp32"), ({"dtype": "q8"}, "q8"), ({"dtype": "int8"}, "int8")])
def test_webgpu(export: Export, tmp_path: Path, options: Options, dtype: str) -> None:
    """On a software adapter, which takes seconds for one image."""
    repo, inputs = export("captioner", "int8" if dtype == "int8" else "q8"), write_inputs(tmp_path, count=1)
    seen = visit(repo, "captioner", inputs, {"device": "webgpu"} | options, SOFTWARE_WEBGPU)
    assert seen.sessions == {("webgpu", dtype)}
    assert seen.graphs == graphs(repo, dtype)
    assert [caption["token_ids"] for caption in seen.answer["captions"]] == [i.token_ids for i in inputs.images]


def test_no_chromium(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROMIUM", "/nowhere/chromium")
    with pytest.raises(pytest.fail.Exception, match=r"no Chromium \(/nowhere/chromium\): install one, .* set CHROMIUM"):
        chromium()
