"""LFM2-VL: tiles of any proportions for a SigLIP 2 tower, squares of whose patches become one row of features.

A client feeds the patches of each tile line by line, with padding behind them to one number for all, a mask of those
that are there, and lines and columns of each tile. transformers stretches the position table and takes the squares in a
loop over tiles; here both follow from these numbers, for all tiles at once (transformers 5.23,
`resize_positional_embeddings` in `models/siglip2/modeling_siglip2.py`, `pixel_unshuffle` in
`models/lfm2_vl/modeling_lfm2_vl.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_export.models.attention import padding_bias
from vlm_export.models.chat import Parts, load_config, text_components
from vlm_export.spec.family import Config
from vlm_export.spec.graph import Component, TensorSpec

_TOWER, _PROJECTOR = "model.vision_tower", "model.multi_modal_projector"
_SAMPLE_SQUARES = (2, 3), (1, 2)  # lines and columns of the squares of each sample tile


def patch_numbers(config: Config) -> int:
    """Numbers of a patch: lines and columns of it, and channels."""
    vision = load_config(config).vision_config
    return int(vision.num_channels * vision.patch_size**2)


def sample_shapes(config: Config) -> list[list[int]]:
    """Lines and columns of patches of the sample tiles."""
    factor = load_config(config).downsample_factor
    return [[factor * lines, factor * columns] for lines, columns in _SAMPLE_SQUARES]


def sample_mask(config: Config) -> list[list[int]]:
    """Which patches of the sample tiles are there, `[tiles, most patches]`."""
    counts = [lines * columns for lines, columns in sample_shapes(config)]
    return [[1] * count + [0] * (max(counts) - count) for count in counts]


class NaflexEncoder(Parts):
    """`pixel_values` `[tiles, patches, numbers]`, a mask `[tiles, patches]` and shapes `[tiles, 2]` →
    `image_features` `[squares of all tiles, hidden]`.
    """

    def __init__(self, model: Any):
        tower = (f"{_TOWER}.{part}" for part in ("embeddings", "encoder.layers", "post_layernorm"))
        projector = (f"{_PROJECTOR}.{part}" for part in ("linear_1", "act", "linear_2"))
        norm = [f"{_PROJECTOR}.layer_norm"] if model.get_submodule(_PROJECTOR).use_layer_norm else []
        super().__init__(model, [*tower, *projector, *norm])
        self.side = int(model.get_submodule(f"{_TOWER}.embeddings").position_embedding_size)
        self.factor = int(model.config.downsample_factor)

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor, spatial_shapes: Tensor) -> Tensor:
        """Run the tower with what pads a tile masked, and the projector on squares of patches."""
        tower: Any = self.get_submodule(_TOWER)
        places = Places.of(pixel_values.shape[1], spatial_shapes)
        hidden = tower.embeddings.patch_embedding(pixel_values) + self.positions(places)
        bias = padding_bias(pixel_attention_mask, pixel_values.shape[1], hidden.dtype)
        for layer in tower.encoder.layers:
            hidden = layer(hidden, bias)
        return self.project(tower.post_layernorm(hidden), places)

    def positions(self, places: Places) -> Tensor:
        """The position table as it is for each tile, `[tiles, patches, width]`."""
        table: Any = self.get_submodule(f"{_TOWER}.embeddings.position_embedding").weight
        lines = stretched(places.row, places.height, self.side)
        columns = stretched(places.column, places.width, self.side)
        shares = (lines[..., :, None] * columns[..., None, :]).flatten(-2)  # of each of the table's rows
        return shares @ table

    def project(self, hidden: Tensor, places: Places) -> Tensor:
        """`[tiles, patches, width]` → a row for each square that is there, `[squares, hidden]`."""
        projector: Any = self.get_submodule(_PROJECTOR)
        squares, found = self.squares(hidden, places)
        if hasattr(projector, "layer_norm"):
            squares = projector.layer_norm(squares)
        rows = projector.linear_2(projector.act(projector.linear_1(squares)))
        return rows.flatten(0, 1)[found.flatten()]

    def squares(self, hidden: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """The patches of each square side by side, line by line, `[tiles, most squares, factor² · width]`, and which
        squares there are, `[tiles, most squares]`.
        """
        factor, patches = self.factor, hidden.shape[1]
        number = torch.arange(patches // factor**2)[None]
        columns = places.width // factor
        first = number // columns * factor * places.width + number % columns * factor
        offsets = [line * places.width + column for line in range(factor) for column in range(factor)]
        wanted = (first[..., None] + torch.cat(offsets, dim=-1)[:, None]).clamp(max=patches - 1)
        taken = torch.gather(hidden, 1, wanted.flatten(1)[..., None].expand(-1, -1, hidden.shape[-1]))
        return taken.unflatten(1, (-1, factor**2)).flatten(2), number < places.height * places.width // factor**2


@dataclass(frozen=True)
class Places:
    """Where patches are: `row` and `column` `[tiles, patches]`, `height` and `width` of tiles `[tiles, 1]`, int64."""

    row: Tensor
    column: Tensor
    height: Tensor
    width: Tensor

    @classmethod
    def of(cls, count: int, shapes: Tensor) -> Places:
        """Those of `count` patches a tile, line by line; `shapes` `[tiles, 2] int64`."""
        height, width = shapes[:, :1], shapes[:, 1:]
        number = torch.arange(count)[None]
        return cls(number // width, number % width, height, width)


def stretched(place: Tensor, length: Tensor, side: int) -> Tensor:
    """What each of `side` points gives to the places of a line of `length`: `[tiles, patches, side]`, 1 in sum.

    By the triangles of torch's `interpolate` with `antialias`, which are as wide as a place where that is wider than a
    point. `place` `[tiles, patches] int64`, `length` `[tiles, 1] int64`.
    """
    scale = side / length.to(torch.float32)
    middle = (place + 0.5) * scale
    distance = (torch.arange(side) + 0.5 - middle[..., None]).abs()
    weight = (1 - distance / scale.clamp(min=1.0)[..., None]).clamp(min=0)
    return weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float16).tiny)


def chat(config: Config) -> tuple[Component, ...]:
    """The graphs of `chat`: `vision_encoder`, and the two of the text model."""
    shapes, mask = sample_shapes(config), sample_mask(config)
    hidden = load_config(config).get_text_config().hidden_size
    patches = ("num_tiles", "num_patches")
    encoder = Component(
        name="vision_encoder",
        module=NaflexEncoder,
        inputs=(
            TensorSpec("pixel_values", "float32", (*patches, patch_numbers(config))),
            TensorSpec("pixel_attention_mask", "int64", patches),
            TensorSpec("spatial_shapes", "int64", ("num_tiles", 2)),
        ),
        outputs=(TensorSpec("image_features", "float32", ("num_squares", hidden)),),
        sample_values={"spatial_shapes": shapes, "pixel_attention_mask": mask},
        sample_sizes={"num_tiles": len(mask), "num_patches": len(mask[0])},
    )
    return encoder, *text_components(config, "model.language_model")
