"""What came of a sweep: `sweep.json`, `sweep.csv`, and what a budget buys."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from vlm_export.atomic import write_text
from vlm_export.files import write_json
from vlm_export.sweep.cells import Adapted
from vlm_export.sweep.jobs import Job, Outcome, StageName
from vlm_export.sweep.plan import Plan
from vlm_export.verify.report import DtypeRow

JSON, CSV = "sweep.json", "sweep.csv"
_BUDGETS = 4  # columns of what a budget buys
_ALIKE = 1.05  # sizes of one dtype in repos of one base, and of two dtypes that nobody chooses between by size
Status = Literal["pass", "fail", "failed", "waiting"]


@dataclass
class StageResult:
    """A stage of a repo, as `Outcome` has it."""

    stage: StageName
    status: Literal["done", "unchanged", "failed"]
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    node: str


@dataclass
class CellResult:
    """A repo: a recipe with an adapter, in a layout.

    Attributes:
        status: pass or fail, as `verify` decided; failed where a stage did not end well; waiting where one is left.
        failure: one line that says why.
        table: a row for each dtype.
    """

    cell: str
    recipe: str
    adapter: str
    layout: str
    folder: str
    status: Status = "waiting"
    failure: str | None = None
    stages: list[StageResult] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    table: list[DtypeRow] = field(default_factory=list)


@dataclass
class SweepResult:
    """`sweep.json`; folders are relative to its own."""

    name: str
    cells: list[CellResult]
    left: int
    release: str = field(default_factory=lambda: version("vlm-export"))
    schema: int = 1

    @property
    def passed(self) -> bool:
        """Whether every repo passed every check."""
        return all(cell.status == "pass" for cell in self.cells)


@dataclass(frozen=True)
class Choice:
    """The dtype of a repo that a budget buys; None where none that passes is small enough."""

    cell: CellResult
    row: DtypeRow | None


class Results:
    """Gathers outcomes as they come, and writes them."""

    def __init__(self, plan: Plan):
        self.folder = plan.folder
        of = {(cell.name, layout): _empty(cell, layout, plan.folder) for cell in plan.cells for layout in cell.layouts}
        self._of = of
        self._layouts = {cell.name: cell.layouts for cell in plan.cells}
        self.found = SweepResult(plan.file.sweep.name, list(of.values()), len(plan.jobs))
        self._left = {key: 0 for key in of}
        for job in plan.jobs:
            for key in self._about(job):
                self._left[key] += 1

    def note(self, job: Job, outcome: Outcome, dropped: Sequence[Job]) -> None:
        """Note what came of a job, and which will never begin."""
        self.found.left -= 1 + len(dropped)
        for key in (key for each in dropped for key in self._about(each)):
            self._left[key] -= 1
        for key in self._about(job):
            cell = self._of[key]
            self._left[key] -= 1
            cell.stages.append(
                StageResult(
                    job.stage,
                    outcome.status,
                    round(outcome.seconds, 2),
                    round(outcome.cpu_seconds, 2),
                    outcome.peak_bytes,
                    outcome.node,
                )
            )
            cell.warnings += [line for line in outcome.warnings if line not in cell.warnings]
            cell.table = list(outcome.table) or cell.table
            cell.failure = outcome.failure or cell.failure
            if outcome.status == "failed":
                cell.status = "failed"
            elif not self._left[key] and cell.status == "waiting":
                cell.status = "fail" if any(row.verdict == "fail" for row in cell.table) else "pass"

    def write(self) -> None:
        """Write both files."""
        write_json(self.folder / JSON, asdict(self.found))
        write_text(self.folder / CSV, csv_of(self.found))

    def _about(self, job: Job) -> list[tuple[str, Any]]:
        """The repos that a job is for: golden and merge are for all layouts."""
        shared = job.stage in ("golden", "merge")
        return [(job.cell, layout) for layout in (self._layouts[job.cell] if shared else (job.layout,))]


def _empty(cell: Adapted, layout: Any, folder: Path) -> CellResult:
    return CellResult(cell.name, cell.of, cell.adapter, layout, cell.work(layout).root.relative_to(folder).as_posix())


def csv_of(result: SweepResult) -> str:
    """A line for each dtype of each repo; of a repo without any, one that says why."""
    text = io.StringIO()
    rows = [row for cell in result.cells for row in _lines(cell)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _lines(cell: CellResult) -> Iterator[dict[str, Any]]:
    about = {"cell": cell.cell, "recipe": cell.recipe, "adapter": cell.adapter, "layout": cell.layout}
    for row in cell.table:
        speeds = {
            f"{runtime}_{name}": value for runtime, speed in row.speed.items() for name, value in asdict(speed).items()
        }
        yield {
            **about,
            "dtype": row.dtype,
            "verdict": row.verdict,
            "size_bytes": row.total_bytes,
            "kl": row.kl,
            "same_token": row.top1,
            "same_captions": row.captions_exact,
            "rouge_l": row.rouge_l,
            **speeds,
            "failure": cell.failure if row.verdict == "fail" else None,
        }
    if not cell.table:
        yield {**about, "verdict": cell.status, "failure": cell.failure}


def budgets(result: SweepResult) -> list[int]:
    """Bytes, rounded up to two digits, of which each buys a dtype that the one before does not; few of them."""
    sizes = sorted(row.total_bytes for cell in result.cells for row in cell.table if row.verdict == "pass")
    found: list[int] = []
    for size in map(_rounded_up, sizes):
        if found and size < found[-1] * _ALIKE:
            found[-1] = size
        else:
            found.append(size)
    step = max(1, math.ceil(len(found) / _BUDGETS))
    return sorted({*found[::step], *found[-1:]})


def _rounded_up(size: int) -> int:
    unit = 10 ** max(0, len(str(size)) - 2)
    return math.ceil(size / unit) * unit


def best(cell: CellResult, budget: int) -> Choice:
    """Of the dtypes that pass and are no larger, the one that is nearest to float32; of two alike the smaller."""
    rows = [row for row in cell.table if row.verdict == "pass" and row.total_bytes <= budget]
    return Choice(cell, min(rows, key=_price, default=None))


def _price(row: DtypeRow) -> tuple[float, float, int]:
    top1 = row.top1 if row.top1 is not None else 0.0
    return (row.kl if row.kl is not None and not math.isnan(row.kl) else 0.0, -top1, row.total_bytes)
