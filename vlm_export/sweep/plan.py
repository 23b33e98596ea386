"""The jobs of a sweep, and what they take: time, memory, disk. Nothing is read but headers and settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlm_export import hub, ready
from vlm_export.contract import LayoutName
from vlm_export.errors import InputError
from vlm_export.files import Work
from vlm_export.machine import free_disk
from vlm_export.quantize.estimate import Estimate
from vlm_export.start.figures import columns, size
from vlm_export.start.inspection import Checkpoint
from vlm_export.start.plan import model_of
from vlm_export.start.timing import Times, about, times
from vlm_export.sweep.cells import Adapted, adapted
from vlm_export.sweep.jobs import Job, Need, StageName
from vlm_export.sweep.storage import Storage
from vlm_export.sweep.sweep_file import Sweep, SweepFile
from vlm_export.targets import UNASKED, Target
from vlm_export.wanted import Wanted, parse

_LIBRARIES_BYTES = 700 << 20  # torch and transformers, as `quantize.estimate` has it
_UNKNOWN = Need(2 << 30, 60.0)  # of a model whose own code says what it is
_BENCH_SECONDS = 5.0  # a dtype's round in one runtime: starting, warming up and measuring
_SEND = Need(_LIBRARIES_BYTES, 10.0)


@dataclass(frozen=True)
class Plan:
    """What a sweep will do.

    Attributes:
        file: the sweep.
        folder: where everything of it lies.
        cells: recipes with their adapters.
        jobs: of all cells, in the order of stages.
        disk_bytes: of all that is written, as far as that is known.
    """

    file: SweepFile
    folder: Path
    cells: tuple[Adapted, ...]
    jobs: tuple[Job, ...]
    disk_bytes: int

    @property
    def seconds(self) -> float:
        """Of one core, for all of it."""
        return sum(job.need.seconds for job in self.jobs)

    @property
    def memory_bytes(self) -> int:
        """Of the job that takes the most."""
        return max(job.need.memory_bytes for job in self.jobs)


@dataclass(frozen=True)
class _Facts:
    """What is known of the model of one recipe of the sweep; None where its own code says what it is."""

    model: Checkpoint | None
    images: int


def plan(file: SweepFile, folder: Path, graphs: Path, threads: int, notify: Callable[[str], None]) -> Plan:
    """The jobs of a sweep; nothing is written.

    Args:
        file: the sweep.
        folder: where everything of it is written.
        graphs: where all machines keep what is traced.
        threads: of a job.
        notify: is told of what is fetched.

    Raises:
        InputError: what can be told before: a recipe, an adapter or a layout that is not there, no token to push
            with, or no package that writes to the output.
    """
    cells = adapted(file, folder)
    if file.sweep.push is not None and not hub.has_token():
        raise InputError(f"{file.path}: push: no Hugging Face token to push with: {hub.LOGIN}")
    if file.output is not None:
        Storage(file.output)
    facts: dict[str, _Facts] = {}
    jobs: list[Job] = []
    disk = 0
    for cell in cells:
        ready.for_golden(cell.recipe)
        if cell.of not in facts:
            facts[cell.of] = _Facts(model_of(cell.recipe, notify), len(ready.images(cell.recipe)))
        known = facts[cell.of]
        _check_layouts(file, cell, known)
        jobs += _jobs(cell, file, graphs.absolute(), known, threads)
        disk += _disk(cell, known)
    return Plan(file, folder, tuple(cells), tuple(jobs), disk)


def lines(made: Plan) -> list[str]:
    """The plan for people: what a cell takes, by stage, and all of them."""
    count, repos = len(made.cells), sum(len(cell.layouts) for cell in made.cells)
    by_stage: dict[StageName, list[Need]] = {}
    for job in made.jobs:
        by_stage.setdefault(job.stage, []).append(job.need)
    rows = [
        ("stage", "jobs", "time of one core", "memory of one"),
        *(
            (
                stage,
                str(len(needs)),
                about(sum(need.seconds for need in needs)),
                size(max(need.memory_bytes for need in needs)),
            )
            for stage, needs in by_stage.items()
        ),
    ]
    free = free_disk(next(each for each in (made.folder.absolute(), *made.folder.absolute().parents) if each.is_dir()))
    return [
        f"{made.file.sweep.name}: {count} adapted models, {repos} repos, in {made.folder}:",
        *(f"  {line}" for line in columns(rows)),
        f"in all {about(made.seconds)} of one core, and tracing once; {size(made.disk_bytes)} of disk, "
        f"{size(free)} are free",
    ]


def _jobs(cell: Adapted, file: SweepFile, graphs: Path, facts: _Facts, threads: int) -> Iterator[Job]:
    sweep, first = file.sweep, cell.layouts[0]
    for layout in cell.layouts:
        needs = _needs(cell, layout, sweep, facts)
        for stage, need in needs.items():
            if stage in ("golden", "merge") and layout != first:
                continue
            yield Job(
                stage=stage,
                cell=cell.name,
                layout=layout,
                recipe=cell.recipe.path.absolute(),
                work=Work(cell.work(layout).root.absolute()),
                merged=Work(cell.work(first).root.absolute()),
                runtimes=sweep.runtimes,
                bench=sweep.bench,
                push=sweep.push,
                output=file.output,
                graphs=graphs,
                architecture=f"{cell.of} {layout}" if stage == "onnx" else None,
                threads=threads,
                release=version("vlm-export"),
                need=need,
            )


def _wanted(cell: Adapted) -> Wanted:
    return parse(cell.recipe.recipe.dtypes, f"{cell.recipe.path}: dtypes")


def _check_layouts(file: SweepFile, cell: Adapted, facts: _Facts) -> None:
    """Raises InputError for a layout that the cell's family does not have."""
    for layout in cell.layouts:
        if facts.model is not None and layout not in facts.model.layouts:
            where = f"{file.path}: layouts: {cell.of}" if file.sweep.layouts else cell.of
            known = ", ".join(facts.model.layouts)
            raise InputError(f"{where}: {facts.model.model_type} has no layout {layout!r}; it has {known}")


def _expected(cell: Adapted, layout: LayoutName, model: Checkpoint) -> Estimate | None:
    return model.expected(layout, _wanted(cell))


def _needs(cell: Adapted, layout: LayoutName, sweep: Sweep, facts: _Facts) -> dict[StageName, Need]:
    """What each stage of a cell takes, in the order of stages."""
    model = facts.model
    expected = _expected(cell, layout, model) if model is not None else None
    runtimes = sweep.runtimes or _unasked(layout)
    found: dict[StageName, Need] = {}
    if model is None or expected is None:
        found |= {"golden": _UNKNOWN, "merge": _UNKNOWN, "onnx": _UNKNOWN, "verify": _UNKNOWN}
        files = len(_wanted(cell).everywhere)
        largest = 0
    else:
        dtypes = list(dict.fromkeys(file.dtype for file in expected.files))
        files = len(dtypes)
        float32 = 4 * model.parameters
        largest = max(sum(file.size_bytes for file in expected.files if file.dtype == dtype) for dtype in dtypes)
        largest_tensor = 4 * max((tensor.parameters for tensor in model.tensors), default=0)
        took: Times = times(model.parameters, facts.images, files, runtimes)
        memory = max(expected.memory_bytes, expected.calibration_memory_bytes)
        found["golden"] = Need(_LIBRARIES_BYTES + float32 + largest_tensor, took.golden)
        found["merge"] = Need(_LIBRARIES_BYTES + 4 * largest_tensor, took.merge)
        found["onnx"] = Need(memory, expected.seconds)
        found["verify"] = Need(_LIBRARIES_BYTES + 2 * largest, took.verify)
    if sweep.bench is not None:
        rounds = sweep.bench.rounds * len(sweep.bench.runtimes) * files
        found["bench"] = Need(_LIBRARIES_BYTES + 2 * largest, _BENCH_SECONDS * rounds)
    if sweep.output is not None:
        found["store"] = _SEND
    if sweep.push is not None:
        found["push"] = _SEND
    return found


def _unasked(layout: LayoutName) -> tuple[Target, ...]:
    """Where `verify` looks by itself."""
    return ("ort",) if layout == "components" else UNASKED


def _disk(cell: Adapted, facts: _Facts) -> int:
    """Bytes of what a cell writes; 0 where nothing is known."""
    if facts.model is None:
        return 0
    estimates = [_expected(cell, layout, facts.model) for layout in cell.layouts]
    return facts.model.merged_bytes + sum(each.disk_bytes for each in estimates if each is not None)


def as_json(made: Plan) -> dict[str, Any]:
    """The plan as one object."""
    return {
        "name": made.file.sweep.name,
        "path": str(made.folder),
        "output": made.file.output,
        "repos": [
            {"cell": cell.name, "adapter": cell.adapter, "layout": layout, "dtypes": list(_wanted(cell).everywhere)}
            for cell in made.cells
            for layout in cell.layouts
        ],
        "jobs": [{"stage": job.stage, "cell": job.cell, "layout": job.layout, **asdict(job.need)} for job in made.jobs],
        "seconds": made.seconds,
        "memory_bytes": made.memory_bytes,
        "disk_bytes": made.disk_bytes,
    }
