"""What `doctor` prints of a repo: findings by file, each with its fix, wrapped to the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vlm_export.doctor.examine import Examination
from vlm_export.doctor.findings import Finding, Severity

_COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow"}
_LABEL = max(len(severity.value) for severity in Severity) + 2
_INDENT = 2


def renderable(examination: Examination) -> Group:
    """Each file once, its findings below it; then how many there are."""
    return Group(*_findings(examination), Text(summary(examination)))


def summary(examination: Examination) -> str:
    """The last line."""
    errors, warnings = (examination.count(severity) for severity in (Severity.ERROR, Severity.WARNING))
    looked = f"{_many(len(examination.rules), 'rule')}, {_many(examination.graphs, 'graph')}"
    if not examination.found:
        return f"no findings: {looked}"
    return f"{_many(errors, 'error')}, {_many(warnings, 'warning')}: {looked}"


def _findings(examination: Examination) -> Iterator[RenderableType]:
    ordered = sorted(examination.found, key=lambda pair: pair[1].file)
    for file, group in groupby(ordered, key=lambda pair: pair[1].file):
        yield Text(file, style="bold")
        for rule, finding in group:
            yield from _finding(rule, finding)


def _finding(rule: str, finding: Finding) -> Iterator[RenderableType]:
    severity = finding.severity
    yield _line(severity.value, _COLOURS[severity], Text.assemble(finding.problem, (f" [{rule}]", "dim")))
    yield _line("", "", Text.assemble(("fix: ", "green"), finding.fix))


def _line(label: str, colour: str, text: Text) -> Padding:
    """A label, and a text that is wrapped beside it."""
    grid = Table.grid(padding=0)
    grid.add_column(width=_LABEL, style=colour)
    grid.add_column()
    grid.add_row(label, text)
    return Padding(grid, (0, 0, 0, _INDENT), expand=False)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
