"""Families of transformers' own chat classes: LoRA checkpoint → merge → graphs → the same tokens in transformers.js."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pico_chat
import pytest
from exported import Exported, record

from vlm_export import pipeline
from vlm_export.errors import InputError
from vlm_export.families.base import find_family
from vlm_export.package import load_manifest
from vlm_export.verify import Report

KINDS: dict[str, Callable[[Path], Path]] = {
    "llava, clip, llama": pico_chat.write_llava,
    "llava, siglip, qwen2": lambda folder: pico_chat.write_llava(
        folder, "qwen2", "siglip_vision_model", vision_feature_layer=-1, vision_feature_select_strategy="full"
    ),
    "llava, several layers": lambda folder: pico_chat.write_llava(folder, vision_feature_layer=[0, 3, -2]),
}
GOLDEN = {"images": ["images/*.png"], "prompts": [pico_chat.CONVERSATION, "<image>a cat", "is <image> a cat?"]}


def prepare(folder: Path, write: Callable[[Path], Path]) -> Exported:
    """A checkpoint with an adapter on text model, tower and projector, merged, and its golden outputs."""
    checkpoint = write(folder / "checkpoint")
    pico_chat.write_adapter(folder / "adapter", checkpoint)
    return record(folder, adapters=[{"path": "adapter"}], layout="chat", golden=GOLDEN)


@pytest.fixture(scope="module", params=KINDS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    made = prepare(tmp_path_factory.mktemp("chat"), KINDS[request.param])
    made.export("chat", ["q8"])
    return made


def failures(report: Report) -> str:
    return "\n".join(f"{c.component} {c.dtype} {c.metric}: {c.detail}" for c in report.failures)


def simplified(made: Exported, component: str) -> dict[str, Any]:
    return load_manifest(made.work.repo).simplified[component]


def test_verifies_in_both_runtimes(exported: Exported) -> None:
    report = exported.verify("ort", "node")
    assert report.verdict == "pass", failures(report)
    exact = {(c.runtime, c.dtype): c.value for c in report.checks if c.metric == "tokens_exact_rate"}
    assert exact[("ort", "fp32")] == exact[("node", "fp32")] == 1.0
    assert exact.keys() == {(runtime, dtype) for runtime in ("ort", "node") for dtype in ("fp32", "q8")}
    assert {c.detail.split(",")[0] for c in report.checks if "(case" in c.detail} >= {"logits (case0", "logits (case2"}


def test_the_adapter_was_everywhere(exported: Exported) -> None:
    adapted = "\n".join(json.loads((exported.work.merged / "merge.json").read_text())["layers"])
    for place in ("layers.1.self_attn.v_proj", "layers.0.mlp.down_proj", "layers.0.self_attn.q_proj", "linear_1"):
        assert place in adapted
    assert any("vision" in module for module in adapted.splitlines())


def test_attention_is_fused(exported: Exported) -> None:
    for component, operator in (
        ("vision_encoder", "MultiHeadAttention"),
        ("decoder_model_merged", "GroupQueryAttention"),
    ):
        report = simplified(exported, component)
        assert report["unfused_attention"] == ""
        assert report["fused"][operator] > 1


def test_a_wrong_position_is_caught(exported: Exported, tmp_path: Path) -> None:
    made = exported.copy(tmp_path / "copy")
    model = ir.load(made.graph("vision_encoder"))
    table = next(v for n, v in model.graph.initializers.items() if n.endswith("position_embedding.weight"))
    rows = table.const_value.numpy().copy()
    rows[[-1, -2]] = rows[[-2, -1]]
    table.const_value = ir.Tensor(rows, name=table.name)
    ir.save(model, made.graph("vision_encoder"))
    report = made.verify("ort")
    assert {check.component for check in report.failures} == {"vision_encoder"}
    assert "image_features (case0, batch 1)" in failures(report)


def test_a_wrong_feature_layer_is_caught(tmp_path: Path) -> None:
    made = prepare(tmp_path, pico_chat.write_llava)
    path = made.work.merged / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vision_feature_layer": -1}))
    made.export("chat")
    report = made.verify("ort")
    assert "vision_encoder fp32 max_relative_error: image_features" in failures(report)


def test_the_layers_above_the_feature_layer_are_left_out(tmp_path: Path) -> None:
    made = prepare(tmp_path, pico_chat.write_llava)
    made.export("chat")
    assert simplified(made, "vision_encoder")["repeated"] == {"model.vision_tower.encoder.layers": 1}
    weights = ir.load(made.graph("vision_encoder")).graph.initializers
    assert {name.split(".")[4] for name in weights if "encoder.layers" in name} == {"0", "1", "2"}
    assert not any("post_layernorm" in name for name in weights)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "golden.prompts: a chat model needs one"),
        (["a cat"], "golden.prompts: 'a cat' needs the image token '<image>' once"),
        ([[{"role": "user", "content": 1}]], "golden.prompts: the chat template: "),
    ],
)
def test_a_prompt_that_is_none(prompts: list[Any], message: str, tmp_path: Path) -> None:
    pico_chat.write_llava(tmp_path / "checkpoint")
    with pytest.raises(InputError, match=message):
        record(tmp_path, layout="chat", golden={"images": ["images/*.png"], "prompts": prompts})


def test_a_conversation_is_no_use_to_a_captioner(tmp_path: Path) -> None:
    from exported import prepare as prepare_captioner

    with pytest.raises(InputError, match=r"pico\.yaml: golden\.prompts: a captioner continues a text"):
        prepare_captioner(tmp_path, golden={"images": ["images/*.png"], "prompts": [pico_chat.CONVERSATION]})


def test_names_of_transformers_4() -> None:
    renamed = find_family("llava", "test").rename
    assert renamed("language_model.model.layers.0.mlp.up_proj.weight") == "model.language_model.layers.0.mlp.up_proj.weight"
    assert renamed("language_model.lm_head.weight") == "lm_head.weight"
    assert renamed("vision_tower.vision_model.pre_layrnorm.bias") == "model.vision_tower.pre_layrnorm.bias"
    assert renamed("multi_modal_projector.linear_2.bias") == "model.multi_modal_projector.linear_2.bias"
    assert renamed("model.language_model.norm.weight") == "model.language_model.norm.weight"
    assert renamed("vision_tower.vision_model.embeddings.position_ids") is None
