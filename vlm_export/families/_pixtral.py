"""The family of a Pixtral tower: images of their own proportions, a row of features for each square of patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from vlm_export import patches
from vlm_export.families._chat import ChatReference, chat_family, sample_ids
from vlm_export.layouts.pixtral import PixtralChat, image_processor
from vlm_export.models.chat import load_config
from vlm_export.models.pixtral import Places, cell_size, components
from vlm_export.preprocessing import ChatProcessor
from vlm_export.spec.family import About, Config, Family, Layout

_SAMPLE_CELLS = 3, 2  # lines and columns
_SIZES = "image_sizes"
_INPUT_DTYPES: dict[str, type[np.generic]] = {
    "pixel_values": np.float32,
    "input_ids": np.int64,
    "attention_mask": np.int64,
}


class Reference(ChatReference):
    """The class's own forward and `generate`, told that images fill their pixels where nothing else is said."""

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`image_features` `[images, rows, hidden] float32`; `rows` follows from the images' size."""
        given = self.arguments(inputs)
        made = self.model.get_image_features(given["pixel_values"], image_sizes=given[_SIZES], return_dict=True)
        return {"image_features": torch.stack([*made.pooler_output])}

    def arguments(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`inputs`, and the height and width of each image."""
        given = dict(inputs)
        if "pixel_values" in given and _SIZES not in given:
            images, _, *size = given["pixel_values"].shape
            given[_SIZES] = torch.tensor([size] * images)
        return given


def sample_inputs(config: Config, generator: Generator) -> dict[str, Tensor]:
    """`pixel_values` `[1, 3, H, W]` in -1…1, of a few cells, and `input_ids` with a token for each."""
    cell, (lines, columns) = cell_size(load_config(config)), _SAMPLE_CELLS
    return {
        "pixel_values": torch.rand(1, 3, lines * cell, columns * cell, generator=generator) * 2 - 1,
        "input_ids": sample_ids(config, lines * columns, generator),
    }


def preprocessor(folder: Path, config: Config, settings: Mapping[str, Any], *, processor_class: str) -> ChatProcessor:
    """The model's own processor, which cuts images into the cells of its config.

    Raises:
        InputError: as of `ChatProcessor`, or of sizes that the client cannot make.
    """
    loaded = load_config(config)
    with patches.pixtral_processor_without_torchvision():
        return ChatProcessor(
            folder,
            {**image_processor(settings), "patch_size": cell_size(loaded)},
            _INPUT_DTYPES,
            processor_class=processor_class,
            config=config,
            beside={_SIZES: np.int64},
            patch_size=loaded.vision_config.patch_size,
            spatial_merge_size=loaded.spatial_merge_size,
        )


def family(
    model_type: str,
    about: About,
    *,
    places: Places,
    architecture: str,
    processor_class: str,
    ends: tuple[str, str] = ("", ""),
    reference: Callable[[Any, int], ChatReference] = Reference,
) -> Family:
    """The family of a class with its tower and projector in their `places`.

    `architecture` is transformers.js's class, `processor_class` transformers'; `ends` are the tokens that it writes
    after each line of an image's cells and after the last.
    """
    return chat_family(
        model_type,
        about,
        sample_inputs=sample_inputs,
        reference=lambda model: reference(model, 0),
        preprocessor=partial(preprocessor, processor_class=processor_class),
        layout=Layout(partial(components, places=places), PixtralChat(architecture, ends)),
    )
