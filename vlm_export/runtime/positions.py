"""Places of tokens in three axes (mrope): time, height and width, which are one number for a text.

A text counts on in all three. An image's tokens share a time, and have the line and the column of their cell; the text
after it goes on behind the longer side. Sources: transformers 5.23, `get_rope_index` in
`models/qwen2_vl/modeling_qwen2_vl.py`; transformers.js 4.3.1, `get_rope_index` in `src/models/qwen2_vl` and
`src/models/glm_ocr`, which count the same for one image.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlm_export.errors import InputError


def grid_positions(
    token_ids: np.ndarray, mask: np.ndarray, grids: np.ndarray, image_token_id: int, merge: int
) -> tuple[np.ndarray, np.ndarray]:
    """Places of the tokens of prompts, and what is added to the number of a token after each.

    Args:
        token_ids: `[batch, tokens] int64`.
        mask: `[batch, tokens] int64`, 0 for what pads a row on its left.
        grids: `[images, 3] int64`, those of all rows one after the other: frames, and lines and columns of patches.
        image_token_id: the id that stands for a cell.
        merge: the lines, and columns, of patches of a cell.

    Returns:
        Places `[3, batch, tokens] int64`, 1 where a row is padded, and shifts `[batch, 1] int64`.

    Raises:
        InputError: an image's tokens are not as many as its cells, or there is another number of images.
    """
    left = iter(grids // [1, merge, merge])
    places = np.ones((3, *token_ids.shape), dtype=np.int64)
    shifts = np.zeros((len(token_ids), 1), dtype=np.int64)
    for row, (ids, kept) in enumerate(zip(token_ids, mask != 0, strict=True)):
        found = list(_runs(ids[kept] == image_token_id, left))
        whole = np.concatenate(found, axis=1) if found else np.zeros((3, 0), dtype=np.int64)
        places[:, row, kept] = whole
        shifts[row] = whole.max(initial=-1) + 1 - whole.shape[1]
    if next(left, None) is not None:
        raise InputError("the prompt has fewer places for images than there are images")
    return places, shifts


def _runs(is_image: np.ndarray, grids: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The places `[3, tokens]` of each run of text, and of each image."""
    edges = np.flatnonzero(np.diff(is_image)) + 1
    start = 0
    for run in np.split(is_image, edges) if len(is_image) else ():
        if not run[0]:
            yield np.broadcast_to(np.arange(start, start + len(run)), (3, len(run)))
            start += len(run)
            continue
        grid = next(grids, None)
        if grid is None or int(grid.prod()) != len(run):
            cells = 0 if grid is None else int(grid.prod())
            raise InputError(f"the prompt has {len(run)} image tokens in a row for an image of {cells} cells")
        yield np.stack(np.unravel_index(np.arange(len(run)), tuple(grid))) + start
        start += int(grid[1:].max())
