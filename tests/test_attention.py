"""Decoders of many kinds as fused operators: the same numbers as PyTorch, with padding, windows and caps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from vlm_export import decoder, simplify
from vlm_export.checkpoint import stored_tensors
from vlm_export.graph_file import save_graph
from vlm_export.metrics import max_relative_error
from vlm_export.simplify import SimplifyReport
from vlm_export.trace import trace
from vlm_export.weights import attach_weights

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

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()


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
    save_graph(attach_weights(structure, component, stored_tensors(folder)), folder / "decoder.onnx")
    return onnxruntime.InferenceSession(str(folder / "decoder.onnx")), report


def test_left_padding_prefill_and_decode(model: Holder, tmp_path: Path) -> None:
    session, report = export(model, tmp_path)
    assert report.unfused_attention == ""
    assert report.fused["GroupQueryAttention"] == 2
    language_model: Any = model.language_model
    geometry = decoder.Geometry.of(language_model.config)
    embeds = torch.randn(2, 7, geometry.hidden, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)  # as transformers.js numbers them
    cache: DynamicCache = DynamicCache()
    past = [np.zeros((2, geometry.kv_heads, 0, geometry.head_dim), dtype=np.float32)] * (2 * geometry.layers)
    for step in range(4):
        with torch.inference_mode():
            reference = language_model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=1,
            )
        feeds = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
        names = [value.name for value in session.get_inputs() if value.name.startswith("past_key_values.")]
        arrays = {name: tensor.numpy() for name, tensor in feeds.items()} | dict(zip(names, past, strict=True))
        wanted = {value.name for value in session.get_inputs()}
        arrays["num_logits_to_keep"] = np.array(1, dtype=np.int64)
        logits, *past = session.run(None, {name: array for name, array in arrays.items() if name in wanted})
        assert max_relative_error(logits, reference.logits.numpy()) < 1e-4, step
        for layer, values in enumerate(cache.layers):
            for place, tensor in enumerate((values.keys, values.values)):
                ours, theirs = past[2 * layer + place], tensor.numpy()
                kept = theirs.shape[2]  # transformers' own cache of a windowed layer forgets what is outside it
                real = mask.bool().numpy()[:, None, -kept:, None]
                assert max_relative_error(np.where(real, ours[:, :, -kept:], 0), np.where(real, theirs, 0)) < 1e-4
        embeds = torch.randn(2, 1, geometry.hidden, generator=torch.Generator().manual_seed(step))
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], dim=1)
        positions = mask.sum(-1, keepdim=True) - 1


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
