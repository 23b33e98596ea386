"""InternVL3, an image at a time: one tile of InternViT, pixel shuffle, an MLP, Qwen2. Published as a llava.

That is the tile that transformers makes with `crop_to_patches: false`; by its default, it cuts an image into up to
twelve. Its processor writes `<img>` and `</img>` around an image's tokens, which the JavaScript `LlavaProcessor` does
not: the repo's chat template does, and so do the texts of goldens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from vlm_export.errors import InputError
from vlm_export.families._chat import ChatReference, chat_family, sample_ids
from vlm_export.layouts.chat import llava_processor
from vlm_export.layouts.llava import LlavaChat
from vlm_export.models.chat import Parts, load_config, text_components
from vlm_export.preprocessing import ChatProcessor, check_image_size, processor_settings
from vlm_export.spec.client import ChatTemplate, RepoFacts
from vlm_export.spec.family import About, Config, Layout
from vlm_export.spec.graph import Component, TensorSpec

_TOWER = "model.vision_tower"
_PROJECTOR = "model.multi_modal_projector"
_TILING = ("crop_to_patches", "min_patches", "max_patches")
_INPUT_DTYPES: dict[str, type[np.generic]] = {
    "pixel_values": np.float32,
    "input_ids": np.int64,
    "attention_mask": np.int64,
}


def merged_patches(config: Any) -> int:
    """Patches of a row, and of a column, whose features become one."""
    return round(1 / config.downsample_ratio)


def tile_size(config: Config) -> int:
    """Pixels of a tile's side."""
    return load_config(config).vision_config.image_size[0]


def image_tokens(config: Config) -> int:
    """Rows of features of one tile."""
    loaded = load_config(config)
    return (tile_size(config) // loaded.vision_config.patch_size[0] // merged_patches(loaded)) ** 2


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


def sample_inputs(config: Config, generator: Generator) -> dict[str, Tensor]:
    """`pixel_values` `[1, 3, H, W]` and `input_ids` `[1, rows + 8]`."""
    size = tile_size(config)
    return {
        "pixel_values": torch.rand(1, 3, size, size, generator=generator) * 2 - 1,
        "input_ids": sample_ids(config, image_tokens(config), generator),
    }


def one_tile(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Image processor settings without tiles, under the name of one that transformers.js has and that does the same."""
    plain = {key: value for key, value in settings.items() if key not in _TILING}
    return {**plain, "image_processor_type": "SiglipImageProcessor"}


def image_token(processor: Mapping[str, Any]) -> str:
    """The token that features are written over; `processor` is the checkpoint's `processor_config.json`."""
    return processor.get("image_token", "<IMG_CONTEXT>")


def with_ends(template: ChatTemplate | None, token: str) -> ChatTemplate | None:
    """A chat template with a token at each end of an image, as the model was trained with."""
    if isinstance(template, list):
        return [{**named, "template": str(with_ends(named["template"], token))} for named in template]
    whole = f"<img>{token}</img>"
    return template if template is None or whole in template else template.replace(token, whole)


class OneTileProcessor(ChatProcessor):
    """One tile, and conversations by the template that the repo gets."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.processor.chat_template = with_ends(self.processor.chat_template, self.processor.image_token)


def preprocessor(folder: Path, config: Config, settings: Mapping[str, Any]) -> OneTileProcessor:
    """The processor of one tile, which counts an image's tokens as the client's does.

    Raises:
        InputError: the settings make images of another size than the tower's.
    """
    check_image_size(settings, tile_size(config))
    token = image_token(processor_settings(folder))
    processor = llava_processor(token, image_tokens(config)) | {"vision_feature_select_strategy": "full"}
    return OneTileProcessor(folder, one_tile(settings), _INPUT_DTYPES, **processor)


def components(config: Config) -> tuple[Component, ...]:
    """The graphs.

    Raises:
        InputError: features that no InternVL is published with.
    """
    loaded, size, rows = load_config(config), tile_size(config), image_tokens(config)
    for name, value in (("vision_feature_layer", -1), ("vision_feature_select_strategy", "default")):
        if getattr(loaded, name) != value:
            raise InputError(f"config.json: {name}: {getattr(loaded, name)!r}: only {value!r} is supported")
    if tuple(loaded.vision_config.image_size) != (size, size):
        raise InputError(f"config.json: vision_config.image_size: {loaded.vision_config.image_size} is no square")
    vision_encoder = Component(
        name="vision_encoder",
        module=Encoder,
        inputs=(TensorSpec("pixel_values", "float32", ("num_images", 3, size, size)),),
        outputs=(TensorSpec("image_features", "float32", ("num_images", rows, loaded.text_config.hidden_size)),),
    )
    return vision_encoder, *text_components(config, "model.language_model")


class InternVLChat(LlavaChat):
    """A llava to the client, whose template writes what its processor does not."""

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """A llava's files, and image processor settings without tiles."""
        files = super().config(facts)
        files["config.json"] |= {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
        files["processor_config.json"]["image_token"] = image_token(facts.processor)
        return {**files, "preprocessor_config.json": one_tile(facts.image_processor)}

    def template(self, facts: RepoFacts) -> ChatTemplate | None:
        """The checkpoint's, with `<img>` and `</img>` around an image's token."""
        return with_ends(super().template(facts), image_token(facts.processor))


FAMILY = chat_family(
    "internvl",
    About(
        summary="InternVL3, as transformers has it: InternViT, pixel shuffle, an MLP, Qwen2",
        since="0.1.0",
        towers=("internvl_vision",),
        decoders=("qwen2",),
        notes=(
            "Published as `llava`, the class of transformers.js that is fed in the same way.",
            "One tile an image, stretched to the tower's square, as transformers makes it with "
            "`crop_to_patches: false`: transformers.js' processor cuts none.",
            "The published chat template writes `<img>` and `</img>` around an image, which transformers.js' processor "
            "does not: texts that are written by hand need them.",
            "OpenGVLab's checkpoints whose names do not end in `-hf` are code as well as weights: those that do are "
            "supported.",
            "No video.",
        ),
    ),
    sample_inputs=sample_inputs,
    reference=lambda model: ChatReference(model, image_tokens(model.config.to_dict())),
    preprocessor=preprocessor,
    layout=Layout(components, InternVLChat(image_tokens)),
)
