"""Numbers that float16 does not hold: found on sample inputs, told, and computed in float32."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import exported
import numpy as np
import onnx_ir as ir
import onnxruntime
import pico
import pytest
from exported import Exported
from safetensors.torch import load_file, save_file

from vlm_export import pipeline
from vlm_export.commands import Commands
from vlm_export.dtypes import DTYPES
from vlm_export.graph.graph_cache import GraphCache
from vlm_export.graph.graph_file import save_graph
from vlm_export.graph.onnxsim_process import Onnxsim
from vlm_export.manifest import Manifest
from vlm_export.quantize.calibration import Run
from vlm_export.quantize.half import converted
from vlm_export.quantize.masks import LARGEST, masked
from vlm_export.quantize.ranges import measure
from vlm_export.quantize.variants import Source, Variant
from vlm_export.source.checkpoint import open_checkpoint
from vlm_export.spec.graph import Component, TensorSpec
from vlm_export.verify import limits
from vlm_export.verify.causes import explain
from vlm_export.wanted import parse

ROOT = Path(__file__).parents[1]
DECODER, TOWER = "decoder_model_merged", "encoder_model"
# Where numbers become too large, by the weight on disk that is multiplied: the component, and what is named.
PLANTED = {
    "the residual": ("layers.0.mlp.down_proj.weight", DECODER, "mlp.down_proj"),
    "between two products": ("layers.1.mlp.up_proj.weight", DECODER, "mlp.up_proj"),
    "the cache": ("layers.1.self_attn.v_proj.base_layer.weight", DECODER, "self_attn.v_proj"),
    "the tower": ("layers.0.mlp.fc2.weight", TOWER, "mlp.fc2"),
    "what one graph gives another": ("projection.projection.weight", TOWER, "projection.projection"),
}


def larger(ending: str, times: float = 1e6) -> Callable[[pico.Tensors], None]:
    """Multiply the decoder's or the tower's weights of that name."""

    def change(tensors: pico.Tensors) -> None:
        found = [name for name in tensors if name.endswith(ending)]
        assert len(found) == 1
        tensors[found[0]] *= times

    return change


def export(made: Exported, *dtypes: str) -> tuple[Manifest, list[str]]:
    """Its manifest, and what was told meanwhile."""
    told: list[str] = []
    wanted = parse(dtypes, "a test")
    return pipeline.run_export(made.recipe, made.work, exported.silent, wanted=wanted, notify=told.append), told


def source(made: Exported, component: str) -> Source:
    """What the variants of a component are made of."""
    merged = open_checkpoint(made.work.merged)
    cache = GraphCache(merged, "captioner", keep=True, retrace=False, notify=print)
    [declared] = [each for each in cache.components if each.name == component]
    with Onnxsim() as onnxsim:
        skeleton, _ = cache.find(declared) or cache.trace(declared, onnxsim)
    return Source(declared, skeleton, merged.tensors)


@pytest.mark.parametrize("place", PLANTED)
def test_what_float16_does_not_hold_is_told_and_stays_in_float32(place: str, tmp_path: Path) -> None:
    weight, component, named = PLANTED[place]
    made = exported.prepare(tmp_path, change=larger(weight))
    manifest, told = export(made, "fp16")
    found = manifest.ranges[component]
    assert found.largest > 65504 and found.headroom < 1 and 0 < found.in_float32 < found.values
    assert named in found.begins
    assert f"fp16: {component}: {found.remedy}" in told
    assert found.remedy in (made.work.repo / "README.md").read_text()
    report = made.verify("ort")
    assert report.verdict == "pass"
    exact = {check.dtype: check.value for check in report.checks if check.metric == limits.TOKENS_EXACT}
    assert exact == {"fp32": 1.0, "fp16": 1.0}


def test_without_that_the_graph_gives_no_numbers_and_verify_says_what_to_do(tmp_path: Path) -> None:
    made = exported.prepare(tmp_path, change=larger(PLANTED["the residual"][0]))
    export(made, "fp16")
    plain = Variant(source(made, DECODER), DTYPES["fp16"])
    save_graph(plain.make(), made.work.repo / "onnx" / plain.file)
    report = made.verify("ort")
    assert report.failed_dtypes == ["fp16"]
    cause, _ = explain(report, Commands(" pico", "", ""))
    assert cause.startswith(f"fp16: {DECODER}, ")
    assert "is not finite: it passes 65504, where float16 ends, on inputs that were not measured" in cause
    assert "fp32, which is the same in float32" in cause


def test_a_trained_captioner_says_the_same_with_a_residual_past_float16(tmp_path: Path) -> None:
    """All that is added to the residual is 4000 times as large: norms make nothing of it, and the best token stays."""
    shutil.copytree(ROOT / "recipes" / "shapes-captioner" / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "images").mkdir()
    for path in sorted((ROOT / "golden" / "shapes-captioner" / "images").iterdir())[:4]:
        shutil.copy(path, tmp_path / "images")
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    added = ("embed_tokens.weight", "o_proj.base_layer.weight", "o_proj.lora_B.default.weight", "down_proj.weight")
    for name, weight in weights.items():
        if name.startswith("projection.") or name.endswith(added):
            weight *= 4000
    save_file(weights, tmp_path / "checkpoint" / "model.safetensors", metadata={"format": "pt"})
    made = exported.record(tmp_path, generation={"max_new_tokens": 30})
    manifest, told = export(made, "fp16", "q4f16", "q2f16")
    assert [line.split(": ")[:2] for line in told] == [["fp16, q4f16, q2f16", name] for name in (TOWER, DECODER)]
    assert 200_000 < manifest.ranges[DECODER].largest < 400_000
    report = made.verify("ort")
    exact = {check.dtype: check.value for check in report.checks if check.metric == limits.TOKENS_EXACT}
    assert exact == dict.fromkeys(("fp32", "fp16", "q4f16", "q2f16"), 1.0)


def test_where_nothing_is_too_large_no_byte_differs(tmp_path: Path) -> None:
    made = exported.prepare(tmp_path, preprocess="client")
    manifest, told = export(made, "fp16")
    assert told == []
    assert set(manifest.ranges) == {DECODER, TOWER}
    for component, found in manifest.ranges.items():
        assert (
            found.in_float32 == 0
            and 1 < found.largest < 1000
            and found.headroom == pytest.approx(LARGEST / found.largest, rel=0.01)
        )
        plain = Variant(source(made, component), DTYPES["fp16"])
        save_graph(plain.make(), tmp_path / "plain.onnx")
        assert (tmp_path / "plain.onnx").read_bytes() == (made.work.repo / "onnx" / plain.file).read_bytes()


MASKED = """
    <ir_version: 10, opset_import: ["": 20]>
    g (float[rows, 3] scores, bool[rows, 3] is_seen) => (float[rows, 3] probabilities)
    <float none = {0}, float lowest = {-3.4028235e38}, float[rows, 3] mask, float[rows, 3] masked_scores>
    {
        mask = Where (is_seen, none, lowest)
        masked_scores = Add (scores, mask)
        probabilities = Softmax (masked_scores)
    }
"""
COMPONENT = Component(
    "masked",
    lambda model: model,
    (TensorSpec("scores", "float32", ("rows", 3)), TensorSpec("is_seen", "bool", ("rows", 3))),
    (TensorSpec("probabilities", "float32", ("rows", 3)),),
)


def test_numbers_that_only_mask_do_not_count() -> None:
    model = ir.from_onnx_text(MASKED)
    assert {value.name for value in masked(model.graph)} == {"lowest", "mask", "masked_scores"}
    feeds = {
        "scores": np.array([[-30, 4, 20], [7, 7, 90_000]], np.float32),
        "is_seen": np.array([[True, True, False], [True, False, False]]),
    }
    seen = measure(model, [Run(feeds, False)])
    assert seen.values == {"scores": 90_000, "mask": 0, "masked_scores": 30, "probabilities": 1}
    assert seen.too_large == {"scores"}
    half = ir.to_proto(converted(model, COMPONENT)).SerializeToString()
    [probabilities] = onnxruntime.InferenceSession(half).run(None, feeds | {"scores": feeds["scores"] / 2})
    assert probabilities[1].tolist() == [1, 0, 0] and probabilities[0, 2] == 0


def test_a_constant_that_does_more_than_mask_counts() -> None:
    model = ir.from_onnx_text(MASKED.replace("Softmax (masked_scores)", "Add (masked_scores, mask)"))
    assert masked(model.graph) == {}
    feeds = {"scores": np.zeros((1, 3), np.float32), "is_seen": np.array([[True, True, False]])}
    assert {"lowest", "mask", "masked_scores", "probabilities"} == measure(model, [Run(feeds, False)]).too_large
