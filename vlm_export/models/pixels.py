"""An image processor's steps as operators in front of a tower: resize, crop, rescale, normalize.

Clients resize in different ways: Pillow smooths what it makes smaller, sharp and a canvas do not, or otherwise. A graph
that takes pictures as they are, `[batch, 3, height, width]` float32 in 0…255, sees the same pixels everywhere.

`Resize` of ONNX on bytes, antialiased, is Pillow's own algorithm in ONNX Runtime: of random noise no pixel comes out
more than 1 of 255 apart. On floats it is not, because Pillow rounds and clips between its two passes. Rows come first,
as in all Pillows but 13, which begins with columns where a picture loses much more of its height.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlm_export.errors import InputError
from vlm_export.runtime.images import ImageProcessor
from vlm_export.spec.graph import Component, FrontEnd, TensorSpec

PIXELS = "pixel_values"
TRACED = "normalized_pixels"  # what the steps make, and the traced tower takes
# By Pillow's number of the filter, which `resample` is.
_FILTERS = {
    2: 'mode = "linear"',
    3: 'mode = "cubic", cubic_coeff_a = -0.5',
}
# In `preprocessor_config.json` of a repo whose graph does all of it.
DONE_IN_GRAPH = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}


class NotInGraph(InputError):
    """A graph cannot prepare these pictures; `reason` says why."""

    def __init__(self, reason: str):
        super().__init__(f"preprocess: graph: {reason}: set `preprocess: client`, and the client does it")
        self.reason = reason


@dataclass(frozen=True)
class Steps:
    """What `preprocessor_config.json` says, checked, as a graph can do it.

    Attributes:
        size: `[height, width]` to resize to; one number for the shorter side; None to leave it.
        filter: Pillow's number of the filter.
        crop: `[height, width]` of the middle that is kept, or None.
        factor: that a byte is multiplied by.
        mean, std: by channel, taken away and divided by; None to leave it.
    """

    size: tuple[int, int] | int | None
    filter: int
    crop: tuple[int, int] | None
    factor: float
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Steps:
        """The steps that the settings ask for.

        Raises:
            NotInGraph: tiles, a filter that ONNX has no operator for, or a size that depends on more than one side.
            InputError: a setting that is not known here.
        """
        processor = ImageProcessor(settings)
        known = processor.settings
        if processor.cut != "whole":
            raise NotInGraph(f"this image processor makes {processor.cut} of pictures")
        if processor.kind.fills:
            raise NotInGraph("this image processor fills what a picture leaves of a square")
        crop = known["crop_size"] if known.get("do_center_crop") else None
        size = _size(known["size"]) if known["do_resize"] else None
        if size is not None and known["resample"] not in _FILTERS:
            raise NotInGraph(f"resample {known['resample']} has no operator: bilinear (2) and bicubic (3) have")
        found = cls(
            size=size,
            filter=known["resample"],
            crop=(crop["height"], crop["width"]) if crop else None,
            factor=float(known["rescale_factor"]) if known["do_rescale"] else 1.0,
            mean=tuple(known["image_mean"]) if known["do_normalize"] else None,
            std=tuple(known["image_std"]) if known["do_normalize"] else None,
        )
        if found.crop and min(np.broadcast_to(found.size or 0, 2)) < max(found.crop):
            raise NotInGraph("crop_size is larger than what is left of some pictures")
        return found

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a picture after it is resized."""
        if isinstance(self.size, int):
            least = min(height, width)
            return height * self.size // least, width * self.size // least
        return self.size or (height, width)

    def text(self) -> str:
        """ONNX text: `pixel_values` `[batch, 3, height, width]` float32 → `normalized_pixels`, of the tower's size."""
        lines = [f"bytes = Cast <to = {_UINT8}> ({PIXELS})"]
        made = "bytes"
        if self.size is not None:
            lines += [*self._sizes(), self._resize()]
            made = "resized"
        if self.crop:
            lines += [
                f"kept = Constant <value_ints = {list(self.crop)}> ()",
                f"sides = Shape <start = 2> ({made})",
                "two = Constant <value_ints = [2]> ()",
                "spare = Sub (sides, kept)",
                "first = Div (spare, two)",
                "end = Add (first, kept)",
                "axes = Constant <value_ints = [2, 3]> ()",
                f"cropped = Slice ({made}, first, end, axes)",
            ]
            made = "cropped"
        lines.append(f"floats = Cast <to = {_FLOAT}> ({made})")
        lines.append(f"factor = Constant <value_float = {self.factor!r}> ()")
        if self.mean is None or self.std is None:
            return "\n".join([*lines, f"{TRACED} = Mul (floats, factor)"])
        return "\n".join(
            [
                *lines,
                "scaled = Mul (floats, factor)",
                "channel = Constant <value_ints = [1, 2]> ()",
                f"means = Constant <value_floats = {_floats(self.mean)}> ()",
                f"deviations = Constant <value_floats = {_floats(self.std)}> ()",
                "mean = Unsqueeze (means, channel)",
                "deviation = Unsqueeze (deviations, channel)",
                "centred = Sub (scaled, mean)",
                f"{TRACED} = Div (centred, deviation)",
            ]
        )

    def _sizes(self) -> list[str]:
        if not isinstance(self.size, int):
            return [f"sizes = Constant <value_ints = {list(self.size or ())}> ()"]
        # The shorter side becomes the number; fractions of the longer one are cut off.
        return [
            f"shorter = Constant <value_ints = [{self.size}]> ()",
            f"original = Shape <start = 2> ({PIXELS})",
            "least = ReduceMin <keepdims = 1> (original)",
            "enlarged = Mul (original, shorter)",
            "sizes = Div (enlarged, least)",
        ]

    def _resize(self) -> str:
        fixed = 'antialias = 1, axes = [2, 3], coordinate_transformation_mode = "half_pixel", exclude_outside = 1'
        return f"resized = Resize <{_FILTERS[self.filter]}, {fixed}> (bytes, , , sizes)"

    def normalized(self, pixels: np.ndarray) -> np.ndarray:
        """`[…, 3, H, W]` in 0…255, of the tower's size already, → what the tower takes, float32."""
        scaled = pixels.astype(np.float32) * np.float32(self.factor)
        if self.mean is None or self.std is None:
            return scaled
        return (scaled - _by_channel(self.mean)) / _by_channel(self.std)

    def bytes_of(self, pixels: np.ndarray) -> np.ndarray:
        """What the tower takes → in 0…255, float32, not rounded."""
        if self.mean is not None and self.std is not None:
            pixels = pixels * _by_channel(self.std) + _by_channel(self.mean)
        return (pixels / np.float32(self.factor)).astype(np.float32)

    def undone(self, pixels: np.ndarray) -> np.ndarray:
        """A picture `[…, 3, h, w] float32` in 0…255 of which the steps make `pixels` `[…, 3, H, W]`, normalized.

        Its middle is those pixels, on black where the steps crop; nothing of it is resized.
        """
        found = np.round(self.bytes_of(pixels))
        if not self.crop:
            return found
        height, width = (int(side) for side in np.broadcast_to(self.size or self.crop, 2))
        top, left = ((whole - kept) // 2 for whole, kept in zip((height, width), self.crop, strict=True))
        canvas = np.zeros((*found.shape[:-2], height, width), dtype=np.float32)
        canvas[..., top : top + self.crop[0], left : left + self.crop[1]] = found
        return canvas


_UINT8, _FLOAT = 2, 1  # of onnx.TensorProto


def published(components: Sequence[Component], in_graph: Mapping[str, Any] | None) -> tuple[Component, ...]:
    """The components; where there are settings `in_graph`, the tower's with their steps in front.

    Raises:
        NotInGraph, InputError: as `Steps.of`; or the tower takes something else than pictures of one size.
    """
    if not in_graph:
        return tuple(components)
    steps = Steps.of(in_graph)
    return tuple(_with_steps(each, steps) if _takes_pixels(each) else each for each in components)


def _takes_pixels(component: Component) -> bool:
    return any(spec.name == PIXELS for spec in component.inputs)


def _with_steps(component: Component, steps: Steps) -> Component:
    if component.front_end is not None or len(component.inputs) > 1:
        raise NotInGraph("the model takes tiles, or masks beside its pictures")
    [pixels] = component.inputs
    if not all(isinstance(side, int) for side in pixels.shape[-2:]):
        raise NotInGraph("the model takes pictures of any size itself, and counts its features by it")
    made = steps.crop or steps.size
    if made != pixels.shape[-2:]:
        raise NotInGraph(f"the steps make pictures of {made or 'any size'}, and the tower takes {pixels.shape[-2:]}")
    return replace(
        component,
        inputs=(TensorSpec(PIXELS, "float32", (*pixels.shape[:-2], "height", "width")),),
        traced_inputs=(replace(pixels, name=TRACED),),
        front_end=FrontEnd(f"\n{steps.text()}\n"),
    )


def _size(size: Mapping[str, int]) -> tuple[int, int] | int:
    if set(size) == {"height", "width"}:
        return size["height"], size["width"]
    if set(size) == {"shortest_edge"}:
        return size["shortest_edge"]
    raise NotInGraph(f"size {dict(size)} limits both sides")


def _by_channel(values: Sequence[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)[:, None, None]


def _floats(values: Sequence[float]) -> str:
    return f"[{', '.join(repr(float(value)) for value in values)}]"
