"""The table's picture, `quality.svg`: what each dtype costs in nats, on a scale of powers of ten, over its size.

It has a ground of its own, light or dark as the reader's system is, so that any page can show it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from vlm_export.verify.report import DtypeRow

FILE = "quality.svg"
_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 690, 44, 340
_LETTER, _LINE, _RADIUS = 8, 17, 5  # a label is at most so wide a letter, and so high; the radius of a point
_STYLE = """
  svg { font: 13px system-ui, sans-serif; --ground: #ffffff; --ink: #1f2328; --faint: #d1d9e0; --point: #0969da; }
  @media (prefers-color-scheme: dark) {
    svg { --ground: #0d1117; --ink: #e6edf3; --faint: #30363d; --point: #58a6ff; }
  }
  .ground { fill: var(--ground); }
  text { fill: var(--ink); }
  line { stroke: var(--faint); }
  line.to-label { stroke: var(--ink); stroke-opacity: 0.4; }
  circle { fill: var(--point); stroke: var(--point); stroke-width: 2; }
  circle.fails { fill: var(--ground); }
  .title { font-weight: 600; }
"""


@dataclass(frozen=True)
class _Axis:
    """Values of an axis that have a name, in px where the first and the last of them lie."""

    ticks: Sequence[float]
    start: float
    end: float

    def place(self, value: float) -> float:
        """Where a value lies, in px."""
        low, high = self.ticks[0], self.ticks[-1]
        return self.start + (value - low) / (high - low) * (self.end - self.start)


@dataclass(frozen=True)
class _Point:
    """A dtype at its place, in px."""

    x: float
    y: float
    label: str
    fails: bool


def svg(rows: Sequence[DtypeRow]) -> str | None:
    """The picture of those rows that have a divergence above 0, or None of fewer than two."""
    shown = [(row, row.kl) for row in rows if row.kl is not None and 0 < row.kl < math.inf]
    if len(shown) < 2:
        return None
    sizes = _Axis(_size_ticks(max(row.total_bytes for row, _ in shown) / 1e6), _LEFT, _RIGHT)
    powers = _Axis(_powers([kl for _, kl in shown]), _BOTTOM, _TOP)
    points = [
        _Point(
            sizes.place(row.total_bytes / 1e6),
            powers.place(math.log10(kl)),
            row.dtype + (" (fails)" if row.verdict == "fail" else ""),
            row.verdict == "fail",
        )
        for row, kl in shown
    ]
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
    return "\n".join(
        [opening, f"<style>{_STYLE}</style>", *_frame(), *_axes(sizes, powers), *_marks(points), "</svg>\n"]
    )


def _size_ticks(largest: float) -> list[float]:
    """From 0 to above the largest, in at most six steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(largest))
    step = next(step for step in (power / 5, power / 2, power, power * 2) if largest / step <= 6)
    return [step * count for count in range(math.floor(largest / step) + 2)]


def _powers(costs: Sequence[float]) -> list[float]:
    """The powers of ten from below the least to above the largest."""
    low, high = math.floor(math.log10(min(costs))), math.ceil(math.log10(max(costs)))
    return [float(power) for power in range(low, max(high, low + 1) + 1)]


def _frame() -> Iterator[str]:
    yield f'<rect class="ground" width="{_WIDTH}" height="{_HEIGHT}" rx="6"/>'
    yield _text(_LEFT, 24, "What each dtype costs", "start", "title")
    yield _text((_LEFT + _RIGHT) / 2, _HEIGHT - 16, "size of all graphs, MB", "middle")
    middle = (_TOP + _BOTTOM) / 2
    name = _text(0, 0, "KL from float32, nats a token", "middle")
    yield f'<g transform="translate(20 {middle}) rotate(-90)">{name}</g>'


def _axes(sizes: _Axis, powers: _Axis) -> Iterator[str]:
    for size in sizes.ticks:
        x = sizes.place(size)
        yield _line(x, _TOP, x, _BOTTOM)
        yield _text(x, _BOTTOM + 20, f"{size:g}", "middle")
    for power in powers.ticks:
        y = powers.place(power)
        yield _line(_LEFT, y, _RIGHT, y)
        yield _text(_LEFT - 8, y + 4, f"{10.0**power:g}" if power > -5 else f"1e{power:g}", "end")


def _marks(points: Sequence[_Point]) -> Iterator[str]:
    """Points and labels, each right of its point, or left where the picture ends, and below what is in its way."""
    taken = [(point.x - _RADIUS, point.x + _RADIUS, point.y) for point in points]
    for point in sorted(points, key=lambda point: (point.y, point.x)):
        width = _LETTER * len(point.label)
        left = point.x + 12 if point.x + 12 + width < _WIDTH else point.x - 12 - width
        y = point.y
        while any(abs(y - other) < _LINE and left < end and start < left + width for start, end, other in taken):
            y += 1
        taken.append((left, left + width, y))
        if y != point.y:
            yield _line(point.x, point.y, left - 2, y, "to-label")
        yield f'<circle cx="{point.x:.1f}" cy="{point.y:.1f}" r="{_RADIUS}"{_class("fails" if point.fails else "")}/>'
        yield _text(left, y + 4, point.label, "start")


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{_class(kind)}/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{_class(kind)}>{escape(text)}</text>'


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
