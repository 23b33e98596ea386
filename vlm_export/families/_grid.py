"""The family of Qwen-VL and its kin: an image is patches and a grid, and tokens have places in three axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel

from vlm_export.errors import InputError, shown
from vlm_export.families._chat import ChatReference, build, chat_family
from vlm_export.layouts.grid import GridChat
from vlm_export.models.chat import load_config, text_components
from vlm_export.models.grid import GridEncoder
from vlm_export.preprocessing import ChatProcessor
from vlm_export.spec.family import About, Config, Family, Layout, MakeComponents
from vlm_export.spec.graph import Component, TensorSpec

_INPUT_DTYPES: dict[str, type[np.generic]] = {
    "pixel_values": np.float32,
    "image_grid_thw": np.int64,
    "input_ids": np.int64,
    "attention_mask": np.int64,
}
NOTES = (
    "One image a prompt in transformers.js 4.3.1, whose processor counts the tokens of the first alone; "
    "`vlm-export run`, `serve` and the JavaScript package take several.",
    "No video.",
)
AXES = 3  # of a token's place: time, height, width
_CELLS = (2, 3)  # lines and columns of the sample image


def merge_size(config: Config) -> int:
    """Lines, and columns, of patches whose features become one row."""
    return int(load_config(config).vision_config.spatial_merge_size)


def patch_numbers(config: Config) -> int:
    """Numbers of a patch: channels, frames, lines and columns of it."""
    vision = load_config(config).vision_config
    return int(vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)


def sample_grid(config: Config) -> list[int]:
    """Frames, lines and columns of patches of the sample image."""
    merge = merge_size(config)
    return [1, _CELLS[0] * merge, _CELLS[1] * merge]


def sample_inputs(config: Config, generator: Generator) -> dict[str, Tensor]:
    """An image of six cells, and ids in which it stands behind what starts one."""
    loaded, grid = load_config(config), sample_grid(config)
    patches = grid[1] * grid[2]
    image = torch.full((1, _CELLS[0] * _CELLS[1]), loaded.image_token_id)
    before, after = (_other_ids(loaded, length, generator) for length in (3, 8))
    start = getattr(loaded, "vision_start_token_id", None)
    if start is not None:
        before[:, -1] = start
    return {
        "pixel_values": torch.rand(patches, patch_numbers(config), generator=generator) * 2 - 1,
        "image_grid_thw": torch.tensor([grid]),
        "input_ids": torch.cat([before, image, after], dim=1),
    }


def _other_ids(loaded: Any, length: int, generator: Generator) -> Tensor:
    """`[1, length] int64` of tokens that stand for no image or video."""
    taken = {getattr(loaded, name, None) for name in ("image_token_id", "video_token_id")}
    others = torch.tensor([each for each in range(loaded.get_text_config().vocab_size) if each not in taken])
    return others[torch.randint(len(others), (1, length), generator=generator)]


# By the key of an image processor, what the tower's config calls the same.
_SAME = {
    "patch_size": "patch_size",
    "merge_size": "spatial_merge_size",
    "temporal_patch_size": "temporal_patch_size",
}


def _check_patches(settings: Mapping[str, Any], vision: Any) -> None:
    """Raises InputError where an image processor would cut other patches than the tower takes."""
    for key, name in _SAME.items():
        own = settings.get(key)
        if own is not None and own != getattr(vision, name):
            raise InputError(
                f"preprocessor_config.json: {key}: is {shown(own)}, and config.json: vision_config.{name} "
                f"{getattr(vision, name)}: write the same number in both"
            )


class GridReference(ChatReference):
    """The class's own forward and `generate`, told which tokens are an image's, and where a step's tokens are.

    The class keeps in itself what the last prompt shifted places by: here it is computed of the step's own prompt.
    """

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`image_features` `[cells of all images, hidden] float32`, by the class's `get_image_features`."""
        return {"image_features": torch.cat([*self.features(inputs).pooler_output])}

    def features(self, inputs: Mapping[str, Tensor]) -> Any:
        """The output of the class's `get_image_features`."""
        return self.model.get_image_features(
            pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"], return_dict=True
        )

    def step(self, token_ids: Tensor, past: Any, inputs: Mapping[str, Tensor]) -> Any:
        """The class's output for `[batch, tokens] int64` after the cache `past`."""
        shift = torch.zeros(len(token_ids), 1, dtype=torch.int64)
        if "image_grid_thw" in inputs:
            kinds = self._kinds(inputs["input_ids"])
            _, shift = self.model.model.get_rope_index(inputs["input_ids"], kinds, inputs["image_grid_thw"])
        start = past.get_seq_length()
        places = torch.arange(start, start + token_ids.shape[1]) + shift
        return self.model(
            input_ids=token_ids, past_key_values=past, use_cache=True, position_ids=places.expand(AXES, -1, -1)
        )

    def arguments(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`inputs`, and for each token whether it is an image's."""
        return {**inputs, "mm_token_type_ids": self._kinds(inputs["input_ids"])}

    def _kinds(self, token_ids: Tensor) -> Tensor:
        return (token_ids == self.model.config.image_token_id).int()


def family(
    model_type: str,
    about: About,
    *,
    processor_class: str,
    image_processor_type: str = "Qwen2VLImageProcessor",
    grid_name: str = "image_grid_thw",
    encoder: Callable[[Any], nn.Module] = GridEncoder,
    reference: Callable[[Any, int], GridReference] = GridReference,
    text: MakeComponents = lambda config: text_components(config, "model.language_model", AXES),
    parts: Callable[[Any], int] = lambda config: 1,
    build: Callable[[Config], PreTrainedModel] = build,
) -> Family:
    """The family of a model type whose tower takes the grid as `grid_name`.

    `processor_class` and `image_processor_type` are the names of transformers and of transformers.js. `text` gives the
    graphs of the text model, whose rows have so many `parts` under a loaded config.
    """

    def preprocessor(folder: Path, config: Config, settings: Mapping[str, Any]) -> ChatProcessor:
        _check_patches(settings, load_config(config).vision_config)
        return ChatProcessor(folder, settings, _INPUT_DTYPES, processor_class=processor_class)

    def chat(config: Config) -> tuple[Component, ...]:
        loaded, grid = load_config(config), sample_grid(config)
        width = parts(loaded) * loaded.get_text_config().hidden_size
        vision_encoder = Component(
            name="vision_encoder",
            module=encoder,
            inputs=(
                TensorSpec("pixel_values", "float32", ("num_patches", patch_numbers(config))),
                TensorSpec(grid_name, "int64", (1, 3)),
            ),
            outputs=(TensorSpec("image_features", "float32", ("num_cells", width)),),
            sample_values={grid_name: [grid]},
            sample_sizes={"num_patches": grid[1] * grid[2]},
        )
        return vision_encoder, *text(config)

    return chat_family(
        model_type,
        about,
        sample_inputs=sample_inputs,
        reference=lambda model: reference(model, 0),
        preprocessor=preprocessor,
        layout=Layout(chat, GridChat(processor_class, image_processor_type)),
        build=build,
    )
