"""What an adapter changed, by module and layer: how large ΔW is beside W."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
HEIGHT, STEP = 36, 10  # px of the highest bar, and from one bar to the next


@dataclass(frozen=True)
class Bar:
    """One module of a layer; `height` px, of all bars the highest `HEIGHT`."""

    title: str
    x: int
    height: float


@dataclass(frozen=True)
class Strip:
    """The modules of one name in all layers, in their order, and the largest and the least change among them."""

    name: str
    width: int
    bars: Sequence[Bar]
    largest: str
    least: str


def strips(layers: Mapping[str, float | None]) -> list[Strip]:
    """A strip for each name of a module, of `MergeReport.layers`; modules whose weight is zero are left out."""
    known = {module: ratio for module, ratio in layers.items() if ratio is not None}
    top = max(known.values(), default=0.0)
    groups: dict[str, list[tuple[str, float]]] = {}
    for module, ratio in sorted(known.items(), key=lambda item: _numbers(item[0])):
        groups.setdefault(_NUMBER.sub("*", module), []).append((module, ratio))
    return [_strip(name, those, top) for name, those in groups.items()]


def _numbers(module: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(module)]


def _strip(name: str, those: Sequence[tuple[str, float]], top: float) -> Strip:
    bars = [
        Bar(f"{module}: {ratio:.2%}", index * STEP, max(1.0, HEIGHT * ratio / top) if top else 1.0)
        for index, (module, ratio) in enumerate(those)
    ]
    ratios = [ratio for _, ratio in those]
    return Strip(name, len(bars) * STEP, bars, f"{max(ratios):.2%}", f"{min(ratios):.2%}")
