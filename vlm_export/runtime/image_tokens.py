"""The tokens that stand for the images of a prompt, as each kind of processor writes them.

Sources, in transformers 5.23: `models/idefics3/processing_idefics3.py` for tiles, for cells
`models/pixtral/processing_pixtral.py`, for patches `models/qwen2_vl/processing_qwen2_vl.py`, for patched tiles
`models/lfm2_vl/processing_lfm2_vl.py`; what is written beside them, in `contract.PROCESSORS`, is that of
`models/paligemma/processing_paligemma.py` and `models/gemma3/processing_gemma3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vlm_export.contract import PROCESSORS, Cut, Written
from vlm_export.errors import InputError
from vlm_export.runtime.images import Grid
from vlm_export.runtime.repo import Repo
from vlm_export.runtime.text import Text

_NOTHING = Written()
_FAKE_TOKEN, _GLOBAL_TAG = "<fake_token_around_image>", "<global-img>"
_START, _END, _THUMBNAIL = "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"


@dataclass(frozen=True)
class ImageTokens:
    """How images stand in a prompt.

    Attributes:
        token: stands for a row of an image's features.
        cut: what the image processor makes of pictures.
        line_end, last_line_end: what stands after each line of cells, and after the last.
        written: what the processor writes beside them, tokens in the place of their names.
    """

    token: str
    cut: Cut = "whole"
    line_end: str = ""
    last_line_end: str = ""
    written: Written = _NOTHING

    @classmethod
    def of(cls, token: str, cut: Cut, processor: Mapping[str, Any], written: Written = _NOTHING) -> ImageTokens:
        """Those of a repo, whose `processor_config.json` is `processor`."""
        if cut != "cells":
            return cls(token, cut, written=written)
        line_end = processor.get("image_break_token", "[IMG_BREAK]")
        return cls(token, cut, line_end, processor.get("image_end_token", "[IMG_END]"), written)

    @property
    def place(self) -> str:
        """What stands for an image in a rendered conversation."""
        return self.written.place or self.token

    def rows(self, grid: Grid) -> int | None:
        """How many rows of features a picture cut like this has; None where that is for the graph to say."""
        if self.cut == "patched tiles":
            return sum(grid.cells)
        return grid.rows * grid.columns if self.cut in ("cells", "patches") else None

    def write(self, text: str, grids: Sequence[Grid], rows: Sequence[int]) -> str:
        """A rendered conversation, with its image tokens repeated as often as the image, or one of its tiles, has rows.

        Raises:
            InputError: there are not as many image tokens as images.
        """
        parts, written = text.split(self.place), self.written
        if len(parts) != len(rows) + 1:
            raise InputError(
                f"the prompt has {len(parts) - 1} places for images ({self.place}), but there are {len(rows)} images"
            )
        parts[-1] = written.behind + parts[-1] + written.end
        images = [
            written.before + self._image(grid, count) + written.after for grid, count in zip(grids, rows, strict=True)
        ]
        return parts[0] + "".join(image + part for image, part in zip(images, parts[1:], strict=True))

    def _image(self, grid: Grid, rows: int) -> str:
        tokens = self.token * rows
        if self.cut == "tiles":
            return _tiled(tokens, grid)
        if self.cut == "patched tiles":
            return self._patched_tiles(grid)
        if self.cut == "cells":
            line = self.token * grid.columns
            return self.line_end.join([line] * grid.rows) + self.last_line_end
        return tokens

    def _patched_tiles(self, grid: Grid) -> str:
        """The tokens of each tile behind one that says which it is; of one alone nothing says so."""
        rows, columns = (range(1, count + 1) for count in (grid.rows, grid.columns))
        places = [f"<|img_row_{row}_col_{column}|>" for row in rows for column in columns]
        names = [""] if len(places) == 1 else [*places, _THUMBNAIL]
        tiles = zip(names, grid.cells, strict=False)
        return _START + "".join(name + self.token * count for name, count in tiles) + _END


def written_by(repo: Repo, text: Text) -> Written:
    """What a repo's processor writes beside an image's tokens, `text` being the repo's.

    Raises:
        InputError: tokenizer_config.json does not have a token that it writes.
    """
    written = PROCESSORS.get(str(repo.preprocessor.get("processor_class")), _NOTHING)
    tokens = {name: value for name, value in text.settings.items() if isinstance(value, str)} | text.special_tokens
    try:
        return Written(**{name: value.format_map(tokens) for name, value in asdict(written).items()})
    except KeyError as error:
        raise InputError(
            f"{repo.path / 'tokenizer_config.json'}: {error.args[0]}: not set; {repo.preprocessor['processor_class']} "
            "writes it"
        ) from error


def _tiled(tokens: str, tiles: Grid) -> str:
    whole = f"{_FAKE_TOKEN}{_GLOBAL_TAG}{tokens}{_FAKE_TOKEN}"
    if not tiles.rows:
        return whole
    lines = [
        "".join(f"{_FAKE_TOKEN}<row_{row}_col_{column}>{tokens}" for column in range(1, tiles.columns + 1)) + "\n"
        for row in range(1, tiles.rows + 1)
    ]
    return "".join(lines) + "\n" + whole
