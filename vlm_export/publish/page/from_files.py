"""What each client makes of image files: a row a photograph, and one for all golden images that are like any other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_export.publish.page.matrix import runtime_name
from vlm_export.publish.page.pictures import Words, differing_words
from vlm_export.verify.report import FromFile


@dataclass(frozen=True)
class Cell:
    """What one client makes of one picture, or of several.

    Attributes:
        equal: whether every caption is the expected one.
        text: how many are, of several; else nothing.
        pixels: how far they are off, of 255.
        words: another caption beside the expected one.
        failure: why there is none.
    """

    equal: bool
    text: str
    pixels: str
    words: Sequence[Words] = ()
    failure: str = ""


@dataclass(frozen=True)
class Row:
    """One picture, or several; `cells` are in the order of the runtimes."""

    name: str
    facts: str
    caption: str
    cells: Sequence[Cell | None]


@dataclass(frozen=True)
class Table:
    """The rows, and what stands over their cells: `Node, fp32`."""

    columns: Sequence[str]
    rows: Sequence[Row]


def table(found: Sequence[FromFile]) -> Table:
    """What a report says of image files."""
    columns = list(dict.fromkeys((each.runtime, each.dtype) for each in found))
    plain = [each for each in found if each.is_golden and not each.peculiarity]
    rows = []
    if plain:
        count = len({each.file for each in plain})
        rows.append(Row("golden images", f"{count} of them", "", [_several(_of(plain, *column)) for column in columns]))
    others = {(each.is_golden, each.file): each for each in found if each not in plain}
    for (is_golden, file), first in others.items():
        same = [each for each in found if (each.is_golden, each.file) == (is_golden, file)]
        size = f"{first.width} × {first.height}"
        facts = ", ".join(filter(None, (size, first.peculiarity, "a golden image" if is_golden else "")))
        cells = [_one(_of(same, *column)) for column in columns]
        rows.append(Row(file, facts, first.expected, cells))
    return Table([f"{runtime_name(runtime)}, {dtype}" for runtime, dtype in columns], rows)


def _of(found: Sequence[FromFile], runtime: str, dtype: str) -> list[FromFile]:
    return [each for each in found if (each.runtime, each.dtype) == (runtime, dtype)]


def _one(found: Sequence[FromFile]) -> Cell | None:
    """What one client makes of one picture, if it was given it."""
    if not found:
        return None
    [each] = found
    equal = each.text == each.expected and not each.failure
    words = [] if equal or each.failure else list(differing_words(each.text, each.expected))
    return Cell(equal, "", _pixels([each]), words, each.failure)


def _several(found: Sequence[FromFile]) -> Cell | None:
    if not found:
        return None
    equal = sum(each.text == each.expected for each in found)
    return Cell(equal == len(found), f"{equal} of {len(found)}", _pixels(found))


def _pixels(found: Sequence[FromFile]) -> str:
    """The largest difference."""
    known = [each.pixel_difference for each in found if each.pixel_difference is not None]
    return f"{max(known):.1f}" if known else "another size"
