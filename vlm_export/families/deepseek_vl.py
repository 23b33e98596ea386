"""DeepSeek-VL 1.3B: a SigLIP tower, an MLP, Llama. Published as a llava.

An image keeps its proportions: what is left of the tower's square is filled with the mean colour. The image processor
of transformers.js that does so fills after it normalizes, and so has another number for that colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlm_export.families._as_llava import NOTE, family
from vlm_export.families._chat import ChatReference
from vlm_export.models.chat import load_config
from vlm_export.models.one_tower import TowerEncoder
from vlm_export.spec.family import About, Config


def image_size(config: Config) -> int:
    """Pixels of the side of the square that the tower takes."""
    return int(load_config(config).vision_config.image_size)


def image_tokens(config: Config) -> int:
    """Rows of features of an image."""
    return int((image_size(config) // load_config(config).vision_config.patch_size) ** 2)


class Reference(ChatReference):
    """A reference whose class does not pass on what the model inside it has."""

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`image_features` `[images, image_tokens, hidden] float32`, by the inner model's `get_image_features`."""
        return ChatReference(self.model.model, self.image_tokens).encode(inputs)


def padding_processor(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `VLMImageProcessor`, which multiplies `background_color` by `rescale_factor` and no more.

    transformers fills with whole numbers of a colour, `int(255 · mean)`, before it scales and normalizes.
    """
    side, factor = settings["size"]["height"], settings["rescale_factor"]
    colour = []
    for mean, std in zip(settings["image_mean"], settings["image_std"], strict=True):
        scaled = int(mean * 255) * (factor if settings["do_rescale"] else 1)
        colour.append(((scaled - mean) / std if settings["do_normalize"] else scaled) / factor)
    return {
        **settings,
        "image_processor_type": "VLMImageProcessor",
        "size": {"shortest_edge": side, "longest_edge": side},
        "image_size": side,
        "background_color": colour,
    }


FAMILY = family(
    "deepseek_vl",
    About(
        summary="DeepSeek-VL 1.3B, as transformers has it: SigLIP, an MLP, Llama",
        since="0.1.0",
        towers=("siglip_vision_model",),
        decoders=("llama",),
        notes=(
            NOTE,
            "Images keep their proportions. transformers.js cuts off the fraction of the shorter side where "
            "transformers rounds it, so that every other image is a pixel lower or narrower there, and it knows no "
            "`min_size`: a picture of which nothing would be left, 385 times as long as high, fails there.",
            "The 7B has a second tower and is another `model_type`, `deepseek_vl_hybrid`.",
        ),
    ),
    token="<image_placeholder>",
    image_size=image_size,
    image_tokens=image_tokens,
    encoder=lambda model: TowerEncoder(model, "model.vision_model", "model.aligner"),
    image_processor=dict,
    client_processor=padding_processor,
    reference=Reference,
)
