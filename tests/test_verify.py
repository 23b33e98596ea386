"""A right repo passes; each way to break one fails, with a message that says what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pico
import pytest
import torch
from exported import Exported, failed_graphs, prepare, record, silent
from onnxruntime.quantization import quantize_dynamic
from PIL import Image

from vlm_export import pipeline
from vlm_export.apps.load import load
from vlm_export.cli.output import report_lines
from vlm_export.commands import Commands
from vlm_export.errors import CheckFailed, InputError
from vlm_export.graph.rewrites.kept_rows import KEPT
from vlm_export.publish import gate
from vlm_export.runtime.model import ModelFailed
from vlm_export.runtime.options import Options
from vlm_export.source.checkpoint import open_checkpoint
from vlm_export.targets import Target
from vlm_export.verify import golden, limits, verify
from vlm_export.verify.causes import explain
from vlm_export.verify.report import RUNS, SATURATION, Check, Report

DECODER = "decoder_model_merged"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    made = prepare(tmp_path_factory.mktemp("exported"))
    made.export("captioner", ["int8"])
    return made


@pytest.fixture
def broken(exported: Exported, tmp_path: Path) -> Exported:
    """A copy that the test spoils."""
    return exported.copy(tmp_path / "copy")


def edit(path: Path, change: Callable[[ir.Model], None]) -> None:
    model = ir.load(path)
    change(model)
    ir.save(model, path)


def messages(report: Report) -> str:
    return "\n".join(f"{c.component} {c.dtype} {c.metric}: {c.detail}" for c in report.failures)


def test_passes_and_names_every_graph(exported: Exported) -> None:
    report = exported.verify("ort")
    assert report.verdict == "pass"
    assert set(report.graphs_sha256) == {f"{g}{s}.onnx" for g in ("encoder_model", DECODER) for s in ("", "_int8")}
    stored = json.loads((exported.work.report / "report.json").read_text())
    assert stored["verdict"] == "pass"
    assert {"component", "dtype", "runtime", "metric", "value", "limit", "verdict"} <= stored["checks"][0].keys()
    assert "**pass**" in (exported.work.repo / "README.md").read_text()


def test_compares_every_output_in_prefill_and_decode_at_both_batches(exported: Exported) -> None:
    details = [c.detail for c in exported.verify("ort").checks if (c.dtype, c.metric) == ("fp32", "max_relative_error")]
    outputs = ("logits", *(f"present.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")))
    phases = ("prefill", "decode step 1", "decode step 2", "decode step 3")
    for batch, seen in ((1, (*phases, "3 tokens in one step")), (2, phases)):
        for phase in seen:
            for output in outputs:
                assert any(f"{output} (" in d and f"batch {batch}, {phase}" in d for d in details), (output, phase)


def test_a_half_precision_checkpoint_verifies_in_float32(tmp_path: Path) -> None:
    def cast(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    made = prepare(tmp_path, change=cast)
    made.export()
    assert made.verify("ort").verdict == "pass"


def test_a_flipped_weight_fails_where_it_shows(broken: Exported) -> None:
    def flip(model: ir.Model) -> None:
        attention = "language_model.model.layers.1.self_attn"
        packed = "+".join(f"{attention}.{part}_proj.weight" for part in "qkv")
        value = model.graph.initializers[packed]
        weights = value.const_value.numpy().copy()
        keys = weights[:, len(weights) : len(weights) + (weights.shape[1] - len(weights)) // 2]
        place = np.unravel_index(np.abs(keys).argmax(), keys.shape)
        keys[place] = -keys[place]
        value.const_value = ir.Tensor(weights, name=value.name)

    edit(broken.graph(DECODER), flip)
    report = broken.verify("ort")
    assert report.verdict == "fail"
    assert failed_graphs(report) == {DECODER}
    assert "present.1.key (case0, batch 1, prefill)" in messages(report)
    assert "present.0.key" not in messages(report), "layer 0 is whole"


def test_swapped_outputs_are_named(broken: Exported) -> None:
    def swap(model: ir.Model) -> None:
        named = {value.name: value for value in model.graph.outputs}
        key, value = named["present.0.key"], named["present.0.value"]
        key.name, value.name = "swap", "present.0.key"
        key.name = "present.0.value"

    edit(broken.graph(DECODER), swap)
    report = broken.verify("ort")
    assert report.verdict == "fail"
    assert "present.0.key (case0, batch 1, prefill): it holds cache.0.value: outputs are swapped" in messages(report)


def test_a_cache_that_forgets_a_position_fails_where_it_does(broken: Exported) -> None:
    def cut(model: ir.Model) -> None:
        graph = model.graph
        start, end, axis = (
            ir.Value(name=name, const_value=ir.Tensor(np.array([number], dtype=np.int64), name=name))
            for name, number in {"start": 0, "end": -1, "axis": 2}.items()
        )
        for value in (start, end, axis):
            graph.register_initializer(value)
        for index, present in enumerate(graph.outputs):
            if str(present.name).startswith("present."):
                slice_ = ir.node("Slice", [present, start, end, axis], name=f"cut.{index}")
                graph.append(slice_)
                made = slice_.outputs[0]
                made.name, made.type, made.shape = present.name, present.type, present.shape
                present.name = f"whole.{index}"
                graph.outputs[index] = made

    edit(broken.graph(DECODER), cut)
    assert "present.0.key (case0, batch 1, prefill) has shape" in messages(broken.verify("ort"))


@pytest.mark.parametrize(("declared", "rows"), [(4, "4"), ("num_positions", "num_positions"), (1, "4")])
def test_logits_of_the_image_positions_are_recognised(broken: Exported, declared: int | str, rows: str) -> None:
    """A graph that answers for every vision position, as one forward pass over the image does, whatever it declares."""

    def keep_all_positions(model: ir.Model) -> None:
        graph = model.graph
        picked = [n for n in graph if n.op_type == "Gather" and str(n.inputs[1].name).endswith(KEPT)]
        assert picked
        for gather in picked:
            gather.outputs[0].replace_all_uses_with(gather.inputs[0])
            graph.remove(gather, safe=True)
        logits = next(value for value in graph.outputs if value.name == "logits")
        logits.shape = ir.Shape(["batch_size", declared, logits.shape[2]])

    edit(broken.graph(DECODER), keep_all_positions)
    report = broken.verify("ort")
    assert report.verdict == "fail"
    assert f"{rows} rows of logits where the next token's alone is wanted" in messages(report)
    assert "cannot continue a text" in messages(report)


def test_a_batch_axis_that_transformers_js_does_not_know(broken: Exported) -> None:
    def rename(model: ir.Model) -> None:
        cache = next(value for value in model.graph.inputs if value.name == "past_key_values.1.key")
        cache.shape = ir.Shape(["batch", *list(cache.shape)[1:]])

    edit(broken.graph(DECODER), rename)
    report = broken.verify("ort")
    assert "input past_key_values.1.key has shape ['batch'" in messages(report)


def test_a_renamed_input_and_a_lost_output(broken: Exported) -> None:
    def rename(model: ir.Model) -> None:
        next(value for value in model.graph.inputs if value.name == "pixel_values").name = "pixels"

    edit(broken.graph("encoder_model"), rename)
    report = broken.verify("ort")
    assert "input pixel_values is missing; input pixels is not declared" in messages(report)


def test_a_damaged_file_is_a_failed_check(broken: Exported) -> None:
    path = broken.graph("encoder_model")
    path.write_bytes(path.read_bytes()[:1000])
    report = broken.verify("ort")
    assert report.verdict == "fail"
    assert "encoder_model fp32 loads: ONNX Runtime:" in messages(report)


def test_an_int8_graph_that_collapsed(broken: Exported) -> None:
    def flatten(model: ir.Model) -> None:
        name = next(n for n in model.graph.initializers if n.endswith("layers.1.mlp.down_proj.weight.scale"))
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(-value.const_value.numpy(), name=name)

    edit(broken.graph(f"{DECODER}_int8"), flatten)
    report = broken.verify("ort")
    assert {check.dtype for check in report.failures} == {"int8"}
    assert "cosine_similarity: logits" in messages(report)


def test_what_a_dtype_costs_is_reported_and_judged_by_nobody(broken: Exported) -> None:
    """Nats and words: float32 has none to lose, a graph that is spoiled loses more of both."""
    right = costs(broken.verify("ort"))
    assert {dtype for dtype, _ in right} == {"fp32", "int8"}
    assert ("fp32", limits.TEACHER_FORCED_KL) not in right
    assert right["fp32", limits.ROUGE_L].value == 1.0
    kl = right["int8", limits.TEACHER_FORCED_KL]
    assert 0 < kl.value < 0.01 and kl.detail.endswith(" tokens of 3 images, against fp32")
    assert all((check.verdict, check.limit) == ("reported", None) for check in right.values())

    def spoil(model: ir.Model) -> None:
        name = next(n for n in model.graph.initializers if n.endswith("layers.1.mlp.down_proj.weight.scale"))
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(-value.const_value.numpy(), name=name)

    edit(broken.graph(f"{DECODER}_int8"), spoil)
    spoiled = costs(broken.verify("ort"))
    assert spoiled["int8", limits.TEACHER_FORCED_KL].value > 10 * kl.value
    assert spoiled["int8", limits.ROUGE_L].value < 1.0
    assert spoiled["fp32", limits.ROUGE_L].value == 1.0


def costs(report: Report) -> dict[tuple[str, str], Check]:
    found = [check for check in report.checks if check.metric in (limits.TEACHER_FORCED_KL, limits.ROUGE_L)]
    assert {check.runtime for check in found} == {"ort"}
    return {(check.dtype, check.metric): check for check in found}


def test_integer_products_that_saturate_fail_on_any_processor(broken: Exported) -> None:
    """The decoder of other exporters' int8: what this processor makes of it decides nothing."""
    quantize_dynamic(broken.graph(DECODER), broken.graph(f"{DECODER}_int8"), per_channel=True)
    report = broken.verify("ort")
    [failure] = [check for check in report.failures if check.metric == SATURATION]
    assert (failure.component, failure.dtype, failure.limit) == (DECODER, "int8", 128)
    assert failure.value > 128 and "saturates on processors without VNNI" in failure.detail
    assert "int8: integer products saturate" in explain(report, Commands(" pico", "", ""))[0]


def test_what_failed_is_explained_and_is_nobodys_default(broken: Exported) -> None:
    def flatten(model: ir.Model) -> None:
        name = next(n for n in model.graph.initializers if n.endswith("layers.1.mlp.down_proj.weight.scale"))
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(-value.const_value.numpy(), name=name)

    whole = broken.graph(f"{DECODER}_int8").read_bytes()
    edit(broken.graph(f"{DECODER}_int8"), flatten)
    report = broken.verify("ort")
    assert report.failed_dtypes == ["int8"]
    assert [c.dtype for c in report.checks if c.metric == limits.TOKENS_EXACT] == ["fp32", "int8"], "captions of both"
    cause, way_out = explain(report, Commands(" pico.yaml", "", ""))
    assert cause.startswith(f"int8: {DECODER}, logits (case0, batch 1, prefill) is far from PyTorch's")
    assert "; captions in ort: " in cause and cause.endswith(" of 3 images as PyTorch's")
    assert way_out == (
        "to publish without int8: `vlm-export onnx pico.yaml --quantize fp32`, then `vlm-export verify pico.yaml`"
    )
    config = json.loads((broken.work.repo / "config.json").read_text())["transformers.js_config"]
    assert {chosen["dtype"] for chosen in config["device_config"].values()} == {"fp32"}
    assert load(broken.work.repo, backend="onnx").dtype == "fp32"
    assert load(broken.work.repo, backend="onnx", dtype="int8").dtype == "int8"
    broken.graph(f"{DECODER}_int8").write_bytes(whole)
    assert broken.verify("ort").verdict == "pass"
    assert load(broken.work.repo, backend="onnx").dtype == "int8", "what is mended is the default again"


@pytest.mark.parametrize("runtimes", [["ort", "node"], ["node"]])
def test_a_cause_speaks_of_runtimes_that_ran(exported: Exported, runtimes: list[str]) -> None:
    failed = Check("all", "fp32", "node", limits.TOKENS_EXACT, 0.5, 1.0, "fail", "1 of 2 images")
    report = replace(exported.verify("ort"), checks=[failed], runtimes=runtimes)
    assert explain(report, Commands(" pico", "", ""))[0].startswith(
        "fp32: right in ONNX Runtime, wrong in transformers.js"
    ) == ("ort" in runtimes)


@pytest.mark.parametrize(
    ("runtimes", "cause"),
    [
        (["webgpu"], "it does not run in webgpu, .*; whether its file is damaged, `verify --runtime ort` tells"),
        (["ort", "webgpu"], "it runs in ONNX Runtime and does not run in webgpu, where an operator .* may be missing"),
        (["ort"], "a graph does not run: its file is damaged"),
    ],
)
def test_a_file_is_blamed_where_onnxruntime_says_so(exported: Exported, runtimes: list[Target], cause: str) -> None:
    failed = Check("all", "fp32", runtimes[-1], RUNS, 1.0, 0.0, "fail", "no kernel")
    report = replace(exported.verify("ort"), checks=[failed], runtimes=runtimes)
    assert re.match(f"fp32: {cause}", explain(report, Commands(" pico", "", ""))[0])


def test_when_all_have_failed_one_must_be_named(broken: Exported) -> None:
    for path in (broken.graph("encoder_model"), broken.graph("encoder_model_int8")):
        model = ir.load(path)
        value = model.graph.initializers["projection.projection.bias"]
        value.const_value = ir.Tensor(value.const_value.numpy() + 3, name=value.name)
        ir.save(model, path)
    report = broken.verify("ort")
    assert report.failed_dtypes == ["fp32", "int8"]
    assert explain(report, Commands(" pico", "", ""))[1:] == [
        "int8: it is made from fp32, which failed: mend that first; captions in ort: 0 of 3 images as PyTorch's",
        "nothing can be published before fp32 passes",
    ]
    with pytest.raises(InputError, match=r"fp32, int8 failed `vlm-export verify`; --dtype runs one all the same"):
        load(broken.work.repo, backend="onnx")


def test_nan_passes_no_limit(broken: Exported) -> None:
    def spoil(model: ir.Model) -> None:
        value = model.graph.initializers["projection.projection.bias"]
        value.const_value = ir.Tensor(np.full_like(value.const_value.numpy(), np.nan), name=value.name)

    edit(broken.graph("encoder_model"), spoil)
    report = broken.verify("ort")
    assert "last_hidden_state" in messages(report)
    [tokens] = [check for check in report.failures if check.component == "all"]
    assert "the decoder's scores are no numbers: some are too large for the dtype" in tokens.detail
    shown = [line for line in report_lines(report, Path("report.json")) if line.startswith("FAIL") and "= nan" in line]
    assert len(shown) == 1 < len([check for check in report.failures if np.isnan(check.value)])
    with pytest.raises(ModelFailed, match="the decoder's scores are no numbers"):
        engine = load(broken.work.repo, backend="onnx", dtype="fp32")
        engine.generate([Image.new("RGB", (16, 16))], None, Options())


def test_no_checks_is_not_a_pass(exported: Exported) -> None:
    recorded = golden.load_golden(exported.recipe.golden_dir)
    report = verify.verify(exported.work.repo, open_checkpoint(exported.work.merged), recorded, runtimes=())
    assert (report.checks, report.verdict) == ([], "fail")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "an empty golden proves nothing"),
        ({"cases": []}, "an empty golden proves nothing"),
        ({"inputs_sha256": {"checkpoint/model.safetensors": "0"}}, "recorded from other inputs than were exported"),
        ({"generation": {"max_new_tokens": 7}}, "pico.yaml: generation: changed since the golden was recorded"),
        ({"base": "dequantized"}, "pico.yaml: base: changed since the golden was recorded"),
        ({"combination": {"type": "cat", "weights": [1.0]}}, "pico.yaml: combination: changed since the golden was"),
    ],
)
def test_a_golden_that_proves_nothing(broken: Exported, change: dict[str, Any], message: str) -> None:
    path = broken.recipe.golden_dir / "golden.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        broken.verify("ort")


def test_a_golden_knows_its_combination(tmp_path: Path) -> None:
    pico.write_peft_adapter(tmp_path / "adapter", pico.config())
    combination = {"type": "ties", "weights": [0.5], "density": 0.5}
    pico.write_checkpoint(tmp_path / "checkpoint", lora=False)
    made = record(tmp_path, adapters=[{"path": "adapter"}], combination=combination)
    recorded = golden.load_golden(made.recipe.golden_dir).facts
    assert recorded.differences(made.recipe.recipe, recorded.generation) == []
    other = replace(made.recipe.recipe.combination, seed=1)
    assert recorded.differences(replace(made.recipe.recipe, combination=other), {}) == ["generation", "combination"]


def test_no_golden_says_how_to_record_one(broken: Exported) -> None:
    (broken.recipe.golden_dir / "golden.json").unlink()
    with pytest.raises(InputError, match="no golden outputs recorded yet: run `vlm-export golden`"):
        broken.verify("ort")


def test_an_image_that_changed(broken: Exported) -> None:
    image = broken.recipe.golden_dir / "images" / "0.png"
    image.write_bytes(image.read_bytes() + b"x")
    with pytest.raises(InputError, match=r"0\.png: not the image that the golden outputs were recorded on"):
        broken.verify("ort")


def test_wrong_tokens_are_a_failure_and_a_near_tie_is_none(exported: Exported) -> None:
    recorded = golden.load_golden(exported.recipe.golden_dir)
    merged = open_checkpoint(exported.work.merged)

    def with_margin(margin: float) -> Report:
        images = list(recorded.facts.images)
        wrong = [*images[1].token_ids[:2], (images[1].token_ids[2] + 1) % 256, *images[1].token_ids[3:]]
        margins = [*images[1].margins[:2], margin, *images[1].margins[3:]]
        images[1] = replace(images[1], token_ids=wrong, margins=margins)
        tied = golden.GoldenFolder(recorded.path, replace(recorded.facts, images=images), recorded.tensors)
        return verify.verify(exported.work.repo, merged, tied, runtimes=("ort",))

    tie = 1e-4 * max(float(np.abs(value).max()) for name, value in recorded.tensors.items() if "logits" in name)
    exact = [c for c in with_margin(1.01 * tie).checks if (c.dtype, c.metric) == ("fp32", "tokens_exact_rate")]
    assert [(c.verdict, c.detail) for c in exact] == [("fail", "2 of 3 images; differ: 1.png from token 3")]
    exact = [c for c in with_margin(0.99 * tie).checks if (c.dtype, c.metric) == ("fp32", "tokens_exact_rate")]
    assert [(c.verdict, c.detail) for c in exact] == [("near-tie", "2 of 3 images; near-ties: 1.png")]


def test_a_tolerance_of_the_recipe_is_repeated_with_its_reason(tmp_path: Path) -> None:
    reason = "a limit that nothing can hold, for the test"
    tolerance = {"metric": "max_relative_error", "dtype": "fp32", "limit": 0.0, "reason": reason}
    made = prepare(tmp_path, tolerances=[tolerance])
    made.export()
    report = made.verify("ort")
    assert report.verdict == "fail"
    assert f"limit: {reason}" in messages(report)


@pytest.mark.parametrize("layout", ["captioner", "chat"])
def test_stock_transformers_js_makes_the_same_tokens(exported: Exported, tmp_path: Path, layout: str) -> None:
    made = exported.copy(tmp_path / "copy")
    made.export(layout)
    report = made.verify("node")
    exact = [c for c in report.checks if c.metric == "tokens_exact_rate"]
    assert [(c.runtime, c.value, c.verdict) for c in exact] == [("node", 1.0, "pass")]
    assert report.versions["node: transformers"] == "4.3.1"


def test_transformers_js_decides_too(broken: Exported) -> None:
    """What only the client reads is wrong: the graphs pass, the tokens in Node do not."""
    path = broken.work.repo / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_new_tokens": 2}))
    found = {(check.dtype, check.runtime, check.metric) for check in broken.verify("ort", "node").failures}
    assert found == {("fp32", "node", limits.TOKENS_EXACT), ("int8", "node", limits.TOKENS_AS_ORT)}


def test_a_repo_that_transformers_js_cannot_load(broken: Exported) -> None:
    path = broken.work.repo / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "prefix_conditioning_vlm"}))
    report = broken.verify("node")
    assert report.verdict == "fail"
    assert "all fp32 runs:" in messages(report)


@pytest.mark.parametrize("runtimes", [("ort", "node"), ("node",)])
def test_another_client_in_eight_bits_does_not_hide_behind_the_margin_of_eight_bits(
    broken: Exported, runtimes: tuple[Any, ...]
) -> None:
    """The recipe's tolerance lets any token pass; that Node says what ONNX Runtime says of the same graphs is asked."""
    [right] = [c for c in broken.verify(*runtimes).checks if c.metric == limits.TOKENS_AS_ORT]
    assert (right.dtype, right.runtime, right.value, right.limit) == ("int8", "node", 1.0, 1.0)
    assert right.verdict in ("pass", "near-tie")
    path = broken.work.repo / "generation_config.json"  # which golden generation does not follow
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 5.0}))
    report = broken.verify(*runtimes)
    found = {(c.dtype, c.runtime, c.metric) for c in report.failures}
    assert found == {
        ("fp32", "node", limits.TOKENS_EXACT),
        ("int8", "node", limits.TOKENS_AS_ORT),
        *((dtype, "node", limits.LOGITS) for dtype in ("fp32", "int8")),
    }
    [logits] = [c for c in report.failures if (c.dtype, c.metric) == ("fp32", limits.LOGITS)]
    assert re.fullmatch(r"\d\.png, token \d, of \d+ tokens of 2 images", logits.detail)
    assert "(node): it makes other scores of the same pixels" in explain(report, Commands(" pico", "", ""))[0]


def test_only_the_dtypes_that_are_named(broken: Exported) -> None:
    """The report is not about the others: none is published on its strength, and what failed before stays failed."""
    with pytest.raises(InputError, match=r"^--dtype q4, q2: .*/repo/onnx has fp32, int8$"):
        broken.verify("ort", dtypes=("q4", "int8", "q2"))
    whole = broken.graph(f"{DECODER}_int8").read_bytes()
    broken.graph(f"{DECODER}_int8").unlink()
    assert broken.verify("ort").failed_dtypes == ["int8"]
    report = broken.verify("ort", dtypes=("fp32",))
    assert (report.verdict, report.verified_dtypes) == ("pass", ["fp32"])
    assert json.loads((broken.work.repo / "export.json").read_text())["failed"] == ["int8"]
    with pytest.raises(CheckFailed, match="says nothing of int8: run `vlm-export verify` without --dtype"):
        gate.check_verified(broken.work)
    broken.graph(f"{DECODER}_int8").write_bytes(whole)
    assert broken.verify("ort", dtypes=("int8",)).verified_dtypes == ["int8"]
    assert json.loads((broken.work.repo / "export.json").read_text())["failed"] == []


@pytest.mark.parametrize("runtime", ["ort", "node"])
def test_a_file_that_is_missing_is_named(broken: Exported, runtime: Target) -> None:
    broken.graph("encoder_model_int8").unlink()
    report = broken.verify(runtime)
    assert report.failed_dtypes == ["int8"]
    assert "encoder_model_int8.onnx" in messages(report)


def test_a_runtime_that_cannot_load_the_layout_is_refused_by_name(exported: Exported, tmp_path: Path) -> None:
    made = exported.copy(tmp_path / "copy")
    made.export("components")
    with pytest.raises(InputError, match=r"^--runtime node, wasm: .*transformers\.js does not load this layout"):
        made.verify("ort", "node", "wasm")
    assert pipeline.run_verify(made.recipe, made.work, silent).runtimes == ["ort"]


def test_two_builds_may_part_where_scores_are_near(broken: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """How near is measured on the graph, behind the tokens that both said: here everything that was said is near."""
    path = broken.work.repo / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 5.0}))
    for tie, verdict in ((0.0, "fail"), (np.inf, "near-tie")):
        monkeypatch.setitem(limits.NEAR_TIES_OF_BUILDS, "int8", tie)
        [check] = [c for c in broken.verify("node").checks if c.metric == limits.TOKENS_AS_ORT]
        assert check.verdict == verdict
        assert ("near-ties: " in check.detail, "differ: " in check.detail) == (tie > 0, tie == 0)


def test_push_needs_a_passing_report_about_these_very_files(broken: Exported) -> None:
    with pytest.raises(CheckFailed, match="not verified yet: run `vlm-export verify`"):
        gate.check_verified(replace(broken.work, root=broken.work.root / "elsewhere"))
    broken.verify("ort")
    gate.check_verified(broken.work)
    (broken.work.repo / "config.json").write_text("{}")
    with pytest.raises(CheckFailed, match=r"is about other files than .* holds \(config\.json\)"):
        gate.check_verified(broken.work)
    report = broken.work.report / "report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"verdict": "fail"}))
    with pytest.raises(CheckFailed, match="the verdict is fail"):
        gate.check_verified(broken.work)


def test_goldens_say_where_they_come_from(exported: Exported) -> None:
    facts = asdict(golden.load_golden(exported.recipe.golden_dir).facts)
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert set(facts["inputs_sha256"]) == {f"checkpoint/{name}" for name in names}
    assert {"torch", "transformers", "peft", "pillow"} <= facts["versions"].keys()
    assert facts["generation"] == {"max_new_tokens": 6}
