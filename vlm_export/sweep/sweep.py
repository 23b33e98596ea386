"""Runs a plan: hands jobs to an engine as they may begin, tells each that ends, and keeps the table up to date."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from vlm_export.publish.findings import PAGE
from vlm_export.sweep.jobs import Job, Outcome
from vlm_export.sweep.order import Order
from vlm_export.sweep.page import write_page
from vlm_export.sweep.plan import Plan
from vlm_export.sweep.results import CSV, JSON, Results, SweepResult
from vlm_export.sweep.storage import Storage

_SECONDS = 5.0  # between two tables that are written


class Engine(Protocol):
    """What has jobs done."""

    @property
    def slots(self) -> int:
        """How many it takes at a time."""
        ...

    def begin(self, job: Job) -> None:
        """Take a job, and return at once."""

    def next(self) -> tuple[Job, Outcome]:
        """Wait for the next that ends."""
        ...


def sweep(plan: Plan, engine: Engine, tell: Callable[[str], None]) -> SweepResult:
    """Do all jobs. What fails ends its own repo; what is done and unchanged is not done again.

    `tell` is told of each job that did something, and of its warnings. The table is written as jobs end, and copied to
    the sweep's output at the end.

    Raises:
        InputError: nothing can be written to the output.
        OSError: the sweep's own folder cannot be written.
    """
    output = Storage(plan.file.output) if plan.file.output is not None else None
    if output is not None:
        output.check()
    for cell in plan.cells:
        cell.write()
    order, results = Order(plan.jobs), Results(plan)
    begun, ended, written = 0, 0, 0.0
    while order or begun:
        for job in order.take(engine.slots - begun):
            engine.begin(job)
            begun += 1
        job, outcome = engine.next()
        begun -= 1
        dropped = order.end(job, outcome)
        ended += 1 + len(dropped)
        results.note(job, outcome, dropped)
        if outcome.status != "unchanged":
            tell(f"{_counted(ended, len(plan.jobs))} {job.title} {_said(outcome, dropped)}")
        for warning in outcome.warnings:
            tell(f"warning: {job.cell}: {warning}")
        if time.monotonic() - written > _SECONDS:
            _write(results)
            written = time.monotonic()
    _write(results)
    if output is not None:
        for name in (JSON, CSV, PAGE):
            output.put(results.folder / name)
    return results.found


def _write(results: Results) -> None:
    results.write()
    write_page(results.found, results.folder)


def _counted(ended: int, jobs: int) -> str:
    return f"[{ended:{len(str(jobs))}}/{jobs}]"


def _said(outcome: Outcome, dropped: list[Job]) -> str:
    if outcome.failure is None:
        return f"done in {outcome.seconds:.0f} s"
    left = f"; left out after it: {', '.join(dict.fromkeys(job.stage for job in dropped))}" if dropped else ""
    return f"FAILED: {outcome.failure}{left}"
