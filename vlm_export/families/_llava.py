"""The family of a llava: features of one tower for each image, a projector, any text model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from transformers import PretrainedConfig

from vlm_export.families._chat import ChatReference, chat_family, sample_ids
from vlm_export.layouts.chat import llava_processor
from vlm_export.layouts.llava import LlavaChat
from vlm_export.models.chat import load_config, text_components
from vlm_export.models.llava import FeatureEncoder, feature_rows, trim_tower
from vlm_export.preprocessing import ChatProcessor, check_image_size
from vlm_export.spec.family import About, Config, Family, Layout
from vlm_export.spec.graph import Component, TensorSpec

_INPUT_DTYPES: dict[str, type[np.generic]] = {
    "pixel_values": np.float32,
    "input_ids": np.int64,
    "attention_mask": np.int64,
}


def family(
    model_type: str,
    about: About,
    *,
    encoder: Callable[[Any], nn.Module] = FeatureEncoder,
    reference: Callable[[Any, int], ChatReference] = ChatReference,
    rows_of_its_own: int = 0,
    image_processor: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> Family:
    """The family of a llava that adds `rows_of_its_own` to an image's features.

    `image_processor` are the settings that give the pixels that transformers.js feeds, where the model's own do not.
    """

    def rows(config: PretrainedConfig) -> int:
        return feature_rows(config) + rows_of_its_own

    def image_tokens(config: Config) -> int:
        return rows(load_config(config))

    def sample_inputs(config: Config, generator: Generator) -> dict[str, Tensor]:
        size = load_config(config).vision_config.image_size
        return {
            "pixel_values": torch.rand(1, 3, size, size, generator=generator) * 2 - 1,
            "input_ids": sample_ids(config, image_tokens(config), generator),
        }

    def preprocessor(folder: Path, config: Config, settings: Mapping[str, Any]) -> ChatProcessor:
        check_image_size(image_processor(settings), load_config(config).vision_config.image_size)
        processor = llava_processor("<image>", image_tokens(config)) | {"vision_feature_select_strategy": "full"}
        return ChatProcessor(folder, image_processor(settings), _INPUT_DTYPES, **processor)

    def chat(config: Config) -> tuple[Component, ...]:
        loaded = load_config(config)
        size, hidden = loaded.vision_config.image_size, loaded.text_config.hidden_size
        vision_encoder = Component(
            name="vision_encoder",
            module=encoder,
            inputs=(TensorSpec("pixel_values", "float32", ("num_images", 3, size, size)),),
            outputs=(TensorSpec("image_features", "float32", ("num_images", image_tokens(config), hidden)),),
        )
        return vision_encoder, *text_components(config, "model.language_model")

    return chat_family(
        model_type,
        about,
        sample_inputs=sample_inputs,
        reference=lambda model: reference(model, rows(model.config)),
        preprocessor=preprocessor,
        layout=Layout(chat, LlavaChat(image_tokens)),
        trim=trim_tower,
        joins=True,
    )
