"""The family of Idefics3 and of SmolVLM: an image is split into tiles, each of which becomes a fixed number of rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from vlm_export.families._chat import ChatReference, chat_family, sample_ids
from vlm_export.layouts.tiled import TiledChat
from vlm_export.models.chat import load_config
from vlm_export.models.tiled import chat, loaded_tile_tokens, tile_tokens
from vlm_export.preprocessing import ChatProcessor
from vlm_export.spec.family import About, Config, Family, Layout

_INPUT_DTYPES: dict[str, type[np.generic]] = {
    "pixel_values": np.float32,
    "pixel_attention_mask": np.bool_,
    "input_ids": np.int64,
    "attention_mask": np.int64,
}


def sample_inputs(config: Config, generator: Generator) -> dict[str, Tensor]:
    """A prompt with an image of two tiles: `pixel_values` `[1, 2, 3, E, E]` in -1…1, an all-true mask, and ids."""
    edge = load_config(config).vision_config.image_size
    return {
        "pixel_values": torch.rand(1, 2, 3, edge, edge, generator=generator) * 2 - 1,
        "pixel_attention_mask": torch.ones(1, 2, edge, edge, dtype=torch.bool),
        "input_ids": sample_ids(config, 2 * tile_tokens(config), generator),
    }


def preprocessor(folder: Path, config: Config, settings: Mapping[str, Any]) -> ChatProcessor:
    """Idefics3's processor for both: SmolVLM's does the same to images, and wants a video processor beside it."""
    return ChatProcessor(
        folder,
        settings,
        _INPUT_DTYPES,
        processor_class="Idefics3Processor",
        image_seq_len=tile_tokens(config),
    )


def family(model_type: str, processor_class: str, about: About) -> Family:
    """The family of a model type; `processor_class` is transformers.js's."""
    return chat_family(
        model_type,
        about,
        sample_inputs=sample_inputs,
        reference=lambda model: ChatReference(model, loaded_tile_tokens(model.config)),
        preprocessor=preprocessor,
        layout=Layout(chat, TiledChat(processor_class, tile_tokens)),
        joins=True,
    )
