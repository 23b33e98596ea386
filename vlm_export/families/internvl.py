"""InternVL3, an image at a time: one tile of InternViT, pixel shuffle, an MLP, Qwen2. Published as a llava.

That is the tile that transformers makes with `crop_to_patches: false`; by its default, it cuts an image into up to
twelve. Its processor writes `<img>` and `</img>` around an image's tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlm_export.errors import InputError
from vlm_export.families._as_llava import NOTE, family
from vlm_export.models.chat import Parts, load_config
from vlm_export.spec.client import ChatTemplate
from vlm_export.spec.family import About, Config

_TOWER = "model.vision_tower"
_PROJECTOR = "model.multi_modal_projector"


def merged_patches(config: Any) -> int:
    """Patches of a row, and of a column, whose features become one."""
    return round(1 / config.downsample_ratio)


def tile_size(config: Config) -> int:
    """Pixels of a tile's side."""
    return int(load_config(config).vision_config.image_size[0])


def image_tokens(config: Config) -> int:
    """Rows of features of one tile."""
    loaded = load_config(config)
    return int((tile_size(config) // loaded.vision_config.patch_size[0] // merged_patches(loaded)) ** 2)


class Encoder(Parts):
    """`pixel_values` `[images, 3, H, W]` → `image_features` `[images, rows, hidden]`."""

    def __init__(self, model: Any):
        super().__init__(model, (_TOWER, _PROJECTOR))
        self.merged = merged_patches(model.config)
        self.side = int(model.config.vision_config.image_size[0]) // int(model.config.vision_config.patch_size[0])

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Squares of neighbouring patches side by side, as `get_image_features` of transformers 5.23 shuffles them."""
        patches = self.get_submodule(_TOWER)(pixel_values).last_hidden_state[:, 1:]
        blocks = (self.side // self.merged, self.merged)
        grid = patches.unflatten(1, (*blocks, *blocks)).transpose(2, 3)
        return self.get_submodule(_PROJECTOR)(grid.flatten(3, 5).flatten(1, 2))


def with_ends(template: ChatTemplate | None, token: str) -> ChatTemplate | None:
    """A chat template with a token at each end of an image, as the model was trained with."""
    if isinstance(template, list):
        return [{**named, "template": str(with_ends(named["template"], token))} for named in template]
    whole = f"<img>{token}</img>"
    return template if template is None or whole in template else template.replace(token, whole)


def check(config: Config) -> None:
    """Raises InputError for features that no InternVL is published with."""
    loaded, size = load_config(config), tile_size(config)
    for name, value in (("vision_feature_layer", -1), ("vision_feature_select_strategy", "default")):
        if getattr(loaded, name) != value:
            raise InputError(f"config.json: {name}: {getattr(loaded, name)!r}: only {value!r} is supported")
    if tuple(loaded.vision_config.image_size) != (size, size):
        raise InputError(f"config.json: vision_config.image_size: {loaded.vision_config.image_size} is no square")


FAMILY = family(
    "internvl",
    About(
        summary="InternVL3, as transformers has it: InternViT, pixel shuffle, an MLP, Qwen2",
        since="0.1.0",
        towers=("internvl_vision",),
        decoders=("qwen2",),
        notes=(
            NOTE,
            "One tile an image, stretched to the tower's square, as transformers makes it with "
            "`crop_to_patches: false`: transformers.js' processor cuts none.",
            "The published chat template writes `<img>` and `</img>` around an image, which transformers.js' processor "
            "does not: texts that are written by hand need them.",
            "OpenGVLab's checkpoints whose names do not end in `-hf` are code as well as weights: those that do are "
            "supported.",
            "No video.",
        ),
    ),
    token="<IMG_CONTEXT>",
    image_size=tile_size,
    image_tokens=image_tokens,
    encoder=Encoder,
    template=with_ends,
    check=check,
)
