"""Figures as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_SIZES = ((1e9, " GB", 1), (1e6, " MB", 1), (1e3, " kB", 0))
_COUNTS = ((1e9, " G", 2), (1e6, " M", 1), (1e3, " k", 1))


def size(count: float) -> str:
    """Bytes, such as `628.2 MB`."""
    return _figure(count, _SIZES, " bytes")


def number(count: float) -> str:
    """How many, such as `134.5 M`."""
    return _figure(count, _COUNTS, "")


def minutes(seconds: float) -> str:
    """A time in whole minutes, such as `5 min`; at least one."""
    return f"{max(1, round(seconds / 60))} min"


def _figure(count: float, steps: Iterable[tuple[float, str, int]], below: str) -> str:
    for step, unit, digits in steps:
        if count >= step:
            return f"{count / step:.{digits}f}{unit}"
    return f"{count:.0f}{below}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines: the first column to the left, all others to the right but for the last one, which is text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if place in (0, last) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
