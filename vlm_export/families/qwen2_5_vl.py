"""Qwen2.5-VL: most blocks of its tower attend within windows of an image."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from vlm_export.families import _chat
from vlm_export.families._grid import NOTES, family
from vlm_export.models.grid import GridEncoder, Places, inside
from vlm_export.spec.family import About, Config


class WindowEncoder(GridEncoder):
    """A tower with windows, told apart by a bias: patches keep their order, where the class sorts them by window."""

    def biases(self, places: Places) -> list[Tensor | None]:
        """None for the blocks that see a whole image, and for the others a bias that is 0 within a window."""
        side = self.tower.window_size // self.tower.patch_size // self.merge * self.merge  # patches of a window's side
        line, column = (place // side for place in (places.row, places.column))
        same = (line[:, None] == line) & (column[:, None] == column)
        windows = inside(same, self.tower.patch_embed.proj.weight.dtype)
        whole = self.tower.fullatt_block_indexes
        return [None if index in whole else windows for index in range(len(self.tower.blocks))]


def build(config: Config) -> PreTrainedModel:
    """The model; its tower says of each block whether it sees a whole image: `graph/stacks.py` looks for such lists."""
    model: Any = _chat.build(config)
    vision = model.model.visual.config
    vision.block_sees_all = [index in vision.fullatt_block_indexes for index in range(vision.depth)]
    return model


ABOUT = About(
    summary="Qwen2.5-VL",
    since="0.1.0",
    towers=("qwen2_5_vl_vision",),
    decoders=("qwen2_5_vl_text",),
    notes=NOTES,
)
FAMILY = family("qwen2_5_vl", ABOUT, processor_class="Qwen2_5_VLProcessor", encoder=WindowEncoder, build=build)
