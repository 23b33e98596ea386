"""A job: one stage of one cell, as plain values that any process on any machine can take; and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlm_export.contract import LayoutName
from vlm_export.files import Work
from vlm_export.sweep.sweep_file import BenchChoice, PushChoice
from vlm_export.targets import Target
from vlm_export.verify.report import DtypeRow

StageName = Literal["golden", "merge", "onnx", "verify", "bench", "store", "push"]
STAGES: tuple[StageName, ...] = ("golden", "merge", "onnx", "verify", "bench", "store", "push")


@dataclass(frozen=True)
class Need:
    """What a job takes: bytes resident at the most, and seconds of one core, as far as that is known."""

    memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class Job:
    """One stage.

    Attributes:
        cell: the name of the recipe with its adapter.
        layout: that of the repo; of golden and merge, which all layouts share, the first.
        recipe: the recipe's file.
        merged: the work folder that the cell was merged in.
        runtimes: where to verify; none leaves it to `verify`.
        output: where the repo is copied to, a URL or an absolute path.
        graphs: the folder in which traced graphs are kept.
        architecture: of an `onnx` what it traces, once for all jobs that have the same; None of other stages.
        threads: of PyTorch.
        release: the package's, which every machine must have.
        need: what it takes.
    """

    stage: StageName
    cell: str
    layout: LayoutName
    recipe: Path
    work: Work
    merged: Work
    runtimes: tuple[Target, ...]
    bench: BenchChoice | None
    push: PushChoice | None
    output: str | None
    graphs: Path
    architecture: str | None
    threads: int
    release: str
    need: Need

    @property
    def title(self) -> str:
        """As progress calls it."""
        return f"{self.cell} {self.layout}: {self.stage}"


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Attributes:
        status: done, unchanged (it was done before, of the same), or failed; of one that was never begun, since one
            before it failed, there is no outcome.
        failure: one line that says why; of a `verify` that was done, which checks failed.
        seconds, cpu_seconds: of the job, without loading libraries.
        peak_bytes: the most that its process held so far.
        node: the name of the machine.
        warnings: what its user is told.
        table: of `verify` and `bench`, a row for each dtype.
    """

    status: Literal["done", "unchanged", "failed"]
    failure: str | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    node: str = ""
    warnings: Sequence[str] = ()
    table: Sequence[DtypeRow] = ()
