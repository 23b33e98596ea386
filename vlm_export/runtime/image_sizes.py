"""The sizes that transformers resizes a picture to, before it is cropped or cut.

Each is by another rule, with its own way of rounding; all give height and width. A picture is `[3, h, w]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from vlm_export.errors import InputError
from vlm_export.runtime.image_settings import SETTINGS_FILE


def target_size(picture: np.ndarray, size: Mapping[str, int]) -> tuple[int, int]:
    """Height and width of `[3, h, w]` after a resize; one `shortest_edge` keeps proportions, and cuts off fractions.

    `PilBackend.resize`, and `get_resize_output_image_size` in `image_transforms.py`.
    """
    if "height" in size:
        return size["height"], size["width"]
    height, width = picture.shape[1:]
    if "shortest_edge" not in size:
        raise InputError(f"{SETTINGS_FILE}: size: {dict(size)} is not supported")
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


def cells_size(height: int, width: int, size: Mapping[str, int], cell: tuple[int, int]) -> tuple[int, int]:
    """Height and width in whole cells: no side longer than `size` says, then up to the next cell.

    `get_resize_output_image_size` in `models/pixtral/image_processing_pil_pixtral.py`.
    """
    longest = (size["longest_edge"],) * 2 if "longest_edge" in size else (size["height"], size["width"])
    ratio = max(height / longest[0], width / longest[1])
    if ratio > 1:
        height, width = math.floor(height / ratio), math.floor(width / ratio)
    rows, columns = ((side - 1) // part + 1 for side, part in zip((height, width), cell, strict=True))
    if rows < 1 or columns < 1:
        raise InputError(
            f"{SETTINGS_FILE}: size: {dict(size)} leaves nothing of a picture that is so much longer than wide"
        )
    return rows * cell[0], columns * cell[1]


def sides_within(height: int, width: int, longest: int, least: int) -> tuple[int, int]:
    """Height and width, the longer one `longest`, the other of the same proportion but no less than `least`.

    `DeepseekVLImageProcessorPil.resize` in `models/deepseek_vl/image_processing_pil_deepseek_vl.py`.
    """
    delta = longest / max(height, width)
    return max(round(height * delta), least), max(round(width * delta), least)


def enlarged(height: int, width: int, cell: int) -> tuple[int, int]:
    """Height and width, of a cell at least; `smart_resize` in `models/glm46v/image_processing_pil_glm46v.py`."""
    if min(height, width) >= cell:
        return height, width
    scale = max(cell / height, cell / width)
    return int(height * scale), int(width * scale)


def area_size(height: int, width: int, least: float, most: float, cell: int) -> tuple[int, int]:
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


def tokens_size(picture: np.ndarray, least: int, most: int, cell: int) -> tuple[int, int]:
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


def closest_grid(height: int, width: int, least: int, most: int, tile: int) -> tuple[int, int]:
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


def longest_edge_size(picture: np.ndarray, size: Mapping[str, int]) -> tuple[int, int]:
    """Height and width with the longer side as `size` says, the other one even; none above 4096.

    `get_resize_output_image_size` in `models/idefics3/image_processing_pil_idefics3.py`.
    """
    if "longest_edge" not in size:
        return target_size(picture, size)
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


def multiple_size(picture: np.ndarray, edge: int) -> tuple[int, int]:
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
