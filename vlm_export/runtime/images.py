"""Make a graph's inputs of pictures, as `preprocessor_config.json` says; the numbers are those of transformers on PIL.

Source: transformers 5.23, `PilBackend` in `image_processing_backends.py` and the functions of `image_transforms.py`
that it calls; the tiles are those of `models/idefics3/image_processing_pil_idefics3.py`. Between the steps a picture is
`[3, h, w] uint8`.
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

from vlm_export.contract import IMAGE_PROCESSORS, Cut
from vlm_export.errors import InputError, reason
from vlm_export.runtime.image_settings import checked, kind_of
from vlm_export.runtime.image_sizes import (
    area_size,
    cells_size,
    closest_grid,
    enlarged,
    longest_edge_size,
    multiple_size,
    sides_within,
    target_size,
    tokens_size,
)
from vlm_export.runtime.sessions import Arrays

MOST_PIXELS = 80_000_000  # of one picture: it is decoded into several copies of 4 bytes each


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
        name = kind_of(settings)
        self.settings = checked(settings, name)
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
            return cells_size(height, width, size, self._cell)
        if self.cut == "patches":
            frames = self.settings["temporal_patch_size"] if self.kind.counts_frames else 1
            if self.kind.counts_frames:
                height, width = enlarged(height, width, self._cell[0])
            return area_size(
                height, width, size["shortest_edge"] / frames, size["longest_edge"] / frames, self._cell[0]
            )
        if self.kind.fills:
            return sides_within(height, width, self.settings["image_size"], self.settings["min_size"])
        return target_size(picture, size)

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
                picture = self._resize(picture, longest_edge_size(picture, self.settings["size"]))
            if self.settings["do_image_splitting"]:
                cut, found = self._split(self._resize(picture, multiple_size(picture, edge)), edge)
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
            whole = tokens_size(picture, settings["min_image_tokens"], settings["max_image_tokens"], cell)
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
        return closest_grid(height, width, least, most, settings["tile_size"])

    def _split(self, picture: np.ndarray, edge: int) -> tuple[list[np.ndarray], Grid]:
        """`[3, h, w]` → tiles row by row and then the whole, each `[3, edge, edge]`; one tile alone stays as it is.

        `Idefics3ImageProcessorPil.split_images`.
        """
        rows, columns = picture.shape[1] // edge, picture.shape[2] // edge
        if rows <= 1 and columns <= 1:
            return [picture], Grid(0, 0)
        return [*_squares(picture, rows, columns), self._resize(picture, (edge, edge))], Grid(rows, columns)


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
