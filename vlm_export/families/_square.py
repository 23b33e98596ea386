"""What families have in common whose images are squares of one size, each of one number of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from transformers.cache_utils import DynamicCache

from vlm_export.families._chat import ChatReference, sample_ids
from vlm_export.models.chat import load_config
from vlm_export.models.one_tower import TowerEncoder
from vlm_export.spec.family import Config
from vlm_export.spec.graph import Component, TensorSpec

INPUT_DTYPES: dict[str, type[np.generic]] = {
    "pixel_values": np.float32,
    "input_ids": np.int64,
    "attention_mask": np.int64,
}


class WholeCacheReference(ChatReference):
    """A reference whose cache holds all of a prompt in layers with a window too, as the graphs' does."""

    def prefill(self, inputs: Mapping[str, Tensor]) -> Any:
        """As of `ChatReference`."""
        return self.model(**self.arguments(inputs), past_key_values=DynamicCache(), use_cache=True)


def sample_inputs(config: Config, generator: Generator, size: int, rows: int) -> dict[str, Tensor]:
    """`pixel_values` `[1, 3, size, size] float32` and `input_ids` `[1, rows + 8] int64`."""
    return {
        "pixel_values": torch.rand(1, 3, size, size, generator=generator) * 2 - 1,
        "input_ids": sample_ids(config, rows, generator),
    }


def vision_encoder(
    config: Config, size: int, rows: int, encoder: Callable[[Any], nn.Module] = TowerEncoder
) -> Component:
    """`pixel_values` `[images, 3, size, size]` → `image_features` `[images, rows, hidden]`."""
    hidden = load_config(config).text_config.hidden_size
    return Component(
        name="vision_encoder",
        module=encoder,
        inputs=(TensorSpec("pixel_values", "float32", ("num_images", 3, size, size)),),
        outputs=(TensorSpec("image_features", "float32", ("num_images", rows, hidden)),),
    )
