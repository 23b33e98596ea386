"""Has jobs done one after the other, in this process: libraries are loaded once, and no more than one is at work."""

from __future__ import annotations

from vlm_export.sweep.jobs import Job, Outcome
from vlm_export.sweep.stages import run


class InProcess:
    """Does a job when its outcome is asked for."""

    slots = 1

    def __init__(self) -> None:
        self._begun: list[Job] = []

    def begin(self, job: Job) -> None:
        """Take a job."""
        self._begun.append(job)

    def next(self) -> tuple[Job, Outcome]:
        """Do the job that was taken first."""
        job = self._begun.pop(0)
        return job, run(job)
