"""The bundled recipe's exports in a real browser: stock transformers.js on WASM says what PyTorch said.

Every test opens the package's own page in headless Chromium, and compares the captions of the golden's pixels with the
golden's, and the graphs that were fetched with those meant.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import Exported, as_fed_to, silent
from PIL import Image
from safetensors.torch import load_file, save_file

from vlm_export import bundled, pipeline
from vlm_export.apps.load import load
from vlm_export.errors import CheckFailed, InputError
from vlm_export.files import Work
from vlm_export.manifest import load_manifest
from vlm_export.preprocessing import pixel_values
from vlm_export.publish import gate
from vlm_export.recipe import find_recipe
from vlm_export.runtime.images import open_image
from vlm_export.source.checkpoint import open_checkpoint
from vlm_export.targets import BrowserTarget, Target
from vlm_export.verify import limits, verify
from vlm_export.verify.golden import GoldenFolder, GoldenImage, load_golden
from vlm_export.verify.limits import TOKENS_EXACT, limit_for
from vlm_export.verify.report import RUNS, Report
from vlm_export.web import chromium
from vlm_export.web.captions import Item, Layout
from vlm_export.web.chromium import SOFTWARE_WEBGPU, WASM, BrowserCaptions, caption

RECIPE = find_recipe(bundled.DEFAULT_RECIPE)

FLAGS: dict[BrowserTarget, tuple[str, ...]] = {"wasm": WASM, "webgpu": SOFTWARE_WEBGPU}

Export = Callable[[Layout, str], Path]


@dataclass(frozen=True)
class Inputs:
    """What PyTorch said of some images, the pixels `[N, 3, H, W] float32` that it was fed, and the same as PNG."""

    folder: Path
    pixels: np.ndarray
    images: Sequence[GoldenImage]

    def items(self, repo: Path) -> list[Item]:
        return [Item(pixel_values=as_fed_to(repo, pixels[None]), prompt="<image>") for pixels in self.pixels]

    @property
    def files(self) -> list[Item]:
        return [Item(self.folder / image.file) for image in self.images]


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
    golden = load_golden(RECIPE.golden_dir)
    pixels = pixel_values(golden.image_paths()[:count], golden.facts.image_processor)
    images = golden.facts.images[:count]
    for image, array in zip(images, pixels, strict=True):
        Image.fromarray(to_bytes(array, golden.facts.image_processor)).save(folder / image.file)
    return Inputs(folder, pixels, images)


def to_bytes(pixels: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """The image `[H, W, 3] uint8` that these settings make `pixels` `[3, H, W] float32` of."""
    unit = pixels.transpose(1, 2, 0) * settings["image_std"] + settings["image_mean"]
    return (unit / settings["rescale_factor"]).round().astype(np.uint8)


def visit(
    repo: Path,
    layout: Layout,
    items: Sequence[Item],
    dtype: str = "auto",
    target: BrowserTarget = "wasm",
    logs: Sequence[str] = (),
) -> BrowserCaptions:
    """Captions the items in Chromium, which finds all that it asks for; `logs` is all that the page may log."""
    seen = caption(repo, layout=layout, dtype=dtype, items=items, generation={}, target=target, flags=FLAGS[target])
    assert seen.missing == ()
    assert seen.warnings == tuple(logs)
    return seen


def graphs_fetched(seen: BrowserCaptions) -> list[str]:
    return sorted(file.removeprefix("onnx/") for file in seen.files if file.startswith("onnx/"))


def tokens(seen: BrowserCaptions) -> list[list[int]]:
    return [list(made.token_ids) for made in seen.captions]


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
    ("layout", "exported_dtype", "asked", "dtype"),
    [
        pytest.param("captioner", "q8", "auto", "q8", id="captioner"),
        pytest.param("captioner", "int8", "auto", "fp32", id="captioner-without-q8"),  # int8 is slow there
        pytest.param("captioner", "int8", "int8", "int8", id="captioner-int8"),
        pytest.param("chat", "q8", "auto", "q8", id="chat"),
        pytest.param("chat", "q8", "fp32", "fp32", id="chat-fp32"),
    ],
)
def test_wasm(export: Export, inputs: Inputs, layout: Layout, exported_dtype: str, asked: str, dtype: str) -> None:
    repo = export(layout, exported_dtype)
    files = inputs.files if layout == "captioner" else []
    seen = visit(repo, layout, [*inputs.items(repo), *files], asked)
    assert seen.dtypes == {dtype}
    assert graphs_fetched(seen) == graphs(repo, dtype)
    assert seen.isolated, "the headers that allow threads have no effect"

    count, golden = len(inputs.images), inputs.images
    assert_golden(dtype, tokens(seen)[:count], [image.token_ids for image in golden])
    said = [made.text for made in seen.captions]
    assert_golden(dtype, said[:count], [image.caption for image in golden])
    if files:
        assert_golden(dtype, said[count:], [image.caption for image in golden])


def in_onnxruntime(repo: Path, dtype: str, inputs: Inputs) -> list[list[int]]:
    """The tokens of the same graphs and pixels here."""
    model = load(repo, dtype=dtype, backend="onnx")
    return [list(model.generate([open_image(inputs.folder / image.file)]).token_ids) for image in inputs.images]


@pytest.mark.parametrize("dtype", ["fp16", "uint8", "q4", "q4f16", "bnb4", "q2", "q2f16"])
def test_every_dtype_in_wasm(export: Export, tmp_path: Path, dtype: str) -> None:
    """In the browser's default build; `verify` runs them in Node, and `bench` in the plain build."""
    repo, inputs = export("captioner", "all"), write_inputs(tmp_path, count=2)
    seen = visit(repo, "captioner", inputs.items(repo), dtype)
    assert seen.dtypes == {dtype}
    assert graphs_fetched(seen) == graphs(repo, dtype)
    assert tokens(seen) == in_onnxruntime(repo, dtype, inputs)


@pytest.mark.parametrize("dtype", ["uint8", "q4", "bnb4", "q2"])
def test_every_dtype_in_webgpu(export: Export, tmp_path: Path, dtype: str) -> None:
    """The software adapter has no float16, so that fp16, q4f16 and q2f16 can only be run on another."""
    repo, inputs = export("captioner", "all"), write_inputs(tmp_path, count=1)
    seen = visit(repo, "captioner", inputs.items(repo), dtype, "webgpu")
    assert seen.dtypes == {dtype}
    assert tokens(seen) == in_onnxruntime(repo, dtype, inputs)


@pytest.mark.verifies("prefix_conditioning_vlm", "captioner", webgpu="fp32 int8 q8")
@pytest.mark.parametrize(("asked", "dtype"), [("auto", "fp32"), ("q8", "q8"), ("int8", "int8")])
def test_webgpu(export: Export, tmp_path: Path, asked: str, dtype: str) -> None:
    """On a software adapter, which takes seconds for one image."""
    repo, inputs = export("captioner", "int8" if dtype == "int8" else "q8"), write_inputs(tmp_path, count=1)
    seen = visit(repo, "captioner", inputs.items(repo), asked, "webgpu")
    assert seen.dtypes == {dtype}
    assert graphs_fetched(seen) == graphs(repo, dtype)
    assert tokens(seen) == [image.token_ids for image in inputs.images]


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The bundled recipe in fp32, fp16 and q8."""
    made = Exported(RECIPE, Work(tmp_path_factory.mktemp("default") / "work"))
    pipeline.run_merge(RECIPE, made.work, silent)
    made.export("captioner", ["fp16", "q8"])
    return made


def verified(made: Exported, *runtimes: Target, dtypes: Sequence[str] = (), count: int = 2) -> Report:
    """What `verify` finds in runtimes, with the first of the golden images."""
    whole = load_golden(RECIPE.golden_dir)
    golden = GoldenFolder(whole.path, replace(whole.facts, images=whole.facts.images[:count]), whole.tensors)
    merged = open_checkpoint(made.work.merged)
    return verify.verify(made.work.repo, merged, golden, runtimes=runtimes, dtypes=dtypes)


@pytest.mark.verifies("prefix_conditioning_vlm", "captioner", ort="fp32 q8", node="fp32 q8", wasm="fp32 q8")
def test_the_default_recipe_says_the_same_in_ort_node_and_wasm(default: Exported) -> None:
    """All of its golden images: in fp32 PyTorch's tokens everywhere; in q8 ONNX Runtime's, and its scores."""
    report = pipeline.run_verify(RECIPE, default.work, silent, runtimes=("ort", "node", "wasm"), dtypes=("fp32", "q8"))
    assert report.verdict == "pass", report.failures
    found = {(c.runtime, c.dtype, c.metric): c for c in report.checks if c.component == "all"}
    for runtime in ("ort", "node", "wasm"):
        exact = found[runtime, "fp32", TOKENS_EXACT]
        assert (exact.value, exact.detail) == (1.0, "20 of 20 images")
    for client in ("node", "wasm"):
        assert found[client, "q8", limits.TOKENS_AS_ORT].value == 1.0
        for dtype in ("fp32", "q8"):
            assert found[client, dtype, limits.LOGITS].verdict == "pass"
            assert found[client, dtype, limits.LOGITS].value < 1e-5
    assert report.versions.keys() >= {"wasm: chromium", "wasm: transformers", "node: node"}
    with pytest.raises(CheckFailed, match=r"says nothing of fp16: run `vlm-export verify` without --dtype"):
        gate.check_verified(default.work)


def test_webgpu_and_what_its_adapter_cannot_run(default: Exported) -> None:
    """Scores are compared too: captions were right while attention in software was wrong by half of the largest value.

    What an adapter has no float16 for is neither right nor wrong, and said; asked for by name, it is refused.
    """
    report = verified(default, "webgpu", count=1)
    assert report.verdict == "pass", report.failures
    found = {(check.dtype, check.metric): check for check in report.checks}
    assert found["fp32", TOKENS_EXACT].value == found["q8", limits.TOKENS_AS_ORT].value == 1.0
    assert found["fp32", limits.LOGITS].verdict == found["q8", limits.LOGITS].verdict == "pass"
    adapter = chromium.find_adapter(chromium.find_chromium())
    assert report.versions["webgpu: adapter"] == str(adapter)
    if adapter.float16:
        assert found["fp16", TOKENS_EXACT].value == 1.0
        return
    assert (found["fp16", RUNS].verdict, report.verified_dtypes) == ("left-out", ["fp32", "q8"])
    assert found["fp16", RUNS].detail == f"the WebGPU adapter ({adapter}) has no float16 (shader-f16)"
    with pytest.raises(InputError, match=r"^--dtype fp16 --runtime webgpu: the WebGPU adapter \(.*no float16"):
        verified(default, "webgpu", dtypes=("fp32", "fp16"))


def test_a_model_too_slow_in_software_is_not_called_wrong(default: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor right: a report of nothing else is no pass."""
    if not chromium.find_adapter(chromium.find_chromium()).software:
        pytest.skip("this machine has an adapter of its own")
    monkeypatch.setitem(caption.__kwdefaults__, "silence_seconds", 0.5)
    report = verified(default, "webgpu", dtypes=("fp32",))
    [check] = report.checks
    assert (check.verdict, report.verdict, report.failed_dtypes) == ("left-out", "fail", [])
    assert check.detail.startswith("too slow in software: ") and "no answer for 0.5 s" in check.detail


@pytest.fixture
def broken(default: Exported, tmp_path: Path) -> Exported:
    """A copy that the test spoils."""
    return Exported(RECIPE, Work(Path(shutil.copytree(default.work.root, tmp_path / "work"))))


def test_another_models_weights_in_a_file_of_q8(broken: Exported, tmp_path: Path) -> None:
    """A decoder that is right in all else."""
    other = Exported(RECIPE, Work(tmp_path / "other"))
    shutil.copytree(broken.work.merged, other.work.merged)
    path = other.work.merged / "model.safetensors"
    changed = {name: -value if "down_proj" in name else value for name, value in load_file(path).items()}
    save_file(changed, path)
    other.export("captioner", ["q8"])
    wrong = "decoder_model_merged_quantized.onnx"
    shutil.copyfile(other.work.repo / "onnx" / wrong, broken.work.repo / "onnx" / wrong)
    report = verified(broken, "wasm", dtypes=("fp32", "q8"))
    assert [(check.dtype, check.runtime, check.metric) for check in report.failures] == [("q8", "wasm", TOKENS_EXACT)]


def test_a_file_that_is_missing(broken: Exported) -> None:
    (broken.work.repo / "onnx" / "encoder_model_quantized.onnx").unlink()
    [failure] = verified(broken, "wasm", dtypes=("q8",)).failures
    assert (failure.dtype, failure.runtime, failure.metric) == ("q8", "wasm", RUNS)
    assert "encoder_model_quantized.onnx" in failure.detail


def test_no_chromium(default: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROMIUM", "/nowhere/chromium")
    with pytest.raises(InputError, match=r"^no Chromium \(CHROMIUM is /nowhere/chromium\): install one, "):
        verified(default, "ort", "wasm")
    monkeypatch.setenv("CHROMIUM", shutil.which("false") or "")
    with pytest.raises(InputError, match=r"/false does not start \(.*\): set CHROMIUM to the path of another, or run"):
        verified(default, "wasm")


def test_a_page_that_says_nothing_is_left_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:  # not pytest's: Chromium's sockets take no path of its length
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        with pytest.raises(CheckFailed, match="no answer for 5 s"):
            chromium.drive("about:blank", [["evaluate", "new Promise(() => {})"]], WASM, silence_seconds=5)
        assert list(Path(folder).iterdir()) == []
