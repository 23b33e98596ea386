"""LLaVA 1.5 and its kin: a CLIP or SigLIP tower, features of one layer or several, an MLP, and any text model.

Checkpoints by transformers 4 name their tensors otherwise than transformers 5 does; both are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from transformers import AutoModelForImageTextToText

from vlm_export.chat_model import ChatReference, load_config, sample_ids, text_components, text_config
from vlm_export.clip_like import FeatureEncoder, image_features, trim_tower
from vlm_export.families.base import Component, Config, Family, Layout, TensorSpec
from vlm_export.layouts.llava import LlavaChat
from vlm_export.processing import ChatProcessor

_RENAMED = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.(model\.)?", "model.language_model."),
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
)
_UNUSED = re.compile(r".*\.(position_ids|rotary_emb\.inv_freq)$")


def rename(key: str) -> str | None:
    """transformers 4's key → transformers 5's, or None for what inference never uses."""
    if _UNUSED.match(key):
        return None
    for pattern, name in _RENAMED:
        key, found = re.subn(pattern, name, key, count=1)
        if found:
            break
    return key


def image_tokens(config: Config) -> int:
    """Rows of `image_features` for one image."""
    return image_features(load_config(config))


def sample_inputs(config: Config, generator: Generator) -> dict[str, Tensor]:
    size = load_config(config).vision_config.image_size
    return {
        "pixel_values": torch.rand(2, 3, size, size, generator=generator) * 2 - 1,
        "input_ids": sample_ids(config, image_tokens(config), generator),
    }


def feeder(folder: Path, config: Config, settings: Mapping[str, Any]) -> ChatProcessor:
    fed: dict[str, type[np.generic]] = {"pixel_values": np.float32, "input_ids": np.int64, "attention_mask": np.int64}
    return ChatProcessor(folder, settings, fed, processor_class="LlavaProcessor")


def chat(config: Config) -> tuple[Component, ...]:
    loaded = load_config(config)
    size = loaded.vision_config.image_size
    encoder = Component(
        name="vision_encoder",
        module=FeatureEncoder,
        inputs=(TensorSpec("pixel_values", "float32", ("num_images", 3, size, size)),),
        outputs=(
            TensorSpec(
                "image_features", "float32", ("num_images", image_tokens(config), loaded.text_config.hidden_size)
            ),
        ),
    )
    return encoder, *text_components(config, "model.language_model")


def build(config: dict[str, Any]) -> nn.Module:
    return AutoModelForImageTextToText.from_config(load_config(config))


FAMILY = Family(
    model_type="llava",
    build=build,
    rename=rename,
    embedded_lora=lambda config: None,
    merged_config=dict,
    text_config=text_config,
    sample_inputs=sample_inputs,
    reference=lambda model: ChatReference(model, image_features(model.config)),
    feeder=feeder,
    layouts={"chat": Layout(chat, LlavaChat(image_tokens))},
    trim=trim_tower,
)
