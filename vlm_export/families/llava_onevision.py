"""LLaVA-OneVision, an image at a time: one tile, stretched to the tower's square, and a row that ends it.

That is the first tile that transformers makes of an image that comes alone, and all that transformers.js feeds. The
further ones need sizes that no client passes on. Images that come with others, transformers 5.23 pads to a square.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlm_export.families._chat import ChatReference
from vlm_export.families._llava import family
from vlm_export.models.llava import FeatureEncoder
from vlm_export.spec.family import About

_NEWLINE = "image_newline"
_TILING = ("image_grid_pinpoints", "do_pad", "image_processor_type")


class OneTile(ChatReference):
    """A reference whose class is told that its images do not come alone, so that each is one tile."""

    def arguments(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`inputs` with the sizes of its images, all the tower's own, and a count of images that is one too many.

        The class takes one tile of each image where the count is not 1 (transformers 5.23,
        `models/llava_onevision/modeling_llava_onevision.py`).
        """
        if "pixel_values" not in inputs:
            return dict(inputs)
        images, size = len(inputs["pixel_values"]), self.model.config.vision_config.image_size
        sizes = torch.full((images, 2), size)
        return {**inputs, "image_sizes": sizes, "batch_num_images": torch.tensor([images + 1])}


class EncoderWithNewline(FeatureEncoder):
    """`pixel_values` `[images, 3, H, W]` → `image_features` `[images, rows + 1, hidden]`."""

    def __init__(self, model: Any):
        super().__init__(model)
        self.get_submodule("model").register_parameter(_NEWLINE, model.model.image_newline)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Run tower and projector, and append the model's `image_newline` as the last row."""
        features = super().forward(pixel_values)
        newline = self.get_parameter(f"model.{_NEWLINE}").expand(features.shape[0], 1, -1)
        return torch.cat([features, newline], dim=1)


def image_processor(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The model's image processor settings without tiles, as a SigLIP processor's: so transformers.js applies them."""
    plain = {key: value for key, value in settings.items() if key not in _TILING}
    return {**plain, "image_processor_type": "SiglipImageProcessor"}


ABOUT = About(
    summary="LLaVA-OneVision",
    since="0.1.0",
    towers=("siglip_vision_model",),
    decoders=("qwen2",),
    notes=(
        "One tile an image, stretched to the tower's square: the further tiles that transformers makes of an image "
        "that comes alone need sizes that transformers.js does not pass on.",
        "No video.",
    ),
)
FAMILY = family(
    "llava_onevision",
    ABOUT,
    encoder=EncoderWithNewline,
    reference=OneTile,
    rows_of_its_own=1,
    image_processor=image_processor,
)
