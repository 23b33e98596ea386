"""The quick start of the docs, walked: from a checkpoint to the Hub by the commands that it shows."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import quick_start  # noqa: E402


def without_figures(text: str) -> list[str]:
    """Lines without what a machine decides: times, sizes, rounding, and the widths of columns that come of them."""
    return [" ".join(re.sub(r"[\d.]+(?:e-\d+)?", "0", line).split()) for line in text.splitlines() if line.strip("─ ")]


def test_the_commands_print_what_the_page_shows() -> None:
    page = quick_start.PAGE.read_text(encoding="utf-8")
    shown = re.findall(r"```console\n(.*?)\n```", page, re.DOTALL)
    made = quick_start.walk()
    assert [text.splitlines()[0] for text in made] == [text.splitlines()[0] for text in shown]
    for text, expected in zip(made, shown, strict=True):
        assert without_figures(text) == without_figures(expected), "run `python scripts/quick_start.py`"
