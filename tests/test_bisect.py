"""`verify --bisect`: faults that are planted in each stage are found there, with the tensor."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from exported import Exported, prepare, silent

from vlm_export import pipeline
from vlm_export.graph import passes
from vlm_export.graph.rewrites.skip_norms import join_norms
from vlm_export.graph.trace import TRACE
from vlm_export.models import decoder
from vlm_export.verify.report import Fault

DECODER = "decoder_model_merged"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return prepare(tmp_path_factory.mktemp("merged"))


@pytest.fixture(scope="module")
def exported(merged: Exported, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    made = merged.copy(tmp_path_factory.mktemp("exported"))
    made.export("captioner", ["q8"])
    return made


def faults(made: Exported) -> list[Fault]:
    report = pipeline.run_verify(made.recipe, made.work, silent, runtimes=["ort"], bisecting=True)
    assert report.verdict == "fail"
    stored = json.loads((made.work.report / "report.json").read_text())
    assert [each["stage"] for each in stored["faults"]] == [each.stage for each in report.faults]
    return report.faults


def test_a_right_repo_has_none(exported: Exported) -> None:
    report = pipeline.run_verify(exported.recipe, exported.work, silent, runtimes=["ort"], bisecting=True)
    assert (report.verdict, report.faults) == ("pass", [])


def scale(model: ir.Model, value: ir.Value, factor: float) -> None:
    """All that read the value read it times the factor."""
    name = f"{value.name}.factor"
    constant = ir.Value(name=name, const_value=ir.Tensor(np.array(factor, dtype=np.float32), name=name))
    model.graph.register_initializer(constant)
    product = ir.node("Mul", [value, constant])
    value.replace_all_uses_with(product.outputs[0])
    product.replace_input_with(0, value)
    producer = value.producer()
    assert producer is not None
    product.outputs[0].type, product.outputs[0].shape = value.type, value.shape
    model.graph.insert_after(producer, product)


def wrong_by_a_percent(model: ir.Model, declared: Collection[str]) -> int:
    """A pass that does more than it should to one value of layer 1."""
    count = join_norms(model, declared)
    for node in list(model.graph):
        for value in node.outputs:
            if value.name == "silu_1":
                scale(model, value, 1.01)
                return count + 1
    return count


def test_a_pass_that_is_wrong_by_one_percent(merged: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_EXPORT_STRUCTURES", str(tmp_path / "structures"))
    made = merged.copy(tmp_path / "copy")
    index = list(passes.AFTER_REPEAT).index(join_norms)
    spoiled = [*passes.AFTER_REPEAT[:index], wrong_by_a_percent, *passes.AFTER_REPEAT[index + 1 :]]
    monkeypatch.setattr(passes, "AFTER_REPEAT", spoiled)
    made.export("captioner")
    [fault] = faults(made)
    assert (fault.component, fault.dtype) == (DECODER, "fp32")
    assert fault.stage == "wrong_by_a_percent"
    assert fault.before == "pack_attention"
    assert fault.layer == 1
    assert fault.place and fault.value != fault.expected


def test_a_trace_that_is_wrong(merged: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_EXPORT_STRUCTURES", str(tmp_path / "structures"))
    made = merged.copy(tmp_path / "copy")
    forward = decoder.DecoderCore.forward

    @functools.wraps(forward)
    def off(self: decoder.DecoderCore, *arguments: object) -> object:
        logits, *cache = forward(self, *arguments)  # type: ignore[arg-type]
        return (logits * 1.01, *cache)

    monkeypatch.setattr(decoder.DecoderCore, "forward", off)
    made.export("captioner")
    [fault] = faults(made)
    assert (fault.component, fault.stage, fault.before) == (DECODER, TRACE, "")
    assert fault.tensor.startswith("logits (case0")


@pytest.mark.parametrize(("suffix", "dtype"), [("", "fp32"), ("_quantized", "q8")])
def test_a_damaged_file(exported: Exported, tmp_path: Path, suffix: str, dtype: str) -> None:
    made = exported.copy(tmp_path / "copy")
    path = made.graph(f"{DECODER}{suffix}")
    model = ir.load(path)
    name = next(
        name for name in model.graph.initializers if "layers.1.self_attn.q_proj" in name and "scale" not in name
    )
    value = model.graph.initializers[name]
    weights = value.const_value.numpy().copy()
    weights[...] = -weights
    value.const_value = ir.Tensor(weights, name=name)
    ir.save(model, path)
    [fault] = faults(made)
    assert (fault.component, fault.dtype, fault.layer) == (DECODER, dtype, 1), str(fault)
    assert fault.stage == f"the file {path.name}"
    assert ("q_proj" if dtype == "fp32" else "linear") in fault.tensor
    assert str(fault).startswith(f"{DECODER} in {dtype}: first wrong after the file {path.name}, right after ")


def test_a_damaged_file_of_a_mixture(merged: Exported, tmp_path: Path) -> None:
    made = merged.copy(tmp_path / "copy")
    made.export("captioner", ["encoder_model=int8,decoder_model_merged=q8"])
    path = made.graph(f"{DECODER}_quantized")
    model = ir.load(path)
    names = [name for name in model.graph.initializers if "layers.1.self_attn.q_proj" in name and "scale" not in name]
    value = model.graph.initializers[names[0]]
    value.const_value = ir.Tensor(-value.const_value.numpy(), name=value.name)
    ir.save(model, path)
    assert (DECODER, "mixed", 1) in {(fault.component, fault.dtype, fault.layer) for fault in faults(made)}


def test_a_damaged_table_is_not_blamed_on_the_decoder(merged: Exported, tmp_path: Path) -> None:
    made = merged.copy(tmp_path / "copy")
    made.export("chat")
    path = made.graph("embed_tokens")
    model = ir.load(path)
    [name] = [name for name in model.graph.initializers if "embed_tokens" in name]
    value = model.graph.initializers[name]
    value.const_value = ir.Tensor(-value.const_value.numpy(), name=name)
    ir.save(model, path)
    found = faults(made)
    assert [(fault.component, fault.stage) for fault in found] == [("embed_tokens", "the file embed_tokens.onnx")]
    assert found[0].tensor == name and found[0].place


def test_wrong_pixels_come_first(tmp_path: Path) -> None:
    made = prepare(tmp_path, preprocess="client")
    made.export("captioner")
    path = made.work.repo / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.4, 0.5, 0.5]}))
    [fault] = faults(made)
    assert (fault.component, fault.stage) == ("files", "pixels")
