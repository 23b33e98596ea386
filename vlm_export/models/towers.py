"""Vision towers: which there are, what is built of them, and how their images are prepared unless a checkpoint says so.

Families read a tower's last hidden state, class and register tokens included: poolers and heads are never built.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from vlm_export.errors import InputError
from vlm_export.models.library import library_names

_IMAGENET_STANDARD = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@dataclass(frozen=True)
class _Tower:
    """One kind of tower.

    Attributes:
        processor: `preprocessor_config.json` for an image size.
        absent: submodules and parameters that the last hidden state does not need → what stands in their place.
        config: settings that keep them from being built.
    """

    processor: Callable[[int], dict[str, Any]]
    absent: Mapping[str, nn.Module | None]
    config: Mapping[str, Any] = field(default_factory=dict)


def _processor(kind: str, **settings: Any) -> dict[str, Any]:
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        **settings,
    }


def _square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


def _siglip(size: int) -> dict[str, Any]:
    """`preprocessor_config.json` of google/siglip-base-patch16-224, at this image size."""
    return _processor("SiglipImageProcessor", size=_square(size), resample=3, **_IMAGENET_STANDARD)


def _vit(size: int) -> dict[str, Any]:
    """`preprocessor_config.json` of google/vit-base-patch16-224, at this image size."""
    return _processor("ViTImageProcessor", size=_square(size), resample=2, **_IMAGENET_STANDARD)


def _clip(size: int) -> dict[str, Any]:
    """`preprocessor_config.json` of openai/clip-vit-base-patch32, at this image size."""
    return _processor(
        "CLIPImageProcessor",
        size={"shortest_edge": size},
        resample=3,
        do_center_crop=True,
        crop_size=_square(size),
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )


def _dinov2(size: int) -> dict[str, Any]:
    """`preprocessor_config.json` of facebook/dinov2-base, at this image size; it resizes to 256 for a crop of 224."""
    return _processor(
        "BitImageProcessor",
        size={"shortest_edge": round(size * 256 / 224)},
        resample=3,
        do_center_crop=True,
        crop_size=_square(size),
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


# SigLIP 2 of a fixed resolution has SigLIP's architecture and model_type.
_TOWERS = {
    "siglip_vision_model": _Tower(_siglip, {"head": None}, {"vision_use_head": False}),
    "clip_vision_model": _Tower(_clip, {"post_layernorm": nn.Identity()}),  # it norms the pooled vector alone
    "vit": _Tower(_vit, {"pooler": None, "embeddings.mask_token": None}),
    "dinov2": _Tower(_dinov2, {"embeddings.mask_token": None}),
    "dinov2_with_registers": _Tower(_dinov2, {"embeddings.mask_token": None}),
}
_REFUSED = {
    "siglip2_vision_model": (
        "it takes any number of patches (NaFlex) where one image of a fixed size is fed; "
        "use a SigLIP 2 checkpoint of a fixed resolution, which is a siglip_vision_model"
    )
}


def build_tower(values: Mapping[str, Any]) -> PreTrainedModel:
    """The uninitialised tower of a `vision_config` dict.

    Raises:
        InputError: its `model_type` is not a supported tower.
    """
    model = AutoModel.from_config(tower_config(values))
    for path, stand_in in _tower(values).absent.items():
        parent, _, name = path.rpartition(".")
        if hasattr(model.get_submodule(parent), name):
            setattr(model.get_submodule(parent), name, stand_in)
    return model


def tower_config(values: Mapping[str, Any]) -> PretrainedConfig:
    """The transformers config of a `vision_config` dict.

    Raises:
        InputError: its `model_type` is not a supported tower.
    """
    settings = {**values, **_tower(values).config}
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def image_tokens(values: Mapping[str, Any]) -> int:
    """Rows of the last hidden state for one image: patches, and the class and register tokens a tower adds."""
    return _output_shape(json.dumps(dict(values), sort_keys=True, default=str))[1]


def image_processor(values: Mapping[str, Any]) -> dict[str, Any]:
    """`preprocessor_config.json` of the published tower of this kind, at this one's image size."""
    return _tower(values).processor(values["image_size"])


def tower_names(values: Mapping[str, Any]) -> Callable[[str], str | None]:
    """A tower's tensor names: transformers 4's → today's, by the library's own table; None for what is not built."""
    with torch.device("meta"):
        names = library_names(build_tower(values))
    absent = tuple(_tower(values).absent)

    def name(key: str) -> str | None:
        renamed = names(key)
        is_absent = renamed is None or any(renamed == path or renamed.startswith(f"{path}.") for path in absent)
        return None if is_absent else renamed

    return name


@lru_cache
def _output_shape(values: str) -> tuple[int, ...]:
    """Shape of the last hidden state for one image, by running the tower without weights."""
    config = json.loads(values)
    size = config["image_size"]
    with torch.device("meta"), torch.no_grad():
        return tuple(build_tower(config)(torch.empty(1, 3, size, size)).last_hidden_state.shape)


def _tower(values: Mapping[str, Any]) -> _Tower:
    model_type = values["model_type"]
    if model_type not in _TOWERS:
        reason = _REFUSED.get(model_type, f"supported: {', '.join(_TOWERS)}")
        raise InputError(f"config.json: vision_config.model_type: {model_type!r} is not supported: {reason}")
    return _TOWERS[model_type]
