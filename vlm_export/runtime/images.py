"""Make a graph's inputs of pictures, as `preprocessor_config.json` says; the numbers are those of transformers on PIL.

A setting is one that is known here, with what transformers takes where the file is silent, or an error that names it:
one that was passed over would change pixels, and captions with them.

Source: transformers 5.23, `PilBackend` in `image_processing_backends.py` and the functions of `image_transforms.py`
that it calls; its subclasses in `models/*/image_processing_pil_*.py` give each kind's defaults; the tiles are those of
`models/idefics3/image_processing_pil_idefics3.py`. Between the steps a picture is `[3, h, w] uint8`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlm_export.contract import IMAGE_PROCESSORS
from vlm_export.errors import InputError
from vlm_export.runtime.sessions import Arrays

_FILE = "preprocessor_config.json"
_STEPS = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
# Settings that change nothing here: names, and what concerns other inputs than pictures or other libraries.
_INERT_SETTINGS = {
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "do_convert_rgb",
    "return_row_col_info",
    "video_sampling",
    "_valid_processor_keys",
    "default_to_square",
    "model_input_names",
}
# Settings that do something, with the values that are as good as none.
_INERT_VALUES: dict[str, tuple[Any, ...]] = {
    "do_pad": (None, False),
    "pad_size": (None,),
    "do_thumbnail": (None, False),
    "do_align_long_axis": (None, False),
    "do_flip_channel_order": (None, False),
    "do_reduce_labels": (None, False),
    "do_crop_margin": (None, False),
    "do_center_crop": (None, False),
    "crop_size": (None,),
    "device": (None,),
    "disable_grouping": (None,),
    "input_data_format": (None,),
    "data_format": (None, "channels_first"),
    "return_tensors": (None,),
    "crop_pct": (None,),
    "use_square_size": (None, False),
    "image_seq_length": (None,),
}


@dataclass(frozen=True)
class Tiles:
    """How a picture was cut: rows and columns of tiles, or 0 and 0 where it is one."""

    rows: int
    columns: int


@dataclass(frozen=True)
class Processed:
    """The graph's inputs for the pictures of one prompt, `[1, …]` or `[pictures, …]`, and how each picture was cut."""

    arrays: Arrays
    tiles: tuple[Tiles, ...]


def open_image(path: Path) -> Image.Image:
    """An RGB picture from a file, upright.

    It is turned as its EXIF data say, and what is transparent becomes white, as transformers has it.

    Raises:
        InputError: the file is missing or holds no picture.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a readable image: no file")
    try:
        with Image.open(path) as image:
            return as_rgb(image)
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image: {' '.join(str(error).split())}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture upright, in RGB, on white where it is transparent.

    Sources: `load_image` in transformers' `image_utils.py` turns it, `convert_to_rgb` in `image_transforms.py` puts it
    on white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


class ImageProcessor:
    """The pictures' part of a processor, under the settings of a `preprocessor_config.json`.

    Raises:
        InputError: a kind or a setting that is not known here.
    """

    def __init__(self, settings: Mapping[str, Any]):
        name = _kind(settings)
        self.settings = _checked(settings, name)
        self.is_tiling = IMAGE_PROCESSORS[name].tiles

    def groups(self, images: Sequence[Image.Image]) -> list[Sequence[Image.Image]]:
        """The pictures of one prompt, those together that come out in one size."""
        as_they_are = not (self.is_tiling or self.settings["do_resize"] or self.settings.get("do_center_crop"))
        return [[image] for image in images] if as_they_are else [images]

    def __call__(self, images: Sequence[Image.Image]) -> Processed:
        """`pixel_values` `[images, 3, H, W] float32`.

        Of tiles they are `[1, tiles, 3, E, E] float32`, with a `pixel_attention_mask` `[1, tiles, E, E] bool`.
        """
        pixels = [np.moveaxis(np.asarray(as_rgb(image)), -1, 0) for image in images]
        if self.is_tiling:
            return self._tiled(pixels)
        made = np.stack([self._scaled(self._framed(picture)) for picture in pixels])
        return Processed({"pixel_values": made}, tuple(Tiles(0, 0) for _ in images))

    def _framed(self, picture: np.ndarray) -> np.ndarray:
        """`[3, h, w] uint8` → `[3, H, W] uint8`: resized, then cropped."""
        settings = self.settings
        if settings["do_resize"]:
            picture = self._resize(picture, _target_size(picture, settings["size"]))
        if settings.get("do_center_crop"):
            crop = settings["crop_size"]
            picture = _center_crop(picture, crop["height"], crop["width"])
        return picture

    def _scaled(self, picture: np.ndarray) -> np.ndarray:
        """`[3, h, w] uint8` → `[3, h, w] float32`: scaled, then normalized by mean and deviation."""
        settings = self.settings
        scaled = picture.astype(np.float32)
        if settings["do_rescale"]:
            scaled = (picture.astype(np.float64) * settings["rescale_factor"]).astype(np.float32)
        if settings["do_normalize"]:
            mean, std = (np.array(settings[name], dtype=np.float32) for name in ("image_mean", "image_std"))
            scaled = (scaled - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1)
        return np.ascontiguousarray(scaled)

    def _resize(self, picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """`[3, h, w] uint8` → `[3, *size] uint8`, by Pillow; `size` is height and width."""
        image = Image.fromarray(np.ascontiguousarray(np.moveaxis(picture, 0, -1)))
        resized = image.resize((size[1], size[0]), resample=Image.Resampling(self.settings["resample"]))
        return np.moveaxis(np.asarray(resized), -1, 0)

    def _tiled(self, pictures: Sequence[np.ndarray]) -> Processed:
        edge = self.settings["max_image_size"]["longest_edge"]
        frames: list[np.ndarray] = []
        tiles = []
        for picture in pictures:
            if self.settings["do_resize"]:
                picture = self._resize(picture, _longest_edge_size(picture, self.settings["size"]))
            if self.settings["do_image_splitting"]:
                cut, found = self._split(self._resize(picture, _multiple_size(picture, edge)), edge)
            else:
                cut, found = [self._resize(picture, (edge, edge))], Tiles(0, 0)
            frames += [self._scaled(frame) for frame in cut]
            tiles.append(found)
        height, width = (max(frame.shape[axis] for frame in frames) for axis in (1, 2))
        values = np.zeros((1, len(frames), 3, height, width), dtype=np.float32)
        mask = np.zeros((1, len(frames), height, width), dtype=np.bool_)
        for index, frame in enumerate(frames):
            values[0, index, :, : frame.shape[1], : frame.shape[2]] = frame
            mask[0, index, : frame.shape[1], : frame.shape[2]] = True
        return Processed({"pixel_values": values, "pixel_attention_mask": mask}, tuple(tiles))

    def _split(self, picture: np.ndarray, edge: int) -> tuple[list[np.ndarray], Tiles]:
        """`[3, h, w]` → tiles row by row and then the whole, each `[3, edge, edge]`; one tile alone stays as it is.

        `Idefics3ImageProcessorPil.split_images`.
        """
        rows, columns = picture.shape[1] // edge, picture.shape[2] // edge
        if rows <= 1 and columns <= 1:
            return [picture], Tiles(0, 0)
        cut = [
            picture[:, row * edge : (row + 1) * edge, column * edge : (column + 1) * edge]
            for row in range(rows)
            for column in range(columns)
        ]
        return [*cut, self._resize(picture, (edge, edge))], Tiles(rows, columns)


def _kind(settings: Mapping[str, Any]) -> str:
    """The name in `IMAGE_PROCESSORS` of the processor that the settings are for. Raises InputError if it has none."""
    name = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
    name = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if name not in IMAGE_PROCESSORS:
        known = ", ".join(IMAGE_PROCESSORS)
        raise InputError(f"{_FILE}: image_processor_type: {name or None!r} is none that this knows: {known}")
    return name


def _checked(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings of the processor of this name, with transformers' defaults."""
    kind = IMAGE_PROCESSORS[name]
    known = kind.defaults
    given = {key: value for key, value in settings.items() if value is not None and key not in kind.inert}
    merged = {**_STEPS, **known, **given}
    for key, value in merged.items():
        if (
            key in _STEPS
            or key in known
            or key in _INERT_SETTINGS
            or key in ("resample", "image_mean", "image_std", "size")
        ):
            continue
        if key in ("do_center_crop", "crop_size") and not kind.tiles:
            continue
        if value not in _INERT_VALUES.get(key, ()):
            raise InputError(f"{_FILE}: {key}: {value!r} is a setting that this does not know for a {name}")
    for key in ("size", "crop_size", "max_image_size"):
        if key in merged:
            merged[key] = _size(key, merged[key], square=key != "size" or "shortest_edge" not in known["size"])
    for key in ("image_mean", "image_std"):
        merged[key] = [merged[key]] * 3 if isinstance(merged[key], int | float) else merged[key]
    if merged["resample"] not in [int(one) for one in Image.Resampling]:
        raise InputError(f"{_FILE}: resample: {merged['resample']!r} is none of Pillow's filters, 0 to 5")
    return merged


def _size(name: str, value: Any, *, square: bool) -> dict[str, int]:
    """A size as a mapping; one number is both sides, or the shorter one where a processor keeps proportions."""
    if isinstance(value, int):
        return {"height": value, "width": value} if square else {"shortest_edge": value}
    if isinstance(value, list | tuple) and len(value) == 2:
        return {"height": value[0], "width": value[1]}
    forms: tuple[set[str], ...] = (
        {"height", "width"},
        {"shortest_edge"},
        {"shortest_edge", "longest_edge"},
        {"longest_edge"},
    )
    if isinstance(value, Mapping):
        given = {key: side for key, side in value.items() if side is not None}
        if set(given) in forms and all(isinstance(side, int) and side > 0 for side in given.values()):
            return given
    raise InputError(f"{_FILE}: {name}: {value!r} is no size: give height and width, or shortest_edge")


def _target_size(picture: np.ndarray, size: Mapping[str, int]) -> tuple[int, int]:
    """Height and width of `[3, h, w]` after a resize; one `shortest_edge` keeps proportions, and cuts off fractions.

    `PilBackend.resize`, and `get_resize_output_image_size` in `image_transforms.py`.
    """
    if "height" in size:
        return size["height"], size["width"]
    height, width = picture.shape[1:]
    if "shortest_edge" not in size:
        raise InputError(f"{_FILE}: size: {dict(size)} is a setting that this does not know")
    if "longest_edge" in size:
        return _between(height, width, size["shortest_edge"], size["longest_edge"])
    short, long = min(height, width), max(height, width)
    longer = int(size["shortest_edge"] * long / short)
    return (longer, size["shortest_edge"]) if width <= height else (size["shortest_edge"], longer)


def _between(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """The shorter side becomes `shortest`, or less where the longer one would be more than `longest`.

    `get_size_with_aspect_ratio` in `image_transforms.py`.
    """
    exact = float(shortest)
    if max(height, width) / min(height, width) * shortest > longest:
        exact = longest * min(height, width) / max(height, width)
        shortest = round(exact)
    if min(height, width) == shortest:
        return height, width
    if width < height:
        return int(exact * height / width), shortest
    return shortest, int(exact * width / height)


def _longest_edge_size(picture: np.ndarray, size: Mapping[str, int]) -> tuple[int, int]:
    """Height and width with the longer side as `size` says, the other one even; none above 4096.

    `get_resize_output_image_size` in `models/idefics3/image_processing_pil_idefics3.py`.
    """
    if "longest_edge" not in size:
        return _target_size(picture, size)
    height, width = picture.shape[1:]
    ratio, edge = width / height, size["longest_edge"]
    if width >= height:
        width, height = edge, _even(int(edge / ratio))
    else:
        height, width = edge, _even(int(edge * ratio))
    height, width = max(height, 1), max(width, 1)
    ratio = width / height
    if width >= height and width > 4096:
        width, height = 4096, int(4096 / ratio)
    elif height > width and height > 4096:
        height, width = 4096, int(4096 * ratio)
    return max(height, 1), max(width, 1)


def _even(side: int) -> int:
    return side + side % 2


def _multiple_size(picture: np.ndarray, edge: int) -> tuple[int, int]:
    """Height and width of `[3, h, w]` enlarged to whole tiles of `edge` pixels.

    `Idefics3ImageProcessorPil.resize_for_vision_encoder`.
    """
    height, width = picture.shape[1:]
    ratio = width / height
    if width >= height:
        width = math.ceil(width / edge) * edge
        height = math.ceil(int(width / ratio) / edge) * edge
    else:
        height = math.ceil(height / edge) * edge
        width = math.ceil(int(height * ratio) / edge) * edge
    return height, width


def _center_crop(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of `[3, h, w]` as `[3, height, width]`, on black where it is smaller.

    `center_crop` in `image_transforms.py`.
    """
    sides = tuple(zip((height, width), picture.shape[1:], strict=True))  # wanted, and as it is
    top, left = (max(0, math.ceil((wanted - side) / 2)) for wanted, side in sides)
    canvas = np.zeros((picture.shape[0], *(max(pair) for pair in sides)), dtype=picture.dtype)
    canvas[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
    first, start = (max(0, (side - wanted) // 2 + pad) for (wanted, side), pad in zip(sides, (top, left), strict=True))
    return canvas[:, first : first + height, start : start + width]
