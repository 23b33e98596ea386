"""GLM-OCR: images of any size as patches and a grid; four patches of a cell are joined by a convolution."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from vlm_export.families._grid import NOTES, family
from vlm_export.models.grid import GridEncoder
from vlm_export.spec.family import About


class Encoder(GridEncoder):
    """A tower whose cells are one product each: the kernel of the model's convolution is as large as a cell."""

    def features(self, hidden: Tensor) -> Tensor:
        """`[patches, width]` → `[cells, hidden]`; the kernel has channels first, the lines of a cell, its columns."""
        tower = self.tower
        cells = tower.post_layernorm(hidden).unflatten(0, (-1, self.merge**2)).transpose(1, 2).flatten(1)
        return tower.merger(functional.linear(cells, tower.downsample.weight.flatten(1), tower.downsample.bias))


ABOUT = About(
    summary="GLM-OCR",
    since="0.1.0",
    towers=("glm_ocr_vision",),
    decoders=("glm_ocr_text",),
    notes=NOTES,
)
FAMILY = family(
    "glm_ocr",
    ABOUT,
    processor_class="Glm46VProcessor",
    image_processor_type="Glm46VImageProcessor",
    encoder=Encoder,
)
