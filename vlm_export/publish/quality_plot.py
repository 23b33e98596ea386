"""The table's pictures, over the size of each dtype: `quality.svg`, what it costs in nats, on a scale of powers of ten;
and, for the report's page, at how many places its token is PyTorch's, with the limit that decides.

They have a ground of their own, light or dark as the reader's system is, so that any page can show them; a page that
holds them may set the colours of `.plot`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from vlm_export.verify.report import DtypeRow

FILE = "quality.svg"
_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 690, 44, 340
_LETTER, _LINE, _RADIUS = 8, 17, 5  # a label is at most so wide a letter, and so high; the radius of a point
_DASH = 14  # half the width of a limit's line
_STYLE = """
  .plot { font: 13px system-ui, sans-serif; --ground: #ffffff; --ink: #1f2328; --faint: #d1d9e0; --point: #0969da; }
  @media (prefers-color-scheme: dark) {
    .plot { --ground: #0d1117; --ink: #e6edf3; --faint: #30363d; --point: #58a6ff; }
  }
  .plot .ground { fill: var(--ground); }
  .plot text { fill: var(--ink); }
  .plot line { stroke: var(--faint); }
  .plot line.to-label { stroke: var(--ink); stroke-opacity: 0.4; }
  .plot line.limit { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 4 3; }
  .plot circle { fill: var(--point); stroke: var(--point); stroke-width: 2; }
  .plot circle.fails { fill: var(--ground); }
  .plot .title { font-weight: 600; }
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
    """`quality.svg`, of those rows that have a divergence above 0, or None of fewer than two."""
    shown = [(row, row.kl) for row in rows if row.kl is not None and 0 < row.kl < math.inf]
    if len(shown) < 2:
        return None
    sizes = _Axis(_size_ticks(max(row.total_bytes for row, _ in shown) / 1e6), _LEFT, _RIGHT)
    powers = _Axis(_powers([kl for _, kl in shown]), _BOTTOM, _TOP)
    points = [_point(row, sizes, powers.place(math.log10(kl))) for row, kl in shown]
    names = [f"{10.0**power:g}" if power > -5 else f"1e{power:g}" for power in powers.ticks]
    return _picture(
        "What each dtype costs", "KL from float32, nats a token", [*_axes(sizes, powers, names), *_marks(points)]
    )


def agreement_svg(rows: Sequence[DtypeRow], limits: Mapping[str, float]) -> str | None:
    """The share of places with PyTorch's token, and a line at the limit of each dtype that has one.

    None of fewer than two rows that know their share.
    """
    shown = [(row, row.top1) for row in rows if row.top1 is not None and not math.isnan(row.top1)]
    if len(shown) < 2:
        return None
    sizes = _Axis(_size_ticks(max(row.total_bytes for row, _ in shown) / 1e6), _LEFT, _RIGHT)
    shares = _Axis(_share_ticks([share for _, share in shown] + list(limits.values())), _BOTTOM, _TOP)
    points = [_point(row, sizes, shares.place(share)) for row, share in shown]
    bounds = [
        _limit(point.x, shares.place(limits[row.dtype]))
        for (row, _), point in zip(shown, points, strict=True)
        if row.dtype in limits
    ]
    lines = [
        *_axes(sizes, shares, [f"{share:.0%}" for share in shares.ticks]),
        *bounds,
        *_marks(points),
        _limit(_RIGHT - 140, 20),
        _text(_RIGHT, 24, "limit of the dtype", "end"),
    ]
    return _picture("The same token as PyTorch", "share of places", lines)


def _limit(x: float, y: float) -> str:
    return _line(x - _DASH, y, x + _DASH, y, "limit")


def _picture(title: str, quality: str, lines: Sequence[str]) -> str:
    """The whole picture, which says its title, and what of quality it shows over size, to who does not see it."""
    label = f'role="img" aria-label="{title}: {quality}, over size"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" {label}>'
    return "\n".join([opening, f"<style>{_STYLE}</style>", *_frame(title, quality), *lines, "</svg>\n"])


def _point(row: DtypeRow, sizes: _Axis, y: float) -> _Point:
    fails = row.verdict == "fail"
    return _Point(sizes.place(row.total_bytes / 1e6), y, row.dtype + (" (fails)" if fails else ""), fails)


def _share_ticks(shares: Sequence[float]) -> list[float]:
    """From below the least share to 100 %, in steps of 1, 2, 5, 10 or 20 %."""
    least = min(shares)
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if (1 - least) / step <= 5)
    count = max(1, math.ceil((1 - least) / step - 1e-9))
    return [1 - step * place for place in range(count, -1, -1)]


def _size_ticks(largest: float) -> list[float]:
    """From 0 to above the largest, in at most six steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(largest))
    step = next(step for step in (power / 5, power / 2, power, power * 2) if largest / step <= 6)
    return [step * count for count in range(math.floor(largest / step) + 2)]


def _powers(costs: Sequence[float]) -> list[float]:
    """The powers of ten from below the least to above the largest."""
    low, high = math.floor(math.log10(min(costs))), math.ceil(math.log10(max(costs)))
    return [float(power) for power in range(low, max(high, low + 1) + 1)]


def _frame(title: str, quality: str) -> Iterator[str]:
    yield f'<rect class="ground" width="{_WIDTH}" height="{_HEIGHT}" rx="6"/>'
    yield _text(_LEFT, 24, title, "start", "title")
    yield _text((_LEFT + _RIGHT) / 2, _HEIGHT - 16, "size of all graphs, MB", "middle")
    middle = (_TOP + _BOTTOM) / 2
    name = _text(0, 0, quality, "middle")
    yield f'<g transform="translate(20 {middle}) rotate(-90)">{name}</g>'


def _axes(sizes: _Axis, qualities: _Axis, names: Sequence[str]) -> Iterator[str]:
    for size in sizes.ticks:
        x = sizes.place(size)
        yield _line(x, _TOP, x, _BOTTOM)
        yield _text(x, _BOTTOM + 20, f"{size:g}", "middle")
    for quality, name in zip(qualities.ticks, names, strict=True):
        y = qualities.place(quality)
        yield _line(_LEFT, y, _RIGHT, y)
        yield _text(_LEFT - 8, y + 4, name, "end")


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
