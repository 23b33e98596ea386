"""Writes the tables of dtypes into the pages that have them, from `dtypes.py` and `benchmarks/measured.json`.

python scripts/docs_dtypes.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`: `kinds` says what each dtype is, `prices` what it
costs in a line, and any other name is a table of the file of measurements. A measurement is written there by hand, as
the benchmark prints it, with the command that makes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vlm_export.dtypes import DTYPES, FP32, PREFERRED, Dtype, Form

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "benchmarks" / "measured.json"
PAGES = (ROOT / "README.md", ROOT / "docs" / "dtypes.md", ROOT / "docs" / "measured.md")
_PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_DEVICES = {"cpu": "Node, servers", "wasm": "browsers", "webgpu": "WebGPU"}


@dataclass(frozen=True)
class Measurement:
    """A table that a benchmark prints: what was measured, the command, and cells by row, all with their units."""

    title: str
    command: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]

    def cell(self, row: str, column: str) -> str:
        """A cell; empty where that was not measured."""
        return self.rows[row][self.columns.index(column)] if row in self.rows else ""

    def ratio(self, row: str, column: str) -> str:
        """A cell as a multiple of float32's in the same run; empty where that was not measured."""
        cell = self.cell(row, column)
        return f"{_number(cell) / _number(self.cell(FP32.name, column)):.1f}" if cell else ""


@cache
def measurements() -> dict[str, Measurement]:
    """The tables of the file, by name."""
    tables = json.loads(MEASURED.read_text(encoding="utf-8"))["tables"]
    return {name: _measurement(table) for name, table in tables.items()}


def _measurement(table: dict[str, Any]) -> Measurement:
    rows = {label: tuple(cells) for label, cells in table["rows"].items()}
    return Measurement(table["title"], table["command"], tuple(table["columns"]), rows)


def written(text: str) -> str:
    """A page with each of its tables as it should be."""
    return _PLACE.sub(lambda place: f"{place[1]}{table(place[2])}{place[3]}", text)


def table(name: str) -> str:
    """A table by its name, in Markdown."""
    if name == "kinds":
        return kinds()
    if name == "prices":
        return prices()
    found = measurements()[name]
    rows = [[_label(label), *cells] for label, cells in found.rows.items()]
    return f"{found.title} (`{found.command}`):\n\n{markdown(['', *found.columns], rows)}"


def kinds() -> str:
    """What becomes of each kind of weight in each dtype."""
    head = ("`--quantize`", "file suffix", "decoder", "token table and head", "tower", "computes in")
    rows = [
        (_label(name), f"`{kind.suffix}`" if kind.suffix else "none", *map(str, _forms(kind)), kind.arithmetic)
        for name, kind in DTYPES.items()
    ]
    return markdown(head, rows)


def _forms(kind: Dtype) -> list[str]:
    forms = (kind.decoder, kind.table, kind.others)
    return [kind.arithmetic if form.kernel == "plain" else _words(form) for form in forms]


def _words(form: Form) -> str:
    words = str(form).replace("folded", "unpacked at load").replace("4 bits in blocks of 64, nf4", "NF4, blocks of 64")
    return words + ", zero points" * form.offsets + ", calibrated" * form.is_calibrated


def prices() -> str:
    """A line a dtype: what it is for, and what it costs beside float32."""
    made = measurements()
    head = ("dtype", "taken by", "decoder", "KL, nats", "captions as PyTorch's, of 300", "speed", "speed in WASM")
    rows = [
        (
            _label(name),
            ", ".join(words for device, words in _DEVICES.items() if PREFERRED[device][0] == name),
            made["quality"].cell(name, "decoder"),
            made["quality"].cell(name, "KL, nats"),
            made["captions"].cell(name, made["captions"].columns[0]),
            made["speed"].ratio(name, "decode") or made["four_bits"].ratio(name, "decode"),
            made["speed"].ratio(name, "decode in WASM"),
        )
        for name in DTYPES
        if name in made["quality"].rows
    ]
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a cell of nothing is a dash."""
    lines = [head, ["---"] * len(head), *([cell or "–" for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _label(label: str) -> str:
    """A row's name, its dtypes and options as code."""
    names = "|".join(map(re.escape, DTYPES))
    return re.sub(rf"^(?:{names}|auto)\b|--budget \w+", lambda found: f"`{found[0]}`", label)


def _number(cell: str) -> float:
    return float(cell.split()[0])


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
