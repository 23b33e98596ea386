"""LFM2-VL of Liquid AI: tiles of any proportions, a SigLIP 2 tower, an LFM2 of short convolutions and attention."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from vlm_export.errors import InputError
from vlm_export.families._chat import ChatReference, chat_family, sample_ids
from vlm_export.layouts.naflex import NaflexChat
from vlm_export.models.chat import load_config
from vlm_export.models.naflex import chat, patch_numbers, sample_mask, sample_shapes
from vlm_export.preprocessing import ChatProcessor
from vlm_export.runtime.images import ImageProcessor
from vlm_export.spec.family import About, Config, Layout

_INPUT_DTYPES: dict[str, type[np.generic]] = {
    "pixel_values": np.float32,
    "pixel_attention_mask": np.int64,
    "spatial_shapes": np.int64,
    "input_ids": np.int64,
    "attention_mask": np.int64,
}
_OF_IMAGES = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


class Reference(ChatReference):
    """The class's own forward and `generate`."""

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`image_features` `[cells of all tiles, hidden] float32`, by the class's `get_image_features`."""
        images = {name: inputs[name] for name in _OF_IMAGES}
        made = self.model.get_image_features(**images, return_dict=True)
        return {"image_features": torch.cat([*made.pooler_output])}


def sample_inputs(config: Config, generator: Generator) -> dict[str, Tensor]:
    """Two tiles of other proportions, the smaller padded, and ids: as many of the image as there are cells."""
    shapes, mask = torch.tensor(sample_shapes(config)), torch.tensor(sample_mask(config))
    pixels = torch.rand(*mask.shape, patch_numbers(config), generator=generator) * 2 - 1
    cells = int(shapes.prod(dim=1).sum()) // load_config(config).downsample_factor ** 2
    return {
        "pixel_values": pixels * mask[..., None],
        "pixel_attention_mask": mask,
        "spatial_shapes": shapes,
        "input_ids": sample_ids(config, cells, generator),
    }


def preprocessor(folder: Path, config: Config, settings: Mapping[str, Any]) -> ChatProcessor:
    """The model's own processor, on prompts that begin as transformers.js has them begin.

    transformers leaves the first token to the chat template, transformers.js to the tokenizer, where that writes one.

    Raises:
        InputError: other patches than the tower takes, or settings that make no tiles.
    """
    loaded, made = load_config(config), ImageProcessor(settings).settings
    own = {"encoder_patch_size": loaded.vision_config.patch_size, "downsample_factor": loaded.downsample_factor}
    for key, wanted in own.items():
        if made[key] != wanted:
            raise InputError(
                f"preprocessor_config.json: {key}: is {made[key]}, and the model of config.json takes {wanted}: write "
                "the same number in both"
            )
    return ChatProcessor(
        folder, settings, _INPUT_DTYPES, processor_class="Lfm2VlProcessor", call={"add_special_tokens": True}
    )


FAMILY = chat_family(
    "lfm2_vl",
    About(
        summary="LFM2-VL and LFM2.5-VL of Liquid AI, 450M to 3B: tiles of any proportions before a hybrid LFM2",
        since="0.1.0",
        towers=("siglip2_vision_model",),
        decoders=("lfm2",),
        notes=(
            "transformers' processor needs torchvision; where that is not installed, torch makes the same pixels.",
            "transformers.js resizes without smoothing and after normalizing, so that its pixels of large pictures are "
            "not transformers'; halves of a cell it rounds up, transformers to the even cell.",
            "A layer of a short convolution keeps its last inputs, and no positions: a conversation goes on from the "
            "last prompt where an answer is tokenized anew.",
        ),
    ),
    sample_inputs=sample_inputs,
    reference=lambda model: Reference(model, 0),
    preprocessor=preprocessor,
    layout=Layout(chat, NaflexChat()),
)
