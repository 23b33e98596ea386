"""Runs the one graph of layout single: pictures and a prompt's ids go in, tokens come out, the loop is the graph's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm_export.contract import IMAGE, IMAGE_ROWS, OPTIONS, SINGLE_GRAPH, TEXTS_BETWEEN
from vlm_export.errors import InputError
from vlm_export.runtime.run_limit import limited
from vlm_export.runtime.sessions import Arrays, Inputs, Sessions
from vlm_export.runtime.text import left_padded

PIXELS, IDS, MASK = "pixel_values", "input_ids", "attention_mask"
_NUMBERS, _TEXTS = ("sequences", "lengths", "scores"), "texts"
_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}


@dataclass(frozen=True)
class Row:
    """What was generated of one picture or prompt: ids up to the one that ends it, and each one's log probability."""

    token_ids: list[int]
    scores: np.ndarray


def rows(sessions: Sessions, inputs: Inputs, options: Sequence[float] = ()) -> list[Row]:
    """Run the graph on `pixel_values` `[images, …] float32`, and of a chat on `input_ids` `[batch, tokens] int64`.

    Without an `attention_mask` no row is padded. `options` are those of `SINGLE_OPTIONS`, in order. A graph that
    prepares pictures is fed them as they are, in 0…255, and one at a time.
    """
    made = _run(sessions, inputs, options, _NUMBERS)
    each = zip(made["sequences"], made["lengths"], made["scores"], strict=True)
    return [Row(ids[:length].tolist(), scores[:length]) for ids, length, scores in each]


def gives_texts(sessions: Sessions) -> bool:
    """Whether the graph itself makes texts of its tokens."""
    return _TEXTS in [value.name for value in sessions.session(SINGLE_GRAPH).get_outputs()]


def texts(sessions: Sessions, inputs: Inputs, options: Sequence[float] = ()) -> list[str]:
    """The texts that the graph itself gives, one a row.

    Raises:
        UnicodeDecodeError: they are no UTF-8.
    """
    made = _run(sessions, inputs, options, (_TEXTS,))[_TEXTS]
    return bytes(made).decode().split(TEXTS_BETWEEN)


def _run(sessions: Sessions, inputs: Inputs, options: Sequence[float], outputs: Sequence[str]) -> Arrays:
    feeds = {name: _fed(name, inputs, options) for name in sessions.input_names(SINGLE_GRAPH)}
    with limited(SINGLE_GRAPH, sessions.run_seconds) as run:
        made = sessions.session(SINGLE_GRAPH).run(list(outputs), feeds, run)
    return dict(zip(outputs, map(np.asarray, made), strict=True))


def _fed(name: str, inputs: Inputs, options: Sequence[float]) -> np.ndarray:
    if name == OPTIONS:
        return np.array(options, dtype=np.float32)
    if name == IMAGE:
        return np.ascontiguousarray(np.moveaxis(inputs[PIXELS][0], 0, -1).astype(np.uint8))
    if name == MASK and name not in inputs:
        return np.ones_like(inputs[IDS])
    return inputs[name]


def together(items: Sequence[Inputs], pad: int, more: int = 0) -> Arrays | None:
    """The inputs of several rows as those of one run; None where their pictures do not stack.

    Prompts are padded on their left by `pad`, the longest by `more`. Of pictures in tiles, those with fewer get tiles
    of zeros, which the graph drops.
    """
    made: Arrays = {}
    for name in items[0].keys() - {IDS, MASK}:
        stacked = _stacked([inputs[name] for inputs in items])
        if stacked is None:
            return None
        made[name] = stacked
    ids, mask = left_padded([inputs[IDS][0].tolist() for inputs in items], pad) if IDS in items[0] else (None, None)
    if ids is not None and mask is not None:
        made[IDS] = np.pad(ids, ((0, 0), (more, 0)), constant_values=pad)
        made[MASK] = np.pad(mask, ((0, 0), (more, 0)))
    return made


def _stacked(arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    """Along the first axis, zeros behind the second one of `[1, tiles, …]`; None for other shapes that differ."""
    if len({array.shape[1:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    if len({(len(array), *array.shape[2:]) for array in arrays}) > 1 or len(arrays[0]) > 1 or arrays[0].ndim < 4:
        return None
    most = max(array.shape[1] for array in arrays)
    rest = [(0, 0)] * (arrays[0].ndim - 2)
    return np.concatenate([np.pad(array, ((0, 0), (0, most - array.shape[1]), *rest)) for array in arrays])


def image_rows(sessions: Sessions) -> int | None:
    """How many rows of features an image, or a tile of one, has; None where that follows from its size."""
    found = sessions.session(SINGLE_GRAPH).get_modelmeta().custom_metadata_map.get(IMAGE_ROWS)
    return int(found) if found else None


def no_pictures(sessions: Sessions, name: str) -> Arrays:
    """What a graph is fed of a prompt without pictures: none, or of tiles one of zeros, which it drops.

    Raises:
        InputError: its pictures are of any size, so that it cannot be told that there is none.
    """
    fed: Arrays = {}
    for value in sessions.session(SINGLE_GRAPH).get_inputs():
        if value.name in (IDS, MASK, OPTIONS):
            continue
        first, *others = value.shape
        tiles = 2 if first == "batch_size" else 1
        if value.name == IMAGE or any(isinstance(size, str) for size in value.shape[tiles:]):
            raise InputError(f"{name}: as one file it answers about a picture: give it one")
        sizes = [1, 1, *others[1:]] if tiles == 2 else [0, *others]
        fed[value.name] = np.zeros(sizes, dtype=_TYPES[value.type])
    return fed
