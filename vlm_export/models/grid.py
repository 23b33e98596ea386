"""Towers that take an image as patches and a grid: those of Qwen-VL and their kin, an image at a time.

The patches of a cell, `merge` × `merge` of them, come one after the other, then the next cell's, line by line. Where a
patch is follows from its number and the grid, so that no loop over images is traced; one image is one segment, over
all of which attention runs. Source of the order: transformers 5.23, `get_vision_position_ids` in `vision_utils.py`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlm_export.models.chat import Parts
from vlm_export.models.rotary import rotate_heads

TOWER = "model.visual"


@dataclass(frozen=True)
class Places:
    """Where the patches of one image are: `row` and `column` `[patches] int64`, of a grid of `height` × `width`."""

    row: Tensor
    column: Tensor
    height: Tensor
    width: Tensor

    @classmethod
    def of(cls, count: int, grid_thw: Tensor, merge: int) -> Places:
        """Those of `count` patches in the order of cells; `grid_thw` `[1, 3] int64`."""
        height, width = grid_thw[0, 1], grid_thw[0, 2]
        number = torch.arange(count)
        in_line = merge * width  # patches of a line of cells
        cell = (number % in_line) // (merge * merge)
        row = number // in_line * merge + number // merge % merge
        return cls(row, cell * merge + number % merge, height, width)

    @property
    def pairs(self) -> Tensor:
        """`[patches, 2]`: rows and columns, as the rotary modules take them."""
        return torch.stack([self.row, self.column], dim=-1)


class GridEncoder(Parts):
    """`pixel_values` `[patches, channels · frames · P²]` and a grid `[1, 3]` → `image_features` `[cells, hidden]`."""

    def __init__(self, model: Any):
        super().__init__(model, [TOWER])
        self.merge = int(model.config.vision_config.spatial_merge_size)

    @property
    def tower(self) -> Any:
        """The model's own tower, whose parts run."""
        return self.get_submodule(TOWER)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Run the tower's blocks, and what makes one row of a cell."""
        places = Places.of(pixel_values.shape[0], grid_thw, self.merge)
        return self.features(self.run_blocks(self.embed(pixel_values, places), places))

    def embed(self, pixel_values: Tensor, places: Places) -> Tensor:
        """`[patches, width]`: the kernel of the model's 3-D convolution is as large as a patch, so it is a product."""
        projection = self.tower.patch_embed.proj
        return functional.linear(pixel_values, projection.weight.flatten(1), projection.bias)

    def run_blocks(self, hidden: Tensor, places: Places) -> Tensor:
        """The blocks of the tower, one after the other."""
        tables = self.tower.rotary_pos_emb(hidden, places.pairs)
        for block, bias in zip(self.tower.blocks, self.biases(places), strict=True):
            hidden = run_block(block, hidden, tables, bias)
        return hidden

    def biases(self, places: Places) -> list[Tensor | None]:
        """What is added to the scores of each block, `[1, 1, patches, patches]`; None where all see each other."""
        return [None] * len(self.tower.blocks)

    def features(self, hidden: Tensor) -> Tensor:
        """`[patches, width]` → `[cells, hidden]`."""
        return self.tower.merger(hidden)


def run_block(block: Any, hidden: Tensor, tables: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
    """A block of the tower on `[patches, width]`; `tables` are cosines and sines `[patches, head size]`."""
    hidden = hidden + attend(block.attn, block.norm1(hidden), tables, bias)
    return hidden + block.mlp(block.norm2(hidden))


def attend(attn: Any, hidden: Tensor, tables: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
    """The attention of a block, by transformers' interface, over all patches at once.

    The model's own forward cuts them into as many pieces as there are images, by numbers that a trace does not know.
    """
    split = attn.qkv(hidden).unflatten(-1, (3, attn.num_heads, -1))
    query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in split.unbind(1))  # [1, heads, patches, size]
    if hasattr(attn, "q_norm"):
        query, key = attn.q_norm(query), attn.k_norm(key)
    query, key = (rotate_heads(heads, *tables) for heads in (query, key))
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(
        attn.config._attn_implementation, sys.modules[type(attn).__module__].eager_attention_forward
    )
    made, _ = interface(attn, query, key, value, bias, scaling=attn.scaling, is_causal=False)
    return attn.proj(made.reshape(hidden.shape[0], -1))


def inside(same: Tensor, dtype: torch.dtype) -> Tensor:
    """`[patches, patches] bool`, whether one sees the other, as a bias `[1, 1, patches, patches]`."""
    zero, lowest = torch.zeros((), dtype=dtype), torch.full((), torch.finfo(dtype).min, dtype=dtype)
    return torch.where(same, zero, lowest)[None, None]
