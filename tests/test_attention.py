"""Decoders of many kinds as fused operators: the same numbers as PyTorch, with padding, windows and caps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import padded
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.glm_ocr import modeling_glm_ocr
from transformers.models.llama import modeling_llama

from vlm_export.dtypes import DTYPES
from vlm_export.graph.graph_file import save_graph
from vlm_export.graph.simplify_report import SimplifyReport
from vlm_export.graph.skeleton import make_skeleton
from vlm_export.graph.weights import attach_weights
from vlm_export.models import decoder
from vlm_export.models.rotary import rotation
from vlm_export.quantize.variants import Source, Variant
from vlm_export.spec.graph import Component
from vlm_export.tensors.stored import stored_tensors
from vlm_export.verify.metrics import max_relative_error

LLAMA_LIKE = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **settings}}


@dataclass(frozen=True)
class Kind:
    """A decoder's `model_type` and settings, and where its rotations go if there is no padding."""

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    inside: bool = True  # GroupQueryAttention does them; else RotaryEmbedding, two a layer
    layers: int = 1


# The prefill has 7 positions and three steps follow: kinds of rope that change with the length do so at 8.
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "short_factor": [1.0] * 8,
    "long_factor": [1.5 + 0.5 * i for i in range(8)],
    "factor": 8.0,
    "original_max_position_embeddings": 8,
}
HALF = {"head_dim": 32} | rope("default", partial_rotary_factor=0.5)
DECODERS = {
    "llama": Kind("llama", layers=2),
    "a head size that the operator does not rotate": Kind("llama", {"hidden_size": 32}, inside=False),
    "linear rope": Kind("llama", rope("linear", factor=2.0)),
    "llama3 rope": Kind("llama", rope("llama3", **LLAMA3)),
    "yarn, which scales what it rotates": Kind("llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "longrope, which changes with the length": Kind("llama", rope("longrope", **LONGROPE)),
    "dynamic rope, which changes with the length": Kind(
        "llama", rope("dynamic", factor=4.0) | {"max_position_embeddings": 8}
    ),
    "half of a head": Kind("phi3", HALF),
    "half of a head, cut before it is rotated": Kind("phi", HALF, inside=False),
    "pairs of half of a head": Kind("glm", HALF),
    "pairs by tables in which each angle comes twice": Kind("cohere"),
    "norms after rotation": Kind("hunyuan_v1_dense", {"head_dim": 16}, inside=False),
    "sliding window": Kind("mistral", {"sliding_window": 4}),
    "caps and windows": Kind("gemma2", {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16}, layers=2),
    "two ropes": Kind(
        "gemma3_text", {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}, layers=2
    ),
}


class Holder(nn.Module):
    """What a component's module expects of a model."""

    def __init__(self, language_model: nn.Module):
        super().__init__()
        self.language_model = language_model

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()


def holder(kind: Kind) -> Holder:
    torch.manual_seed(0)
    settings = {"num_hidden_layers": kind.layers, "initializer_range": 0.2}
    config = AutoConfig.for_model(kind.model_type, **(LLAMA_LIKE | settings | kind.changes))
    return Holder(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())


def export(
    model: Holder, folder: Path, component: Callable[[decoder.Geometry], Component]
) -> tuple[onnxruntime.InferenceSession, SimplifyReport]:
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    made = component(decoder.Geometry.of(model.language_model.config))
    skeleton, report = make_skeleton(made, model)
    save_graph(attach_weights(skeleton, made, stored_tensors(folder)), folder / "decoder.onnx")
    return onnxruntime.InferenceSession(str(folder / "decoder.onnx")), report


CASES = [
    *((name, decoder.chat_decoder) for name in DECODERS),
    *((name, decoder.plain_decoder) for name, kind in DECODERS.items() if kind.inside),
]


@pytest.mark.parametrize(("name", "component"), CASES)
def test_computes_what_pytorch_computes(
    name: str, component: Callable[[decoder.Geometry], Component], tmp_path: Path
) -> None:
    kind = DECODERS[name]
    model = holder(kind)
    session, report = export(model, tmp_path, component)
    assert (report.unfused_attention, report.unfused_rotary) == ("", "")
    assert report.fused["GroupQueryAttention"] == kind.layers
    inside = kind.inside and component is decoder.plain_decoder
    assert report.fused.get("RotaryEmbedding", 0) == (0 if inside else 2 * kind.layers)
    padded.compare(session, model.language_model)


@pytest.mark.parametrize(("size", "component"), [(20, decoder.chat_decoder), (4, decoder.plain_decoder)])
def test_heads_that_the_operator_refuses_stay_plain_and_say_so(
    size: int, component: Callable[[decoder.Geometry], Component], tmp_path: Path
) -> None:
    model = holder(Kind("llama", {"head_dim": size}))
    session, report = export(model, tmp_path, component)
    assert report.unfused_attention == f"heads of {size}, which is not a multiple of 8"
    padded.compare(session, model.language_model)


def test_a_rotation_of_another_kind_stays_plain_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rotate = modeling_llama.apply_rotary_pos_emb

    def and_double(query: torch.Tensor, *others: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        query, key = rotate(query, *others, **named)
        return 2 * query, key

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", and_double)
    model = holder(Kind("llama"))
    session, report = export(model, tmp_path, decoder.chat_decoder)
    assert report.unfused_rotary.endswith("apply_rotary_pos_emb does not rotate halves or pairs of a head")
    assert report.fused["GroupQueryAttention"] == 1
    padded.compare(session, model.language_model)


def test_attention_of_its_own_stays_plain_and_says_so(tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8, "num_key_value_heads": None}
    model = holder(Kind("gptj", sizes))
    session, report = export(model, tmp_path, decoder.chat_decoder)
    assert report.unfused_attention == "GPTJForCausalLM does not call transformers' attention interface"
    padded.compare(session, model.language_model)


def test_float16_keeps_the_angles_of_far_positions(tmp_path: Path) -> None:
    model = holder(Kind("llama", {"max_position_embeddings": 2048}))
    session, _ = export(model, tmp_path, decoder.plain_decoder)
    made = decoder.plain_decoder(decoder.Geometry.of(model.language_model.config))
    skeleton, _ = make_skeleton(made, model)
    source = Source(made, skeleton, stored_tensors(tmp_path))
    save_graph(Variant(source, DTYPES["fp16"]).make(), tmp_path / "fp16.onnx")
    random = np.random.default_rng(0)
    sizes = {"batch_size": 1, "sequence_length": 1, "past_sequence_length": 1000}
    feeds = {}
    for value in session.get_inputs():
        shape = [sizes.get(size, size) for size in value.shape]
        feeds[value.name] = random.normal(size=shape).astype(np.float32)
    _, expected, *_ = session.run(None, feeds)
    _, key, *_ = onnxruntime.InferenceSession(str(tmp_path / "fp16.onnx")).run(None, feeds)
    assert max_relative_error(key[:, :, -1], expected[:, :, -1]) < 2e-3


def test_what_no_operator_expresses_falls_back_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = holder(Kind("llama"))
    layer = type(model.language_model.model.layers[0].self_attn)
    forward = layer.forward

    def with_sinks(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        return forward(self, *arguments, **keywords, s_aux=torch.zeros(4))

    monkeypatch.setattr(layer, "forward", with_sinks)
    _, report = export(model, tmp_path, decoder.chat_decoder)
    assert "s_aux" in report.unfused_attention
    assert "GroupQueryAttention" not in report.fused


def test_pairs_by_tables_in_which_each_angle_comes_twice() -> None:
    assert rotation(modeling_glm_ocr.apply_rotary_pos_emb) == "twins"
    assert rotation(modeling_llama.apply_rotary_pos_emb) == "halves"
