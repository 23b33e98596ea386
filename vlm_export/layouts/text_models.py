"""The text models that transformers.js 4.3.1 knows (`getNormalizedConfig` in its `src/configs.js`).

It reads one thing of a text config: how many layers have a cache, in a field that it looks up by `model_type`. With a
type it does not know, it names no cache at all and fails at the first run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig

_LLAMA = "llama"  # stands for types that the client does not know: the number of layers is all that is read
_BY_FIELD = {
    "num_hidden_layers": (
        "afmoe apertus arcee cohere cohere2 ernie4_5 falcon gemma gemma2 gemma3_text glm glm_ocr_text gpt_neox gpt_oss "
        "granite helium hunyuan_v1_dense llama llama4_text ministral ministral3 mistral mobilellm nanochat olmo olmo2 "
        "olmo3 opt phi phi3 qwen2 qwen2_5_vl_text qwen2_moe qwen2_vl_text qwen3 qwen3_moe qwen3_vl_moe_text "
        "qwen3_vl_text smollm3 solar_open stablelm starcoder2 vaultgemma youtu"
    ),
    "n_layer": "bloom codegen gpt2 gpt_bigcode gptj jais",
    "n_layers": "mpt",
    "num_layers": "exaone gpt_neo",
    "num_transformer_layers": "openelm",
}
LAYERS_FIELD = {model_type: field for field, types in _BY_FIELD.items() for model_type in types.split()}


def known_text_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A `text_config` dict as the client can read it: as it is, or as a Llama's of as many layers."""
    field = LAYERS_FIELD.get(values["model_type"])
    if field is not None and isinstance(values.get(field), int):
        return dict(values)
    settings = dict(values)
    layers = AutoConfig.for_model(settings.pop("model_type"), **settings).num_hidden_layers
    return {**values, "model_type": _LLAMA, "num_hidden_layers": layers}
