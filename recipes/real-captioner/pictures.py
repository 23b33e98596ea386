"""The pictures in the README: the course of the training, and some of what the captioner sees.

python recipes/real-captioner/pictures.py     # writes training.svg and scenes.png beside this file
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).parent
WIDTH, HEIGHT, MARGIN = 640, 260, 48
COLUMNS, ROWS = 6, 2


def curve(entries: Sequence[dict[str, Any]]) -> str:
    """An SVG of the loss (logarithmic, left) and of the share of exact captions (right), by training step."""
    losses = [(entry["step"], entry["loss"]) for entry in entries]
    exact = [(entry["step"], entry["exact"]) for entry in entries if "exact" in entry]
    last, decades = losses[-1][0], (-2.0, 1.0)

    def across(step: float) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * step / last

    def down(share: float) -> float:
        return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * share

    def log_share(loss: float) -> float:
        return (math.log10(loss) - decades[0]) / (decades[1] - decades[0])

    def line(points: Sequence[tuple[float, float]], colour: str) -> str:
        places = " ".join(f"{across(step):.1f},{down(share):.1f}" for step, share in points)
        return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"/>'

    def label(x: float, y: float, text: str, anchor: str = "middle", colour: str = "#666") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'

    parts = [
        f'<rect x="{MARGIN}" y="{MARGIN}" width="{WIDTH - 2 * MARGIN}" height="{HEIGHT - 2 * MARGIN}" fill="none" '
        'stroke="#999"/>',
        line([(step, log_share(loss)) for step, loss in losses], "#c0392b"),
        line(exact, "#2471a3"),
        *(label(MARGIN - 6, down(share) + 4, text, "end", "#c0392b") for share, text in _decades(decades)),
        *(label(WIDTH - MARGIN + 6, down(share) + 4, f"{share:.0%}", "start", "#2471a3") for share in (0, 0.5, 1)),
        *(label(across(step), HEIGHT - MARGIN + 18, str(step)) for step in range(0, last + 1, 150)),
        label(MARGIN, MARGIN - 12, "loss of a token", "start", "#c0392b"),
        label(WIDTH - MARGIN, MARGIN - 12, "captions exactly right, of 50 held out", "end", "#2471a3"),
        label(WIDTH / 2, HEIGHT - 10, "steps of 16 scenes"),
    ]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _decades(decades: tuple[float, float]) -> list[tuple[float, str]]:
    low, high = (int(each) for each in decades)
    return [((power - low) / (high - low), f"{10.0**power:g}") for power in range(low, high + 1)]


def sheet(paths: Sequence[Path]) -> Image.Image:
    """Some of the pictures side by side."""
    pictures = [Image.open(path).convert("RGB") for path in paths[: COLUMNS * ROWS]]
    width, height = pictures[0].size
    found = Image.new("RGB", (COLUMNS * width, ROWS * height))
    for index, picture in enumerate(pictures):
        found.paste(picture, (index % COLUMNS * width, index // COLUMNS * height))
    return found


def main() -> None:
    log = json.loads((HERE / "training.json").read_text())
    (HERE / "training.svg").write_text(curve(log["captions"]))
    sheet(sorted((HERE / "images").glob("*.png"))).save(HERE / "scenes.png", optimize=True)


if __name__ == "__main__":
    main()
