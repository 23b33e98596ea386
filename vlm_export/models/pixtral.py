"""Mistral 3 and LightOnOCR: a Pixtral tower, squares of whose patches become one row of features.

transformers lays the patches of all images behind one another and keeps them apart by a mask. Here the images of a run
are a batch of one size, so that there is nothing to mask, and every length follows from that size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from vlm_export.errors import InputError
from vlm_export.models.chat import Parts, load_config, text_components
from vlm_export.spec.family import Config
from vlm_export.spec.graph import Component, TensorSpec

_TOWER_PARTS = ("patch_conv", "ln_pre", "patch_positional_embedding", "transformer")
_PROJECTOR_PARTS = ("norm", "patch_merger.merging_layer", "linear_1", "act", "linear_2")


@dataclass(frozen=True)
class Places:
    """Where a class has its tower and its projector."""

    tower: str
    projector: str


def cell_size(config: PretrainedConfig) -> int:
    """Pixels of the side of what becomes one row of features."""
    return int(config.vision_config.patch_size) * int(config.spatial_merge_size)


class PixtralEncoder(Parts):
    """`pixel_values` `[images, 3, H, W]` → `image_features` `[images, rows, hidden]`: a row a cell, line by line.

    What a side has beyond whole cells is seen by the tower, and becomes no row.
    """

    def __init__(self, model: Any, places: Places):
        tower = [f"{places.tower}.{part}" for part in _TOWER_PARTS]
        super().__init__(model, [*tower, *(f"{places.projector}.{part}" for part in _PROJECTOR_PARTS)])
        self.places = places
        self.merged = int(model.config.spatial_merge_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Run the tower on each image alone, then the projector on squares of its patches."""
        tower: Any = self.get_submodule(self.places.tower)
        patches = tower.patch_conv(pixel_values)
        height, width = patches.shape[2:]
        hidden = tower.ln_pre(patches.flatten(2).transpose(1, 2))
        positions = tower.patch_positional_embedding(hidden, _places_of_patches(height, width))
        made = tower.transformer(hidden, attention_mask=None, position_embeddings=positions).last_hidden_state
        projector: Any = self.get_submodule(self.places.projector)
        squares = _squares(projector.norm(made).unflatten(1, (height, width)), self.merged)
        merged = projector.patch_merger.merging_layer(squares)
        return projector.linear_2(projector.act(projector.linear_1(merged)))


def _places_of_patches(height: int, width: int) -> Tensor:
    """`[height · width, 2] int64`: the line and the column of each patch, line by line."""
    lines, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([lines.flatten(), columns.flatten()], dim=-1)


def _squares(grid: Tensor, side: int) -> Tensor:
    """`[images, h, w, C]` → `[images, h/side · w/side, C · side²]`, in the order of torch's `unfold`.

    That is channel by channel, and of each channel the square's patches line by line.
    """
    lines, columns = grid.shape[1] // side, grid.shape[2] // side
    whole = grid[:, : lines * side, : columns * side]
    squares = whole.unflatten(1, (lines, side)).unflatten(3, (columns, side))  # [images, lines, side, columns, side, C]
    return squares.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)


def components(config: Config, places: Places) -> tuple[Component, ...]:
    """The graphs of `chat`: `vision_encoder`, for images of any size, and the two of the text model.

    Raises:
        InputError: features of another layer than the last, or cells that are no squares.
    """
    loaded = load_config(config)
    layer = getattr(loaded, "vision_feature_layer", -1)
    if layer not in (-1, loaded.vision_config.num_hidden_layers):
        raise InputError(f"config.json: vision_feature_layer: {layer!r}: only the last layer's features are supported")
    if not isinstance(loaded.vision_config.patch_size, int):
        raise InputError(f"config.json: vision_config.patch_size: {loaded.vision_config.patch_size!r} is no number")
    encoder = Component(
        name="vision_encoder",
        module=lambda model: PixtralEncoder(model, places),
        inputs=(TensorSpec("pixel_values", "float32", ("num_images", 3, "height", "width")),),
        outputs=(TensorSpec("image_features", "float32", ("num_images", "rows", loaded.text_config.hidden_size)),),
    )
    return encoder, *text_components(config, "model.language_model")
