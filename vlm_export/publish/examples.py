"""Pictures for the model card, with what is said of them: the first golden images, in `assets/` of the repo."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_export.runtime.images import open_image
from vlm_export.targets import TARGETS
from vlm_export.verify.golden import GoldenFolder

FOLDER = "assets"
_COUNT = 3
_SIDE = 512  # the longest, in pixels
_UNCHANGED = "the same"


@dataclass(frozen=True)
class Example:
    """A picture of the repo.

    Attributes:
        file: its path in the repo.
        caption: PyTorch's.
        said: by dtype, what that says, of the dtypes of which it is known.
    """

    file: str
    caption: str
    said: Mapping[str, str] = field(default_factory=dict)


def write_examples(repo: Path, golden: GoldenFolder, captions: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Write the first golden images into the repo, in place of earlier ones. Returns them with what is said of them.

    They are made again of their pixels alone: what else a file says, such as where a photograph was taken, is left out.
    `captions` are a report's, as JSON has them.

    Raises:
        InputError: an image cannot be read.
    """
    remove_examples(repo)
    (repo / FOLDER).mkdir()
    by_dtype = _texts_by_dtype(captions)
    made = []
    for place, (path, image) in enumerate(zip(golden.image_paths()[:_COUNT], golden.facts.images, strict=False)):
        file = _write(path, repo / FOLDER / f"example-{place + 1}")
        said = {dtype: texts[place] for dtype, texts in by_dtype.items() if place < len(texts)}
        made.append(Example(f"{FOLDER}/{file.name}", image.caption, said))
    return made


def remove_examples(repo: Path) -> None:
    """Take the pictures out of the repo, if there are any."""
    shutil.rmtree(repo / FOLDER, ignore_errors=True)


def _write(source: Path, target: Path) -> Path:
    """A small picture as it is, as PNG; of a large one a smaller JPEG."""
    image = open_image(source)
    if max(image.size) <= _SIDE:
        path = target.with_suffix(".png")
        Image.frombytes("RGB", image.size, image.tobytes()).save(path)
    else:
        path = target.with_suffix(".jpg")
        image.thumbnail((_SIDE, _SIDE))
        Image.frombytes("RGB", image.size, image.tobytes()).save(path, quality=90)
    return path


def _texts_by_dtype(captions: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Of each dtype the captions of the golden's pixels, in ONNX Runtime or else in the first runtime that ran it."""
    of_pixels = [said for said in captions if said["made_of"] == "pixels"]
    ordered = sorted(of_pixels, key=lambda said: TARGETS.index(said["runtime"]), reverse=True)
    return {said["dtype"]: list(said["texts"]) for said in ordered}


def markdown(examples: Sequence[Example], dtypes: Sequence[str]) -> str:
    """A table with a column for each picture: the picture, PyTorch's caption, and a row for each dtype that differs."""
    known = [dtype for dtype in dtypes if all(dtype in example.said for example in examples)]
    differing = [dtype for dtype in known if any(example.said[dtype] != example.caption for example in examples)]
    same = [dtype for dtype in known if dtype not in differing]
    rows = [
        ["", *(f"![{_cell(example.caption)}]({example.file})" for example in examples)],
        ["PyTorch", *(_cell(example.caption) for example in examples)],
        *([dtype, *(_said(example, dtype) for example in examples)] for dtype in differing),
    ]
    first, *others = [f"| {' | '.join(row)} |" for row in rows]
    table = [first, "|---" * (len(examples) + 1) + "|", *others]
    return "\n".join([*table, *(["", f"Word for word the same: {', '.join(same)}."] if same else [])])


def _said(example: Example, dtype: str) -> str:
    text = example.said[dtype]
    return _UNCHANGED if text == example.caption else f"**{_cell(text)}**"


def _cell(text: str) -> str:
    """A text as it is, in a cell of a table: on one line, and without what Markdown would act on."""
    line = " ".join(text.split()) or "(nothing)"
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#~" else letter for letter in line)
