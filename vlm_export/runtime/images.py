"""Make a graph's inputs of pictures, as `preprocessor_config.json` says; the numbers are those of transformers on PIL.

A setting is one that is known here, with what transformers takes where the file is silent, or an error that names it:
one that was passed over would change pixels, and captions with them.

Source: transformers 5.23, `PilBackend` in `image_processing_backends.py` and the functions of `image_transforms.py`
that it calls; its subclasses in `models/*/image_processing_pil_*.py` give each kind's defaults; the tiles are those of
`models/idefics3/image_processing_pil_idefics3.py`. Between the steps a picture is `[3, h, w] uint8`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from vlm_export.contract import IMAGE_PROCESSORS, TASK_KEYS, Cut
from vlm_export.errors import InputError, reason
from vlm_export.forms.image_processor import LARGEST_AREA
from vlm_export.runtime.sessions import Arrays

MOST_PIXELS = 80_000_000  # of one picture: it is decoded into several copies of 4 bytes each
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
    "image_seq_length",
    *TASK_KEYS,
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
}


@dataclass(frozen=True)
class Grid:
    """How a picture was cut: rows and columns of tiles or of cells, or 0 and 0 where it is one.

    `cells` are those of each tile, where tiles have sizes of their own; the last tile may be the whole.
    """

    rows: int
    columns: int
    cells: tuple[int, ...] = ()


@dataclass(frozen=True)
class Processed:
    """The graph's inputs for the pictures of one prompt, `[1, …]` or `[pictures, …]`, and how each picture was cut."""

    arrays: Arrays
    grids: tuple[Grid, ...]


def open_image(path: Path) -> Image.Image:
    """An RGB picture from a file, upright.

    It is turned as its EXIF data say, and what is transparent becomes white, as transformers has it.

    Raises:
        InputError: the file is missing or holds no picture.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a readable image: no file")
    try:
        return decoded(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except ValueError as error:
        raise InputError(f"{path}: not a readable image: {error}") from error


def decoded(source: Path | BinaryIO) -> Image.Image:
    """An RGB picture, as of `open_image`, from a file or its bytes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no picture, or one of more than `MOST_PIXELS`, as one line says.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of less than is refused here
            image = Image.open(source)
        with image:
            if (pixels := image.width * image.height) > MOST_PIXELS:
                raise ValueError(f"it has {pixels:,} pixels, and at most {MOST_PIXELS:,} are read: make it smaller")
            return as_rgb(image)
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise what comes: OSError, SyntaxError, struct.error, IndexError, …
        raise ValueError(reason(error)) from error


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
        self.kind = IMAGE_PROCESSORS[name]

    @property
    def cut(self) -> Cut:
        """What is made of pictures."""
        return self.kind.cut

    def groups(self, images: Sequence[Image.Image]) -> list[Sequence[Image.Image]]:
        """The pictures of one prompt, those together that come out in one size."""
        as_they_are = not (self.settings["do_resize"] or self.settings.get("do_center_crop"))
        alone = self.cut in ("cells", "patches") or (self.cut == "whole" and as_they_are)
        return [[image] for image in images] if alone else [images]

    def __call__(self, images: Sequence[Image.Image]) -> Processed:
        """`pixel_values` `[images, 3, H, W] float32`.

        Of tiles they are `[1, tiles, 3, E, E] float32`, with a `pixel_attention_mask` `[1, tiles, E, E] bool`; of
        patches `[patches, channels · frames · P · P] float32`, with an `image_grid_thw` `[1, 3] int64`; of patched
        tiles `[tiles, most patches, P · P · channels] float32`, with a `pixel_attention_mask` `[tiles, most patches]
        int64` and `spatial_shapes` `[tiles, 2] int64`, lines and columns of patches.

        Raises:
            InputError: a setting makes no picture of one of them, or several come out in different sizes.
        """
        pixels = [np.moveaxis(np.asarray(as_rgb(image)), -1, 0) for image in images]
        if self.cut == "tiles":
            return self._tiled(pixels)
        if self.cut == "patched tiles":
            return self._patched_tiles(pixels)
        made = [self._filled(self._scaled(self._framed(picture))) for picture in pixels]
        if self.cut == "patches":
            return self._patches(made)
        grids = tuple(self._grid(picture) for picture in made)
        return Processed({"pixel_values": np.stack(made)}, grids)

    def _grid(self, picture: np.ndarray) -> Grid:
        """Rows and columns of cells of `[3, h, w]`, where it is cut into some."""
        if self.cut == "whole":
            return Grid(0, 0)
        height, width = self._cell
        return Grid(picture.shape[1] // height, picture.shape[2] // width)

    @property
    def _cell(self) -> tuple[int, int]:
        """Pixels of the height and width of what becomes one row of features."""
        settings = self.settings
        patch, merged = settings["patch_size"], settings.get("spatial_merge_size", settings.get("merge_size", 1))
        height, width = (patch["height"], patch["width"]) if isinstance(patch, Mapping) else (patch, patch)
        return height * merged, width * merged

    def _framed(self, picture: np.ndarray) -> np.ndarray:
        """`[3, h, w] uint8` → `[3, H, W] uint8`: resized, then cropped."""
        settings = self.settings
        if settings["do_resize"]:
            picture = self._resize(picture, self._size_of(picture))
        if settings.get("do_center_crop"):
            crop = settings["crop_size"]
            picture = _center_crop(picture, crop["height"], crop["width"])
        return picture

    def _size_of(self, picture: np.ndarray) -> tuple[int, int]:
        """Height and width that `[3, h, w]` is resized to."""
        size = self.settings["size"]
        height, width = picture.shape[1:]
        if self.cut == "cells":
            return _cells_size(height, width, size, self._cell)
        if self.cut == "patches":
            frames = self.settings["temporal_patch_size"] if self.kind.counts_frames else 1
            if self.kind.counts_frames:
                height, width = _enlarged(height, width, self._cell[0])
            return _area_size(
                height, width, size["shortest_edge"] / frames, size["longest_edge"] / frames, self._cell[0]
            )
        if self.kind.fills:
            return _sides_within(height, width, self.settings["image_size"], self.settings["min_size"])
        return _target_size(picture, size)

    def _filled(self, picture: np.ndarray) -> np.ndarray:
        """`[3, h, w] float32`, normalized, in the middle of a square where the kind has one.

        `VLMImageProcessor.pad_image` of transformers.js 4.3.1; the numbers that transformers makes before it normalizes
        are the same.
        """
        if not self.kind.fills or not self.settings["do_pad"]:
            return picture
        side, factor = self.settings["image_size"], self.settings["rescale_factor"]
        colour = np.array(self.settings["background_color"], dtype=np.float64) * factor
        canvas = np.broadcast_to(colour.astype(np.float32).reshape(3, 1, 1), (3, side, side)).copy()
        top, left = ((side - own) // 2 for own in picture.shape[1:])
        canvas[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
        return canvas

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

    def _patches(self, pictures: Sequence[np.ndarray]) -> Processed:
        """`[3, H, W]` each → patches, those of a cell next to one another, each as often as there are frames.

        `Qwen2VLImageProcessorPil.patchify`.
        """
        side, merged, frames = (self.settings[name] for name in ("patch_size", "merge_size", "temporal_patch_size"))
        flat, grids = [], []
        for picture in pictures:
            rows, columns = (size // (side * merged) for size in picture.shape[1:])
            cells = picture.reshape(3, rows, merged, side, columns, merged, side).transpose(1, 4, 2, 5, 0, 3, 6)
            repeated = np.repeat(cells[:, :, :, :, :, None], frames, axis=5)
            flat.append(repeated.reshape(-1, 3 * frames * side * side))
            grids.append(Grid(rows, columns))
        thw = np.array([[1, grid.rows * merged, grid.columns * merged] for grid in grids], dtype=np.int64)
        return Processed({"pixel_values": np.concatenate(flat), "image_grid_thw": thw}, tuple(grids))

    def _tiled(self, pictures: Sequence[np.ndarray]) -> Processed:
        edge = self.settings["max_image_size"]["longest_edge"]
        frames: list[np.ndarray] = []
        grids = []
        for picture in pictures:
            if self.settings["do_resize"]:
                picture = self._resize(picture, _longest_edge_size(picture, self.settings["size"]))
            if self.settings["do_image_splitting"]:
                cut, found = self._split(self._resize(picture, _multiple_size(picture, edge)), edge)
            else:
                cut, found = [self._resize(picture, (edge, edge))], Grid(0, 0)
            frames += [self._scaled(frame) for frame in cut]
            grids.append(found)
        height, width = (max(frame.shape[axis] for frame in frames) for axis in (1, 2))
        values = np.zeros((1, len(frames), 3, height, width), dtype=np.float32)
        mask = np.zeros((1, len(frames), height, width), dtype=np.bool_)
        for index, frame in enumerate(frames):
            values[0, index, :, : frame.shape[1], : frame.shape[2]] = frame
            mask[0, index, : frame.shape[1], : frame.shape[2]] = True
        return Processed({"pixel_values": values, "pixel_attention_mask": mask}, tuple(grids))

    def _patched_tiles(self, pictures: Sequence[np.ndarray]) -> Processed:
        """`Lfm2VlImageProcessor._preprocess` in `models/lfm2_vl/image_processing_lfm2_vl.py`."""
        settings, cell = self.settings, self.settings["encoder_patch_size"] * self.settings["downsample_factor"]
        side, factor = settings["encoder_patch_size"], settings["downsample_factor"]
        tiles: list[np.ndarray] = []
        grids: list[Grid] = []
        for picture in pictures:
            whole = _tokens_size(picture, settings["min_image_tokens"], settings["max_image_tokens"], cell)
            rows, columns = self._tiles_of(picture, cell)
            cut = _squares(
                self._resize(picture, (rows * settings["tile_size"], columns * settings["tile_size"])), rows, columns
            )
            if rows * columns == 1:
                cut = [self._resize(picture, whole)]
            elif settings["use_thumbnail"]:
                cut = [*cut, self._resize(picture, whole)]
            tiles += [self._scaled(tile) for tile in cut]
            cells = (math.prod(math.ceil(size // side / factor) for size in tile.shape[1:]) for tile in cut)
            grids.append(Grid(rows, columns, tuple(cells)))
        most = settings["max_image_tokens"] * factor**2
        if settings["do_image_splitting"]:
            most = max(most, (settings["tile_size"] // side) ** 2)
        values = np.zeros((len(tiles), most, 3 * side**2), dtype=np.float32)
        mask = np.zeros((len(tiles), most), dtype=np.int64)
        for index, tile in enumerate(tiles):
            patches = _line_by_line(tile, side)
            values[index, : len(patches)], mask[index, : len(patches)] = patches, 1
        shapes = np.array([[size // side for size in tile.shape[1:]] for tile in tiles], dtype=np.int64)
        arrays = {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": shapes}
        return Processed(arrays, tuple(grids))

    def _tiles_of(self, picture: np.ndarray, cell: int) -> tuple[int, int]:
        """Rows and columns of tiles of one size that `[3, h, w]` is cut into; 1 and 1 where it is not."""
        settings = self.settings
        least, most = (settings[name] for name in ("min_tiles", "max_tiles"))
        height, width = picture.shape[1:]
        area = math.prod(max(settings["encoder_patch_size"], round(side / cell) * cell) for side in (height, width))
        splits = settings["do_image_splitting"] and not least == most == 1
        if not splits or area <= settings["max_image_tokens"] * cell**2 * settings["max_pixels_tolerance"]:
            return 1, 1
        return _closest_grid(height, width, least, most, settings["tile_size"])

    def _split(self, picture: np.ndarray, edge: int) -> tuple[list[np.ndarray], Grid]:
        """`[3, h, w]` → tiles row by row and then the whole, each `[3, edge, edge]`; one tile alone stays as it is.

        `Idefics3ImageProcessorPil.split_images`.
        """
        rows, columns = picture.shape[1] // edge, picture.shape[2] // edge
        if rows <= 1 and columns <= 1:
            return [picture], Grid(0, 0)
        cut = [
            picture[:, row * edge : (row + 1) * edge, column * edge : (column + 1) * edge]
            for row in range(rows)
            for column in range(columns)
        ]
        return [*cut, self._resize(picture, (edge, edge))], Grid(rows, columns)


def _kind(settings: Mapping[str, Any]) -> str:
    """The name in `IMAGE_PROCESSORS` of the processor that the settings are for. Raises InputError if it has none."""
    name = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
    name = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if name not in IMAGE_PROCESSORS:
        known = ", ".join(IMAGE_PROCESSORS)
        raise InputError(f"{_FILE}: image_processor_type: {name or None!r} is not supported: there is {known}")
    return name


def _checked(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings of the processor of this name, with transformers' defaults."""
    kind = IMAGE_PROCESSORS[name]
    known = {**kind.wanted, **kind.defaults}
    given = {key: value for key, value in settings.items() if value is not None and key not in kind.inert}
    if kind.cut == "patches":
        given = _with_areas(given)
    merged = {**_STEPS, **kind.defaults, **given}
    for key, value in merged.items():
        if (
            key in _STEPS
            or key in known
            or key in _INERT_SETTINGS
            or key in ("resample", "image_mean", "image_std", "size")
        ):
            continue
        if key in ("do_center_crop", "crop_size") and kind.cut == "whole":
            continue
        if value not in _INERT_VALUES.get(key, ()):
            raise InputError(f"{_FILE}: {key}: {value!r} is not supported of a {name}")
    for key in ("size", "crop_size", "max_image_size"):
        if key in merged:
            merged[key] = _size(key, merged[key], square=key != "size" or "shortest_edge" not in known["size"])
    if kind.cut == "patched tiles":
        _check_tiles(merged)
    for key in ("image_mean", "image_std"):
        merged[key] = [merged[key]] * 3 if isinstance(merged[key], int | float) else merged[key]
    if merged["resample"] not in [int(one) for one in Image.Resampling]:
        raise InputError(f"{_FILE}: resample: {merged['resample']!r} is none of Pillow's filters, 0 to 5")
    return merged


def _check_tiles(settings: Mapping[str, Any]) -> None:
    """Raises InputError for tiles of no whole cells, limits that leave nothing, and more pixels than any model has."""
    cell = settings["encoder_patch_size"] * settings["downsample_factor"]
    if settings["tile_size"] % cell:
        raise InputError(f"{_FILE}: tile_size: {settings['tile_size']} is no number of whole cells of {cell} pixels")
    for least, most in (("min_tiles", "max_tiles"), ("min_image_tokens", "max_image_tokens")):
        if settings[least] > settings[most]:
            raise InputError(f"{_FILE}: {least}: {settings[least]} is above {most}, {settings[most]}")
    pixels = (settings["max_tiles"] + 1) * max(settings["tile_size"] ** 2, settings["max_image_tokens"] * cell**2)
    if pixels > LARGEST_AREA:
        raise InputError(
            f"{_FILE}: max_tiles: tiles and the whole have {pixels:,} pixels together: make fewer or smaller ones, of "
            f"at most {LARGEST_AREA:,}"
        )


def _with_areas(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with numbers of pixels under the names of today, if they are under those of transformers 4."""
    size = dict(settings.get("size") or {})
    for older, name in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if older in settings:
            size[name] = settings[older]
    plain = {key: value for key, value in settings.items() if key not in ("min_pixels", "max_pixels", "size")}
    return plain | ({"size": size} if size else {})


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
        raise InputError(f"{_FILE}: size: {dict(size)} is not supported")
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


def _cells_size(height: int, width: int, size: Mapping[str, int], cell: tuple[int, int]) -> tuple[int, int]:
    """Height and width in whole cells: no side longer than `size` says, then up to the next cell.

    `get_resize_output_image_size` in `models/pixtral/image_processing_pil_pixtral.py`.
    """
    longest = (size["longest_edge"],) * 2 if "longest_edge" in size else (size["height"], size["width"])
    ratio = max(height / longest[0], width / longest[1])
    if ratio > 1:
        height, width = math.floor(height / ratio), math.floor(width / ratio)
    rows, columns = ((side - 1) // part + 1 for side, part in zip((height, width), cell, strict=True))
    if rows < 1 or columns < 1:
        raise InputError(f"{_FILE}: size: {dict(size)} leaves nothing of a picture that is so much longer than wide")
    return rows * cell[0], columns * cell[1]


def _sides_within(height: int, width: int, longest: int, least: int) -> tuple[int, int]:
    """Height and width, the longer one `longest`, the other of the same proportion but no less than `least`.

    `DeepseekVLImageProcessorPil.resize` in `models/deepseek_vl/image_processing_pil_deepseek_vl.py`.
    """
    delta = longest / max(height, width)
    return max(round(height * delta), least), max(round(width * delta), least)


def _enlarged(height: int, width: int, cell: int) -> tuple[int, int]:
    """Height and width, of a cell at least; `smart_resize` in `models/glm46v/image_processing_pil_glm46v.py`."""
    if min(height, width) >= cell:
        return height, width
    scale = max(cell / height, cell / width)
    return int(height * scale), int(width * scale)


def _area_size(height: int, width: int, least: float, most: float, cell: int) -> tuple[int, int]:
    """Height and width in whole cells, with between `least` and `most` pixels; halves go to the even cell.

    `smart_resize` in `models/qwen2_vl/image_processing_pil_qwen2_vl.py`.

    Raises:
        InputError: one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise InputError(f"a picture of {width}×{height} pixels: one side is more than 200 times the other")
    rows, columns = round(height / cell), round(width / cell)
    if rows * columns * cell**2 > most:
        scale = math.sqrt(height * width / most)
        rows, columns = (max(1, math.floor(side / scale / cell)) for side in (height, width))
    elif rows * columns * cell**2 < least:
        scale = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(side * scale / cell) for side in (height, width))
    return rows * cell, columns * cell


def _tokens_size(picture: np.ndarray, least: int, most: int, cell: int) -> tuple[int, int]:
    """Height and width in whole cells, so many of them; halves go to the even cell.

    `Lfm2VlImageProcessor.smart_resize` in `models/lfm2_vl/image_processing_lfm2_vl.py`.
    """
    height, width = picture.shape[1:]
    rows, columns = (max(1, round(side / cell)) for side in (height, width))
    if rows * columns > most:
        scale = math.sqrt((height * width) / (most * cell**2))
        rows, columns = (max(1, math.floor(side / scale / cell)) for side in (height, width))
    elif rows * columns < least:
        scale = math.sqrt(least * cell**2 / (height * width))
        rows, columns = (math.ceil(side * scale / cell) for side in (height, width))
    return rows * cell, columns * cell


def _closest_grid(height: int, width: int, least: int, most: int, tile: int) -> tuple[int, int]:
    """Rows and columns of tiles nearest to the picture's proportions; of equals the larger, if the picture fills half.

    `find_closest_aspect_ratio` in `models/lfm2_vl/image_processing_lfm2_vl.py`: of grids of as many tiles the order is
    that of Python's sets, by width and height.
    """
    ratios = {
        (columns, rows)
        for count in range(least, most + 1)
        for columns in range(1, count + 1)
        for rows in range(1, count + 1)
        if least <= columns * rows <= most
    }
    best, distance = (1, 1), math.inf
    for columns, rows in sorted(ratios, key=lambda pair: pair[0] * pair[1]):
        off = abs(width / height - columns / rows)
        if off < distance or (off == distance and height * width > 0.5 * tile**2 * columns * rows):
            best, distance = (columns, rows), off
    return best[1], best[0]


def _squares(picture: np.ndarray, rows: int, columns: int) -> list[np.ndarray]:
    """`[3, h, w]` as tiles of one size, row by row."""
    height, width = picture.shape[1] // rows, picture.shape[2] // columns
    return [
        picture[:, row * height : (row + 1) * height, column * width : (column + 1) * width]
        for row in range(rows)
        for column in range(columns)
    ]


def _line_by_line(tile: np.ndarray, side: int) -> np.ndarray:
    """`[3, h, w]` → patches line by line `[patches, side · side · 3]`, channels last."""
    rows, columns = (size // side for size in tile.shape[1:])
    split = tile.reshape(3, rows, side, columns, side).transpose(1, 3, 2, 4, 0)
    return split.reshape(rows * columns, -1)


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
