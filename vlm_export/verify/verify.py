"""Compare an exported repo with the golden PyTorch outputs, and decide.

For every dtype: the graphs' inputs and outputs against the family's declaration; every output and every `present.*` in
prefill and decode, for each golden case; then the generated tokens of every golden image, through ONNX Runtime here and
through stock transformers.js in Node. A report holds every check with its value and limit; no checks is not a pass.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from vlm_export.dtypes import FP32
from vlm_export.errors import InputError
from vlm_export.files import sha256
from vlm_export.manifest import ONNX, Manifest, load_manifest
from vlm_export.models import pixels
from vlm_export.recipe import Tolerance
from vlm_export.runtime.sessions import Arrays
from vlm_export.source.checkpoint import Checkpoint
from vlm_export.spec.family import Preprocessor
from vlm_export.spec.graph import Component
from vlm_export.targets import VERIFY_TARGETS, VerifyTarget
from vlm_export.verify.golden import GoldenFolder, array_sha256
from vlm_export.verify.in_files import check_own_files
from vlm_export.verify.in_node import verify_in_node
from vlm_export.verify.in_ort import verify_in_ort, verify_other_sizes
from vlm_export.verify.pixels_in_graph import PixelsInGraph
from vlm_export.verify.report import Report
from vlm_export.verify.verification import Verification
from vlm_export.web import node_runtime


def verify(
    repo: Path,
    merged: Checkpoint,
    golden: GoldenFolder,
    *,
    tolerances: tuple[Tolerance, ...] = (),
    runtimes: Sequence[VerifyTarget] = VERIFY_TARGETS,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Check the repo and return the report, passing or not.

    Raises:
        InputError: there is nothing to check, the golden was recorded from other inputs, or Node cannot be had.
    """
    manifest = load_manifest(repo)
    _check_comparable(repo, manifest, golden)
    layout = merged.family.layouts[manifest.layout]
    components = pixels.published(layout.components(merged.config), manifest.in_graph)
    run = Verification(repo, manifest, layout, components, golden, tolerances, progress)
    run.pixels = _pixels(repo, manifest, components)
    model_inputs = _golden_inputs(
        golden, merged.family.preprocessor(merged.path, merged.config, golden.facts.image_processor)
    )
    wanted = [runtime for runtime in runtimes if runtime != "node" or layout.client.node]
    if "node" in wanted:
        node_runtime.node_home()  # a missing Node is better told before the work than after it
    if "ort" in wanted:
        check_own_files(run, model_inputs)
    for name in manifest.verified:
        if "ort" in wanted and not verify_in_ort(run, name, model_inputs):
            continue
        if "ort" in wanted and name == FP32.name:
            verify_other_sizes(run, merged)
        if "node" in wanted:
            verify_in_node(run, name, model_inputs)
    passed = bool(run.checks) and not any(check.verdict == "fail" for check in run.checks)
    return Report(
        recipe=manifest.recipe,
        layout=manifest.layout,
        verdict="pass" if passed else "fail",
        runtimes=list(wanted),
        checks=run.checks,
        graphs_sha256={graph.file: sha256(repo / ONNX / graph.file) for graph in manifest.graphs},
        files_sha256={},
        golden_inputs_sha256=golden.facts.inputs_sha256,
        versions={"onnxruntime": version("onnxruntime"), "python": platform.python_version(), **run.versions},
        captions=run.captions,
    )


def _pixels(repo: Path, manifest: Manifest, components: Sequence[Component]) -> PixelsInGraph | None:
    """The part of the float32 vision graph that prepares pictures, if it does."""
    if not manifest.in_graph:
        return None
    tower = next(each for each in components if any(spec.name == pixels.PIXELS for spec in each.inputs))
    return PixelsInGraph(repo / ONNX / f"{tower.name}.onnx", manifest.in_graph)


def _check_comparable(repo: Path, manifest: Manifest, golden: GoldenFolder) -> None:
    if not manifest.graphs:
        raise InputError(f"{repo / 'export.json'}: lists no graphs: run `vlm-export onnx`")
    if golden.facts.inputs_sha256 != manifest.inputs_sha256:
        changed = sorted(
            name
            for name in golden.facts.inputs_sha256.keys() | manifest.inputs_sha256.keys()
            if golden.facts.inputs_sha256.get(name) != manifest.inputs_sha256.get(name)
        )
        raise InputError(
            f"{golden.path}: recorded from other inputs than were exported ({', '.join(changed)} differ): "
            f"run `vlm-export merge` and `vlm-export onnx`, or record anew with `vlm-export golden {manifest.recipe}`"
        )


def _golden_inputs(golden: GoldenFolder, preprocessor: Preprocessor) -> list[Arrays]:
    """What the golden images are fed as, made anew: it must be the very pixels that the golden was recorded on."""
    golden_inputs = [preprocessor.model_inputs(path, golden.facts.text) for path in golden.image_paths()]
    for image, model_inputs in zip(golden.facts.images, golden_inputs, strict=True):
        if array_sha256(model_inputs["pixel_values"]) != image.pixel_values_sha256:
            raise InputError(
                f"{golden.path / 'images' / image.file}: preprocessing gives other pixels than when the golden was "
                f"recorded (with Pillow {golden.facts.versions.get('pillow')}): install that version, or record anew "
                f"with `vlm-export golden {golden.facts.recipe}`"
            )
        if array_sha256(model_inputs["input_ids"]) != image.prompt_ids_sha256:
            raise InputError(
                f"{golden.path / 'images' / image.file}: the prompt has other ids than when the golden was recorded "
                f"(with transformers {golden.facts.versions.get('transformers')}): install that version, or record "
                f"anew with `vlm-export golden {golden.facts.recipe}`"
            )
    return golden_inputs
