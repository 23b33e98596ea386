"""Which jobs may begin: those of a cell one after the other, and the first of an architecture alone, for it traces.

A failed job ends its cell and no other; of a repo that fails a check only the push is left out. Later stages come
first, so that cells are finished, not begun.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlm_export.sweep.jobs import STAGES, Job, Outcome, StageName

_OF_WHAT_PASSES: tuple[StageName, ...] = ("push",)


class Order:
    """The jobs that are left.

    `jobs` are those of all cells, each cell's in the order of its stages. Jobs of other layouts follow those that they
    share with the first.
    """

    def __init__(self, jobs: Sequence[Job]):
        self._waiting = {id(job): job for job in jobs}
        self._before = _before(jobs)
        self._ended: set[int] = set()
        self._traced: set[str] = set()
        self._tracing: dict[str, int] = {}

    def __bool__(self) -> bool:
        """Whether a job may still begin, now or later."""
        return bool(self._waiting)

    def take(self, most: int) -> list[Job]:
        """Jobs that may begin now, which are no longer left."""
        taken: list[Job] = []
        for job in sorted(self._waiting.values(), key=lambda job: -STAGES.index(job.stage)):
            if len(taken) == most:
                break
            before = self._before.get(id(job))
            if (before is None or before in self._ended) and self._may_trace(job):
                taken.append(self._waiting.pop(id(job)))
        return taken

    def end(self, job: Job, outcome: Outcome) -> list[Job]:
        """Note what came of a job that was taken. Returns those that will never begin."""
        self._ended.add(id(job))
        if job.architecture is not None:
            if outcome.status != "failed":
                self._traced.add(job.architecture)
            if self._tracing.get(job.architecture) == id(job):
                del self._tracing[job.architecture]
        if outcome.status == "failed":
            return self._drop(job)
        refused = job.stage == "verify" and outcome.failure is not None
        return self._drop(job, only=_OF_WHAT_PASSES) if refused else []

    def _may_trace(self, job: Job) -> bool:
        """Whether what the job traces was traced, or is traced by nobody, so that this one does."""
        architecture = job.architecture
        if architecture is None or architecture in self._traced:
            return True
        return self._tracing.setdefault(architecture, id(job)) == id(job)

    def _drop(self, failed: Job, only: Sequence[StageName] = STAGES) -> list[Job]:
        """Of the jobs behind one those of some stages, which are no longer left."""
        dropped = [job for job in self._behind(failed) if job.stage in only]
        for job in dropped:
            del self._waiting[id(job)]
        return dropped

    def _behind(self, failed: Job) -> list[Job]:
        found: list[Job] = []
        gone = {id(failed)}
        while new := [job for key, job in self._waiting.items() if self._before.get(key) in gone and key not in gone]:
            found += new
            gone |= {id(job) for job in new}
        return found


def _before(jobs: Sequence[Job]) -> dict[int, int]:
    """By a job's identity that of the job before it."""
    found: dict[int, int] = {}
    last: dict[tuple[str, str], Job] = {}
    merged: dict[str, Job] = {}
    for job in jobs:
        before = last.get((job.cell, job.layout)) or merged.get(job.cell)
        if before is not None:
            found[id(job)] = id(before)
        last[job.cell, job.layout] = job
        if job.stage == "merge":
            merged[job.cell] = job
    return found
