"""How many pixels a recipe lets a picture have, where a tower takes pictures of any size as patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlm_export.contract import IMAGE_PROCESSORS, ImageProcessorKind
from vlm_export.start.named import Named

_TOKENS = 512  # of a picture: its patches are four times as many, and attention in the tower grows with their square
_SETTINGS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Pixels:
    """Limits for a recipe, in pixels of a picture, and what they stand for.

    Attributes:
        least, most: as `size` of the image processor has them, those of all frames where it counts them.
        tokens: of a picture with the most; `own_tokens` of the largest that the checkpoint itself allows.
    """

    least: int
    most: int
    tokens: int
    own_tokens: int


def read_pixels(model: Named) -> Pixels | None:
    """Limits, where the checkpoint's own allow more than is sensible outside of a data centre; else None."""
    settings = model.json(_SETTINGS[0]) or model.json(_SETTINGS[1]).get("image_processor")
    if not isinstance(settings, Mapping):
        return None
    name = str(settings.get("image_processor_type", "")).removesuffix("Fast").removesuffix("Pil")
    kind = IMAGE_PROCESSORS.get(name)
    return _limits(kind, settings) if kind is not None and kind.cut == "patches" else None


def _limits(kind: ImageProcessorKind, settings: Mapping[str, Any]) -> Pixels | None:
    given = {**kind.defaults, **{key: value for key, value in settings.items() if value is not None}}
    size = {**kind.defaults["size"], **(given["size"] if isinstance(given["size"], Mapping) else {})}
    least, most = given.get("min_pixels", size["shortest_edge"]), given.get("max_pixels", size["longest_edge"])
    sides = given["patch_size"], given["merge_size"], given["temporal_patch_size"]
    if not all(isinstance(number, int) and number > 0 for number in (least, most, *sides)):
        return None  # which whoever reads the settings will say
    frames = given["temporal_patch_size"] if kind.counts_frames else 1
    cell = (given["patch_size"] * given["merge_size"]) ** 2 * frames
    if most <= _TOKENS * cell:
        return None
    return Pixels(min(least, _TOKENS * cell), _TOKENS * cell, _TOKENS, most // cell)
