"""Does one job, in the process that it is called in: what is done and unchanged is not done again."""

from __future__ import annotations

import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from vlm_export.atomic import atomic_folder, write_text
from vlm_export.documents import load_document
from vlm_export.errors import InputError, VlmExportError, one_line, reason, refused
from vlm_export.files import Digests, digests_kept
from vlm_export.machine import threads_at_most
from vlm_export.manifest import Manifest
from vlm_export.recipe import RecipeFile, load_recipe
from vlm_export.start.stages import Options, Stages
from vlm_export.sweep.jobs import Job, Outcome, StageName
from vlm_export.verify.report import DtypeRow

_GRAPHS = "VLM_EXPORT_STRUCTURES"
_DIGESTS: Digests = {}  # of this process: a base is hashed for the first of its adapters


@dataclass
class _Run:
    """A job that is being done, and what it tells."""

    job: Job
    recipe: RecipeFile
    warnings: list[str] = field(default_factory=list)
    failed_checks: str | None = None
    table: Sequence[DtypeRow] = ()

    def progress(self, what: str, done: int, total: int) -> None:
        """Nothing: a job is told when it ends."""

    def notify(self, line: str) -> None:
        """Keep a line that is a warning."""
        if line.startswith("warning: ") and line not in self.warnings:
            self.warnings.append(line.removeprefix("warning: "))


def run(job: Job) -> Outcome:
    """Do a job. What goes wrong is its outcome, and never raised; of what should not, the traceback is in a file."""
    began, cpu = time.monotonic(), time.process_time()
    found: _Run | None = None
    failure = None
    changed = True
    try:
        _check_release(job)
        found = _Run(job, load_recipe(job.recipe))
        with _graphs_in(job.graphs), digests_kept(_DIGESTS), job.work.alone():
            changed = _STAGES[job.stage](found)
    except VlmExportError as error:
        failure = str(error)
    except OSError as error:
        failure = refused(error)
    except Exception as error:
        failure = f"{job.stage}: {type(error).__name__}: {reason(error)}{_told(job)}"
    return Outcome(
        status="failed" if failure else "done" if changed else "unchanged",
        failure=one_line(said) if (said := failure or (found and found.failed_checks)) else None,
        seconds=time.monotonic() - began,
        cpu_seconds=time.process_time() - cpu,
        peak_bytes=_peak_bytes(),
        node=platform.node(),
        warnings=tuple(found.warnings) if found else (),
        table=found.table if found else (),
    )


def _check_release(job: Job) -> None:
    """Raises InputError where this machine has another version of the package than the plan's."""
    if (here := version("vlm-export")) != job.release:
        raise InputError(
            f"{platform.node()}: has vlm-export {here}, and the sweep is run by {job.release}: install that"
        )


@contextmanager
def _graphs_in(folder: Path) -> Iterator[None]:
    """Within, traced graphs are looked for and kept in a folder."""
    before = os.environ.get(_GRAPHS)
    os.environ[_GRAPHS] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_GRAPHS]
        else:
            os.environ[_GRAPHS] = before


def _told(job: Job) -> str:
    """Write the traceback of what should not happen, and say where; nothing where the disk is full."""
    path = job.work.root / f"{job.stage}-failure.txt"
    with suppress(OSError):
        write_text(path, traceback.format_exc())
        return f": see {path}"
    return ""


def _peak_bytes() -> int:
    from vlm_export.measure.bench import peak_memory_bytes

    return peak_memory_bytes()


def _golden(run: _Run) -> bool:
    from vlm_export import pipeline

    stages = Stages(run.recipe, run.job.work, Options())
    with threads_at_most(run.job.threads):
        made = stages.run("golden", lambda: pipeline.run_golden(run.recipe, run.progress), run.notify, again=False)
    return made is not None


def _merge(run: _Run) -> bool:
    from vlm_export import pipeline
    from vlm_export.merging.merge import MergeReport

    work = run.job.work
    stages = Stages(run.recipe, work, Options())
    with threads_at_most(run.job.threads):
        made = stages.run("merge", lambda: pipeline.run_merge(run.recipe, work, run.progress), run.notify, again=False)
    run.warnings += (made or load_document(work.merge_report, MergeReport, "merge again")).warnings
    return made is not None


def _onnx(run: _Run) -> bool:
    from vlm_export import pipeline

    work, layout = run.job.work, run.job.layout
    if work != run.job.merged:
        link_folder(run.job.merged.merged, work.merged)

    def export() -> Manifest:
        return pipeline.run_export(run.recipe, work, run.progress, layout=layout, notify=run.notify)

    with threads_at_most(run.job.threads):
        made = Stages(run.recipe, work, Options(layout=layout)).run("onnx", export, run.notify, again=False)
    return made is not None


def link_folder(source: Path, target: Path) -> None:
    """Make `target` a folder of the same files, without a second copy of them where the file system can."""
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    if all((target / name).is_file() and (target / name).samefile(source / name) for name in files):
        return
    with atomic_folder(target) as folder:
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source / name, folder / name)
            except OSError:
                (folder / name).write_bytes((source / name).read_bytes())


def _verify(run: _Run) -> bool:
    from vlm_export import pipeline
    from vlm_export.commands import Commands
    from vlm_export.manifest import load_manifest
    from vlm_export.verify.causes import explain

    job = run.job
    with threads_at_most(job.threads):
        report = pipeline.run_verify(run.recipe, job.work, run.progress, runtimes=job.runtimes or None, reusing=True)
    if report.verdict != "pass":
        mixed = load_manifest(job.work.repo).mixed
        said = [each.strip() for each in explain(report, Commands.of(run.recipe, job.work), mixed)]
        failed = ", ".join(report.failed_dtypes)
        run.failed_checks = f"verify: {len(report.failures)} checks of {failed} failed: {'; '.join(said[:1])}"
    run.table = report.table
    return len(report.reused) < len(report.fingerprints)


def _bench(run: _Run) -> bool:
    from dataclasses import asdict

    from vlm_export import pipeline
    from vlm_export.measure import bench
    from vlm_export.publish.findings import load_benchmark, read_report

    job = run.job
    assert job.bench is not None
    earlier = load_benchmark(job.work)
    measured = {(row.runtime, row.threads) for row in earlier.rows} if earlier else set()
    wanted = {(runtime, job.threads) for runtime in job.bench.runtimes}
    asked = (job.bench.rounds, job.bench.new_tokens)
    holds = earlier and not earlier.failures and (earlier.rounds, earlier.new_tokens) == asked and measured == wanted
    if not holds:
        found = bench.bench(
            job.work.repo,
            bench.images_of(run.recipe),
            runtimes=job.bench.runtimes,
            new_tokens=job.bench.new_tokens,
            rounds=job.bench.rounds,
            threads=job.threads,
        )
        pipeline.run_card(run.recipe, job.work, asdict(found))
    report = read_report(job.work)
    run.table = report.table if report else ()
    return not holds


def _store(run: _Run) -> bool:
    from vlm_export.publish.findings import read_report
    from vlm_export.sweep.storage import Storage, files_of

    job = run.job
    assert job.output is not None
    report = read_report(job.work)
    passed = report is not None and report.verdict == "pass"
    sent = Storage(job.output).store(job.work.root, files_of(job.work, passed), f"{job.cell}/{job.layout}")
    # A report says of each run what it took over from the last one, and is another one by that alone.
    return any((job.work.root / name).is_relative_to(job.work.repo) for name in sent)


def _push(run: _Run) -> bool:
    from vlm_export.publish import gate

    assert run.job.push is not None
    to = gate.Destination(run.job.push.repo_of(run.job.cell, run.job.layout), private=run.job.push.private)
    plan = gate.run_plan(run.recipe, run.job.work, to)
    if all(change.action == "same" for change in plan.changes):
        return False
    gate.run_push(run.recipe, run.job.work, to)
    return True


_STAGES: Mapping[StageName, Callable[[_Run], bool]] = {
    "golden": _golden,
    "merge": _merge,
    "onnx": _onnx,
    "verify": _verify,
    "bench": _bench,
    "store": _store,
    "push": _push,
}
