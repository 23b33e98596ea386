"""Captions of stock transformers.js: what is asked of it and what it answers, whatever it runs in.

Items go to `node/client.mjs` as JSON, and each comes back as a line of JSON. Arrays lie beside them, in files of a
folder that both sides know: little-endian float32, under names that begin with the item's index.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm_export.errors import CheckFailed

if TYPE_CHECKING:
    import numpy as np

Layout = Literal["captioner", "chat", "tasks", "single"]


def client_of(layout: Layout) -> str:
    """What loads a layout's graphs, as messages name it."""
    return "ONNX Runtime" if layout == "single" else "transformers.js"


class NoAnswer(CheckFailed):
    """A runtime said nothing for too long, and was stopped."""


@dataclass(frozen=True, eq=False)
class Item:
    """One picture to caption: an image file, its `pixel_values` `[1, …, 3, H, W] float32`, or both.

    `pixel_values` are used in the place of the client's own; of an image beside them only the size counts. Where they
    are patches, `size` is the height and width of the picture that they are of, and an image is not read. The prompt
    is the whole text, image token included, or a conversation that the client's chat template makes into one; the
    captioner layout has no room for one and ignores it. One that `may_fail` ends nothing but itself. What the client
    made of its image comes back if `keep_pixels` says so, the scores that tokens are taken from if `keep_scores` does.
    """

    image: Path | None = None
    pixel_values: np.ndarray | None = None
    prompt: str | Sequence[Mapping[str, Any]] = ""
    may_fail: bool = False
    keep_pixels: bool = False
    keep_scores: bool = False
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.image is None and self.pixel_values is None:
            raise ValueError("an Item has an image or pixel_values")


@dataclass(frozen=True)
class Caption:
    """What was generated for one item: ids without the prompt or the start token, up to and including eos.

    Both times count from the start of the item, reading its image included. `prompt_ids` are those of a chat;
    `pixel_values` those that an item keeps, and `scores` `[tokens, vocabulary] float32`, after the rules of generation;
    `failure` why one that may fail did.
    """

    token_ids: tuple[int, ...]
    text: str
    first_token_milliseconds: float
    milliseconds: float
    prompt_ids: tuple[int, ...] = ()
    pixel_values: np.ndarray | None = None
    scores: np.ndarray | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Captions:
    """The captions in the order of the items, and what was seen on the way to them.

    `versions` are by name those of transformers (the JavaScript one), onnxruntime, and what it ran in; `warnings` the
    lines that the libraries wrote. `eos_token_ids` are those that the client stops at.
    """

    captions: tuple[Caption, ...]
    versions: dict[str, str]
    warnings: tuple[str, ...]
    eos_token_ids: tuple[int, ...]


def items_json(
    items: Sequence[Item], folder: Path, address: Callable[[int, Path], str] = lambda _, image: str(image.absolute())
) -> list[dict[str, Any]]:
    """The items as the client takes them, their `pixel_values` in files of the folder.

    `address` says where the client finds the image of an item; all other files go by their names.
    """
    return [_item_json(item, index, folder, address) for index, item in enumerate(items)]


def _item_json(item: Item, index: int, folder: Path, address: Callable[[int, Path], str]) -> dict[str, Any]:
    described: dict[str, Any] = {"prompt": item.prompt}
    if item.image is not None and item.size is None:
        described["image"] = address(index, item.image)
    if item.pixel_values is not None:
        name = f"{index}.pixels.f32"
        item.pixel_values.astype("<f4").tofile(folder / name)
        described["pixel_values"] = {"path": name, "shape": item.pixel_values.shape}
        if item.size is not None:
            described["pixel_values"]["size"] = item.size
    if item.keep_pixels:
        described["pixels_out"] = _kept(index, "pixels")
    if item.keep_scores:
        described["scores_out"] = _kept(index, "scores")
    if item.may_fail:
        described["may_fail"] = True
    return described


def caption_of(answer: Mapping[str, Any], folder: Path) -> Caption:
    """What an answer says, with the arrays that the client wrote into the folder."""
    index = answer["index"]
    return Caption(
        token_ids=tuple(answer["token_ids"]),
        text=answer["text"],
        first_token_milliseconds=answer["first_token_milliseconds"],
        milliseconds=answer["milliseconds"],
        prompt_ids=tuple(answer["prompt_ids"]),
        pixel_values=_array(folder / _kept(index, "pixels"), answer.get("pixel_shape")),
        scores=_array(folder / _kept(index, "scores"), answer.get("score_shape")),
        failure=answer.get("failure"),
    )


def _kept(index: int, what: str) -> str:
    return f"{index}.{what}.out.f32"


def _array(path: Path, shape: Sequence[int] | None) -> np.ndarray | None:
    import numpy as np

    return None if shape is None else np.fromfile(path, "<f4").reshape(shape)
