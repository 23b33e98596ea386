"""Qwen3-VL: a position table that is resampled for each image, and DeepStack.

Some blocks of the tower give features beside the last one's, and the first layers of the text model add them to an
image's rows. They go in the same rows as the features (`models/wide_rows.py`): stock transformers.js feeds them so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlm_export.families import _chat
from vlm_export.families._grid import AXES, NOTES, GridReference, family
from vlm_export.models.chat import load_config
from vlm_export.models.grid import GridEncoder, Places, run_block
from vlm_export.models.wide_rows import wide_text_components
from vlm_export.spec.family import About, Config
from vlm_export.spec.graph import Component


def parts(config: Any) -> int:
    """Features of a cell that lie side by side: the tower's, and those for the first layers of the text model."""
    return 1 + len(config.vision_config.deepstack_visual_indexes)


class DeepEncoder(GridEncoder):
    """`pixel_values` and a grid → `image_features` `[cells, parts · hidden]`."""

    def embed(self, pixel_values: Tensor, places: Places) -> Tensor:
        """Patches, and the position table at each one's place: bilinear between four entries, corners on corners.

        `get_vision_interpolation_indices_and_weights` in transformers 5.23's `vision_utils.py`.
        """
        side = self.tower.num_grid_per_side
        lines = _between(places.row, places.height, side)
        columns = _between(places.column, places.width, side)
        taken = [
            self.tower.pos_embed(line * side + column) * (weight * share)[:, None]
            for line, weight in lines
            for column, share in columns
        ]
        return super().embed(pixel_values, places) + sum(taken)

    def run_blocks(self, hidden: Tensor, places: Places) -> Tensor:
        """The blocks, one after the other; returns what those that give features made, `[cells, parts · hidden]`."""
        tower = self.tower
        tables = tower.rotary_pos_emb(hidden, places.pairs)
        deep: list[Tensor] = []
        for index, block in enumerate(tower.blocks):
            hidden = run_block(block, hidden, tables, None)
            if index in tower.deepstack_visual_indexes:
                deep.append(tower.deepstack_merger_list[len(deep)](hidden))
        return torch.cat([tower.merger(hidden), *deep], dim=-1)

    def features(self, hidden: Tensor) -> Tensor:
        """They are there already."""
        return hidden


def _between(place: Tensor, count: Tensor, side: int) -> list[tuple[Tensor, Tensor]]:
    """The two entries of a line of `side` that each of `count` places lies between, and how much of each it takes."""
    exact = place * (side - 1) / (count - 1).clamp(min=1)
    first = exact.floor()
    second = (first + 1).clamp(max=side - 1)
    return [(first.long(), 1 - (exact - first)), (second.long(), exact - first)]


class DeepReference(GridReference):
    """The class's own forward, and all its features side by side."""

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`image_features` `[cells of all images, parts · hidden] float32`, by the class's `get_image_features`."""
        made = self.features(inputs)
        by_image = (made.pooler_output, *made.deepstack_features)
        return {"image_features": torch.cat([torch.cat([*images]) for images in by_image], dim=-1)}


def build(config: Config) -> PreTrainedModel:
    """The model, which says of its layers which take or give features: `graph/stacks.py` looks for such lists."""
    model: Any = _chat.build(config)
    vision, text = model.model.visual.config, model.model.language_model.config
    taken = {index: place for place, index in enumerate(vision.deepstack_visual_indexes)}
    vision.block_gives = [taken.get(index, -1) for index in range(vision.depth)]
    text.layer_takes = [index if index < len(taken) else -1 for index in range(text.num_hidden_layers)]
    return model


def text_components(config: Config) -> tuple[Component, Component]:
    """`embed_tokens` and `decoder_model_merged`, whose rows are as wide as those of an image."""
    return wide_text_components(config, "model.language_model", AXES, parts(load_config(config)))


ABOUT = About(
    summary="Qwen3-VL, with DeepStack",
    since="0.1.0",
    towers=("qwen3_vl_vision",),
    decoders=("qwen3_vl_text",),
    notes=(
        *NOTES,
        "DeepStack works in stock transformers.js, since an image's further features lie in the same rows; a repo that "
        "gives them as outputs of their own loses them there, as no client feeds them on.",
        "Mixtures of experts are another `model_type`.",
    ),
)
FAMILY = family(
    "qwen3_vl",
    ABOUT,
    processor_class="Qwen3VLProcessor",
    encoder=DeepEncoder,
    reference=DeepReference,
    text=text_components,
    parts=parts,
    build=build,
)
