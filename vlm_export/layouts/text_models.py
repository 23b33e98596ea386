"""The text models that transformers.js 4.3.1 knows (`getNormalizedConfig` in its `src/configs.js`).

It reads one thing of a text config: how many layers have a cache, in a field that it looks up by `model_type`. With a
type it does not know, it names no cache at all and fails at the first run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig

from vlm_export.contract import LAYERS_FIELD

_LLAMA = "llama"  # stands for types that the client does not know: the number of layers is all that is read


def known_text_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A `text_config` dict as the client can read it: as it is, or as a Llama's of as many layers."""
    field = LAYERS_FIELD.get(values["model_type"])
    if field is not None and isinstance(values.get(field), int):
        return dict(values)
    settings = dict(values)
    layers = AutoConfig.for_model(settings.pop("model_type"), **settings).num_hidden_layers
    return {**values, "model_type": _LLAMA, "num_hidden_layers": layers}
