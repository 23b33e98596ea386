"""The golden images, what PyTorch says of each, and what each dtype says that says something else."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from io import BytesIO
from pathlib import Path
from typing import Literal

from vlm_export.publish.page.matrix import runtime_name
from vlm_export.runtime.images import open_image
from vlm_export.verify.golden import GoldenFolder
from vlm_export.verify.report import Captions

_SIDE = 224  # a thumbnail's longest side, px


@dataclass(frozen=True)
class Words:
    """Some words of a caption beside PyTorch's: in both, only in it, or only in PyTorch's."""

    kind: Literal["same", "other", "missing"]
    text: str


@dataclass(frozen=True)
class Other:
    """A caption that is not PyTorch's: who says it, and its words."""

    said_by: Sequence[str]
    words: Sequence[Words]


@dataclass(frozen=True)
class Picture:
    """A golden image as a `data:` URI, `width` px wide; `others` are the captions that differ from PyTorch's."""

    file: str
    image: str
    width: int
    height: int
    caption: str
    others: Sequence[Other]


def pictures(golden: GoldenFolder, said: Sequence[Captions]) -> list[Picture]:
    """The images of which the report has captions, in the golden's order."""
    count = max((len(captions.texts) for captions in said), default=0)
    shown = zip(golden.image_paths()[:count], golden.facts.images[:count], strict=True)
    return [
        _picture(path, image.caption, _others(said, place, image.caption)) for place, (path, image) in enumerate(shown)
    ]


def _picture(path: Path, caption: str, others: Sequence[Other]) -> Picture:
    image = open_image(path)
    image.thumbnail((_SIDE, _SIDE))
    packed = BytesIO()
    image.save(packed, "WEBP", quality=85)
    uri = f"data:image/webp;base64,{base64.b64encode(packed.getvalue()).decode()}"
    return Picture(path.name, uri, image.width, image.height, caption, others)


def _others(said: Sequence[Captions], index: int, expected: str) -> list[Other]:
    """Each other caption once."""
    by_text: dict[str, list[Captions]] = {}
    for captions in said:
        text = captions.texts[index]
        if text != expected:
            by_text.setdefault(text, []).append(captions)
    return [Other(list(_said_by(those)), list(differing_words(text, expected))) for text, those in by_text.items()]


def _said_by(those: Sequence[Captions]) -> Iterator[str]:
    """`q4, q2 in ONNX Runtime, Node, Node from the file`: places in which the same dtypes say it together."""
    dtypes: dict[str, list[str]] = {}
    for captions in those:
        place = runtime_name(captions.runtime) + (" from the file" if captions.made_of == "file" else "")
        dtypes.setdefault(place, []).append(captions.dtype)
    places: dict[str, list[str]] = {}
    for place, names in dtypes.items():
        places.setdefault(", ".join(names), []).append(place)
    for said_by, found in places.items():
        yield f"{said_by} in {', '.join(found)}"


def differing_words(text: str, expected: str) -> Iterator[Words]:
    """The words of a caption in order, with those of PyTorch's that it lacks where they would stand."""
    own, right = text.split(), expected.split()
    for kind, a, b, c, d in SequenceMatcher(None, right, own, autojunk=False).get_opcodes():
        if kind == "equal":
            yield Words("same", " ".join(own[c:d]))
            continue
        if a < b:
            yield Words("missing", " ".join(right[a:b]))
        if c < d:
            yield Words("other", " ".join(own[c:d]))
