"""The page's table: a row a dtype, with what was found of its graphs and of its captions in each runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from vlm_export.measure.bench_table import megabytes, significant
from vlm_export.verify import causes, limits
from vlm_export.verify.report import RUNS, Check, DtypeRow, Report

RUNTIMES = {"ort": "ONNX Runtime", "node": "Node", "wasm": "WASM", "webgpu": "WebGPU"}
Mark = Literal["pass", "near-tie", "fail", "none"]
_RATES = (limits.TOKENS_EXACT, limits.FROM_FILE_EXACT)
_SHOWN = 4  # failed checks of a cell that are listed


@dataclass(frozen=True)
class Subject:
    """What a column is about: the graphs, or captions made of the golden's pixels or of image files in a runtime."""

    what: Literal["graphs", "captions", "from file"]
    runtime: str = ""

    @property
    def title(self) -> str:
        """The column's name where it has no heading."""
        return f"{self.what}, {self.place}" if self.runtime else self.what

    @property
    def place(self) -> str:
        """The runtime as a reader knows it."""
        return runtime_name(self.runtime)


@dataclass(frozen=True)
class Cell:
    """What was found of one dtype in one column; `failures` are some of the checks that failed, `more` so many more."""

    title: str
    mark: Mark
    text: str
    failures: Sequence[Check] = ()
    more: int = 0


@dataclass(frozen=True)
class Row:
    """One dtype; `cause` says why it failed, and `speeds` are tokens a second by runtime."""

    dtype: str
    mark: Mark
    cells: Sequence[Cell]
    size: str
    speeds: Sequence[str]
    cause: str


@dataclass(frozen=True)
class Matrix:
    """The table; `measured` are the runtimes whose speeds it has."""

    columns: Sequence[Subject]
    measured: Sequence[str]
    rows: Sequence[Row]

    @property
    def groups(self) -> list[tuple[str, list[Subject]]]:
        """The columns below each heading."""
        return [(what, list(columns)) for what, columns in groupby(self.columns, key=lambda column: column.what)]


def runtime_name(runtime: str) -> str:
    """A runtime as a reader knows it."""
    return RUNTIMES.get(runtime, runtime)


def matrix(report: Report) -> Matrix:
    """A row for each dtype of the report's table, in its order."""
    columns = list(_columns(report))
    measured = [runtime for runtime in RUNTIMES if any(runtime in row.speed for row in report.table)]
    rows = [_row(report, row, columns, measured) for row in report.table]
    return Matrix(columns, [runtime_name(runtime) for runtime in measured], rows)


def _columns(report: Report) -> Iterator[Subject]:
    """Those of which at least one dtype has something to tell."""
    found = dict.fromkeys(map(_subject, report.checks))
    for subject in (Subject("graphs"), *(Subject("captions", name) for name in report.runtimes)):
        if subject in found:
            yield subject
    for subject in (Subject("from file", name) for name in report.runtimes):
        own = [check for check in report.checks if _subject(check) == subject]
        # This package's runtime reads image files as PyTorch's processor does: only where it does not is there a story.
        if any(check.metric == limits.FROM_FILE_EXACT or check.verdict == "fail" for check in own):
            yield subject


def _subject(check: Check) -> Subject:
    if check.component == "files" or check.metric == limits.FROM_FILE_EXACT:
        return Subject("from file", check.runtime)
    if check.component == "all" and (check.metric, check.runtime) != (RUNS, "ort"):
        return Subject("captions", check.runtime)
    return Subject("graphs")


def _row(report: Report, row: DtypeRow, columns: Sequence[Subject], measured: Sequence[str]) -> Row:
    checks = [check for check in report.checks if check.dtype == row.dtype]
    speeds = [significant(row.speed[name].tokens_per_second) if name in row.speed else "" for name in measured]
    failed = row.dtype in report.failed_dtypes
    return Row(
        dtype=row.dtype,
        mark=_mark(checks),
        cells=[_cell(column, [check for check in checks if _subject(check) == column]) for column in columns],
        size=megabytes(row.total_bytes),
        speeds=speeds,
        cause=causes.cause(report, row.dtype) if failed else "",
    )


def _cell(subject: Subject, checks: Sequence[Check]) -> Cell:
    failures = [check for check in checks if check.verdict == "fail"]
    text = "" if not checks else _graphs(checks) if subject.what == "graphs" else _captions(checks)
    return Cell(subject.title, _mark_of_cell(checks), text, failures[:_SHOWN], max(0, len(failures) - _SHOWN))


def _mark_of_cell(checks: Sequence[Check]) -> Mark:
    """As of `_mark`; but no passing check beside it makes a rate of captions good that no limit is for."""
    mark = _mark(checks)
    unjudged = any(check.metric in _RATES and check.verdict == "reported" for check in checks)
    return "none" if unjudged and mark != "fail" else mark


def _mark(checks: Sequence[Check]) -> Mark:
    """The worst verdict; what is reported alone decides nothing."""
    verdicts = {check.verdict for check in checks}
    for verdict in ("fail", "near-tie", "pass"):
        if verdict in verdicts:
            return verdict
    return "none"


def _graphs(checks: Sequence[Check]) -> str:
    judged = [check for check in checks if check.verdict != "reported"]
    good = sum(check.verdict != "fail" for check in judged)
    return f"all {good:,}" if good == len(judged) else f"{good:,} of {len(judged):,}"


def _captions(checks: Sequence[Check]) -> str:
    """How many captions are PyTorch's, as the check itself says it."""
    rates = [check for check in checks if check.metric in _RATES]
    if not rates:
        return "fails" if any(check.verdict == "fail" for check in checks) else "same inputs"
    count, images, _ = rates[0].detail.partition(" images")
    return count if images else "not a number"
