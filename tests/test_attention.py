"""Decoders of many kinds as fused operators: the same numbers as PyTorch, with padding, windows and caps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import padded
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from vlm_export import decoder, simplify, weights
from vlm_export.checkpoint import stored_tensors
from vlm_export.simplify import SimplifyReport
from vlm_export.trace import trace

LLAMA_LIKE = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, rotary in the operator": ("llama", {}),
    "llama, rotary outside": ("llama", {"hidden_size": 32}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "llama, llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen2, bias": ("qwen2", {}),
    "qwen3, norms of query and key": ("qwen3", {"head_dim": 16}),
    "mistral, sliding window": ("mistral", {"sliding_window": 4}),
    "gemma2, caps and windows": ("gemma2", {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16}),
    "phi3, fused projections": ("phi3", {}),
    "gpt2, learned positions": (
        "gpt2",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "num_key_value_heads": None},
    ),
    "opt, offset positions": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 64, "num_key_value_heads": None}),
}


class Holder(nn.Module):
    """What a component's module expects of a model."""

    def __init__(self, language_model: nn.Module):
        super().__init__()
        self.language_model = language_model


@pytest.fixture(params=DECODERS)
def model(request: pytest.FixtureRequest) -> Holder:
    model_type, changes = DECODERS[request.param]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(LLAMA_LIKE | {"initializer_range": 0.2} | changes))
    return Holder(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())


def export(model: Holder, folder: Path) -> tuple[onnxruntime.InferenceSession, SimplifyReport]:
    """The chat layout's decoder, the one that padding can reach."""
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    component = decoder.chat_decoder(decoder.Geometry.of(model.language_model.config))
    structure, report = simplify.simplify(trace(component, model), component)
    weights.save_graph(weights.attach_weights(structure, component, stored_tensors(folder)), folder / "decoder.onnx")
    return onnxruntime.InferenceSession(str(folder / "decoder.onnx")), report


def test_left_padding_prefill_and_decode(model: Holder, tmp_path: Path) -> None:
    session, report = export(model, tmp_path)
    assert (report.unfused_attention, report.unfused_rotary) == ("", "")
    assert report.fused["GroupQueryAttention"] == 2
    padded.compare(session, model.language_model)


def test_what_no_operator_expresses_falls_back_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model("llama", **LLAMA_LIKE)
    model = Holder(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())
    layer = type(model.language_model.model.layers[1].self_attn)
    forward = layer.forward

    def with_sinks(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        return forward(self, *arguments, **keywords, s_aux=torch.zeros(4))

    monkeypatch.setattr(layer, "forward", with_sinks)
    _, report = export(model, tmp_path)
    assert "s_aux" in report.unfused_attention
    assert "GroupQueryAttention" not in report.fused
