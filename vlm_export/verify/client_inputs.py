"""Whether a repo's own files make of a prompt and a picture what PyTorch was fed: ids, pixels, and where texts end.

What a client is fed decides what it says. Where captions differ, these checks say which part of it is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_export.runtime.drivers import image_token_id
from vlm_export.runtime.image_tokens import ImageTokens, written_by
from vlm_export.runtime.images import ImageProcessor, open_image
from vlm_export.runtime.repo import Repo
from vlm_export.runtime.sessions import Arrays
from vlm_export.runtime.tasks import Tasks
from vlm_export.runtime.text import Text
from vlm_export.verify.golden import Golden

_PARTS = 4  # of a side
_SHOWN = 3  # ids on each side of the first that differs


class OwnFiles:
    """What this package's own runtime makes of a repo's tokenizer and image processor."""

    def __init__(self, repo: Repo):
        self.repo = repo
        self.images = ImageProcessor(repo.preprocessor)
        self.text = Text(repo.path)

    def pixels(self, path: Path) -> np.ndarray:
        """`pixel_values` of a picture."""
        return self.images([open_image(path)]).arrays["pixel_values"]

    def prompt_ids(self, golden: Golden, inputs: Arrays, path: Path) -> list[int]:
        """Ids of the golden's conversation, or of its text, with a place for each row of the picture's features.

        Of a task they are those of its sentence alone.
        """
        if self.repo.layout == "tasks":
            return self.text.encode(Tasks.of(self.repo.preprocessor).sentence(golden.text), add_special_tokens=True)
        text = self.text.render(golden.conversation) if golden.conversation else golden.text
        image = image_token_id(self.repo.config)
        written = written_by(self.repo, self.text)
        tokens = ImageTokens.of(self.text.token(image), self.images.cut, self.repo.processor, written)
        [grid] = self.images([open_image(path)]).grids
        fed = int((inputs["input_ids"] == image).sum())
        tiles = grid.rows * grid.columns + 1 if grid.rows else 1
        rows = tokens.rows(grid)
        return self.text.conversation_ids(tokens.write(text, [grid], [fed // tiles if rows is None else rows]))


def ids_difference(found: Sequence[int], expected: Sequence[int]) -> str:
    """Where two prompts part, or nothing."""
    if list(found) == list(expected):
        return ""
    pairs = enumerate(zip(found, expected, strict=False))
    place = next((index for index, (one, other) in pairs if one != other), min(len(found), len(expected)))
    shown = [list(ids[max(0, place - _SHOWN) : place + _SHOWN]) for ids in (found, expected)]
    return f"from id {place + 1}: {shown[0]}, PyTorch's {shown[1]}"


def pixel_difference(found: np.ndarray | None, expected: np.ndarray | None) -> float:
    """The mean difference of two pictures' pixels, in the units that the model is fed; infinite for other shapes."""
    if found is None or expected is None or found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found.astype(np.float64) - expected).mean())


def coarse(pixels: np.ndarray | None) -> np.ndarray | None:
    """The means of 4 × 4 parts of pictures `[…, H, W]`.

    transformers.js makes pictures smaller without smoothing them first, so that single pixels differ from Pillow's; its
    parts do not, unless it crops, scales or normalizes otherwise.
    """
    if pixels is None:
        return None
    rows = [part.mean(axis=-2) for part in np.array_split(pixels.astype(np.float64), _PARTS, axis=-2)]
    parts = [[piece.mean(axis=-1) for piece in np.array_split(row, _PARTS, axis=-1)] for row in rows]
    return np.stack([np.stack(row, axis=-1) for row in parts], axis=-2)


def peculiarity(path: Path) -> str:
    """What other decoders than Pillow read in another way in a picture, or nothing."""
    with Image.open(path) as picture:
        found = [
            (picture.mode in ("LA", "La"), "grey with transparency, which transformers.js 4.3 cannot convert"),
            (picture.mode in ("RGBA", "PA", "RGBa") or "transparency" in picture.info, "transparent"),
            (picture.mode.startswith(("I", "F")), "more than 8 bits"),
            (picture.mode == "CMYK", "CMYK"),
            (getattr(picture, "n_frames", 1) > 1, "animated"),
            (picture.getexif().get(0x0112, 1) != 1, "turned by its EXIF data"),
        ]
    return ", ".join(words for is_so, words in found if is_so)
