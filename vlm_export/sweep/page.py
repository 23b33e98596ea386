"""Renders the sweep's page: one file that needs no network; without scripts the table is there, and not sortable."""

from __future__ import annotations

import base64
import hashlib
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from vlm_export.atomic import write_text
from vlm_export.measure.bench_table import duration, megabytes, significant
from vlm_export.publish import quality_plot
from vlm_export.publish.findings import PAGE
from vlm_export.sweep.results import CellResult, Choice, SweepResult, best, budgets
from vlm_export.verify.report import DtypeRow

_HERE = Path(__file__).parent
_OF_REPORTS = _HERE.parent / "publish" / "page"
_SCRIPT = "sweep-page.js"
_PLOTS = 6
_RUNTIMES = {"ort": "CPU", "node": "Node", "wasm": "WASM"}


@dataclass(frozen=True)
class Figure:
    """A cell of the table: what is read, and what it is sorted by, the empty last."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Line:
    """A row of the table: a dtype of a repo, or a repo that has none."""

    cell: CellResult
    dtype: str
    status: str
    figures: Sequence[Figure]


def write_page(result: SweepResult, folder: Path) -> None:
    """Write `index.html` into the sweep's folder."""
    script = (_HERE / _SCRIPT).read_text(encoding="utf-8")
    affordable = budgets(result)
    runtimes = [name for name in _RUNTIMES if any(name in row.speed for cell in result.cells for row in cell.table)]
    text = _template().render(
        result=result,
        counts=_counts(result),
        titles=_titles(runtimes),
        lines=[line for cell in result.cells for line in _lines(cell, runtimes)],
        budgets=[megabytes(budget) for budget in affordable],
        choices=[(cell, [_choice(best(cell, budget)) for budget in affordable]) for cell in result.cells if cell.table],
        failures=[cell for cell in result.cells if cell.failure],
        plots=list(_plots(result.cells)),
        costs=list(_costs(result.cells)),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_text(folder / PAGE, text)


def _counts(result: SweepResult) -> list[tuple[str, int]]:
    """How many repos there are of each status, those that there are."""
    words = {"pass": "pass every check", "fail": "fail one", "failed": "came to no end", "waiting": "are to come"}
    counts = [(word, sum(cell.status == status for cell in result.cells)) for status, word in words.items()]
    return [(word, count) for word, count in counts if count]


def _titles(runtimes: Sequence[str]) -> list[tuple[str, str]]:
    """Headings of the figures, each with what it means."""
    speeds = [
        (f"{_RUNTIMES[name]}: {title}", meaning)
        for name in runtimes
        for title, meaning in (("first token", "from the image file on"), ("tok/s", "tokens a second after the first"))
    ]
    return [
        ("size", "of all graphs"),
        ("KL", "nats a token by which the next token's probabilities are off float32's"),
        ("same token", "places where the likeliest token is PyTorch's"),
        ("same captions", "captions that are PyTorch's to the last token"),
        ("ROUGE\N{NON-BREAKING HYPHEN}L", "how much of PyTorch's captions the captions say"),
        *speeds,
    ]


def _lines(cell: CellResult, runtimes: Sequence[str]) -> Iterator[Line]:
    for row in cell.table:
        yield Line(cell, row.dtype, row.verdict or cell.status, _figures(row, runtimes))
    if not cell.table:
        yield Line(cell, "", cell.status, [Figure("–")] * len(_titles(runtimes)))


def _figures(row: DtypeRow, runtimes: Sequence[str]) -> list[Figure]:
    kl = 0.0 if row.dtype == "fp32" and row.top1 is not None else row.kl
    exact, _, of = (row.captions_exact or "").partition(" of ")
    share = int(exact) / int(of) if exact.isdigit() and of.isdigit() and int(of) else None
    speeds = [row.speed.get(name) for name in runtimes]
    return [
        Figure(megabytes(row.total_bytes), row.total_bytes),
        _figure(kl, ".2g"),
        _figure(row.top1, ".1%"),
        Figure(row.captions_exact or "–", share),
        _figure(row.rouge_l, ".3f"),
        *(
            each
            for speed in speeds
            for each in (
                Figure(duration(speed.first_token_seconds), speed.first_token_seconds) if speed else Figure("–"),
                Figure(significant(speed.tokens_per_second), speed.tokens_per_second) if speed else Figure("–"),
            )
        ),
    ]


def _figure(value: float | None, form: str) -> Figure:
    return Figure("–") if value is None or math.isnan(value) else Figure(format(value, form), value)


def _choice(choice: Choice) -> tuple[str, str]:
    """The dtype that a budget buys, and what it costs of quality."""
    row = choice.row
    if row is None:
        return "–", "none that passes is small enough"
    return row.dtype, f"{megabytes(row.total_bytes)}" + (f", KL {row.kl:.2g}" if row.kl else "")


def _plots(cells: Sequence[CellResult]) -> Iterator[tuple[str, Markup]]:
    """Of each recipe and layout, those with the most repos first, what it is called and the medians of its dtypes."""
    kinds: dict[tuple[str, str], list[CellResult]] = {}
    for cell in cells:
        kinds.setdefault((cell.recipe, cell.layout), []).append(cell)
    for (recipe, layout), repos in sorted(kinds.items(), key=lambda kind: -len(kind[1]))[:_PLOTS]:
        drawn = quality_plot.svg(_medians(repos))
        if drawn:
            yield f"{recipe}, {layout}", Markup(drawn)


def _medians(cells: Sequence[CellResult]) -> list[DtypeRow]:
    groups: dict[str, list[DtypeRow]] = {}
    for cell in cells:
        for row in cell.table:
            if row.kl is not None and math.isfinite(row.kl):
                groups.setdefault(row.dtype, []).append(row)
    return [
        replace(
            rows[0],
            total_bytes=round(statistics.median(row.total_bytes for row in rows)),
            kl=statistics.median(row.kl or 0 for row in rows),
            verdict="fail" if all(row.verdict == "fail" for row in rows) else "pass",
        )
        for rows in groups.values()
    ]


def _costs(cells: Sequence[CellResult]) -> Iterator[tuple[str, int, str, str, str]]:
    """By stage how many ran, the time of all of them, the median of one, and the most memory."""
    stages: dict[str, list[tuple[float, int]]] = {}
    seen: set[tuple[str, str]] = set()
    for cell in cells:
        for stage in cell.stages:
            shared = (cell.cell, stage.stage)
            if stage.status == "done" and not (stage.stage in ("golden", "merge") and shared in seen):
                seen.add(shared)
                stages.setdefault(stage.stage, []).append((stage.seconds, stage.peak_bytes))
    for name, ran in stages.items():
        seconds = [each for each, _ in ran]
        memory = megabytes(max(peak for _, peak in ran))
        yield name, len(ran), duration(sum(seconds)), duration(statistics.median(seconds)), memory


@cache
def _template() -> Template:
    return Environment(
        loader=FileSystemLoader([_HERE, _OF_REPORTS]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("sweep-page.html")
