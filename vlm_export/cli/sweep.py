"""The command that does many at once: sweep."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlm_export.cli.options import output_options
from vlm_export.cli.output import notify, print_result

if TYPE_CHECKING:
    from vlm_export.sweep.sweep import Engine


@click.command()
@click.argument("sweep_file", metavar="SWEEP", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Tell the plan, with time, memory and disk; do nothing.")
@click.option("--address", metavar="ADDRESS", help="Of a Ray cluster, or `auto`; else Ray on this machine.")
@click.option("--in-process", is_flag=True, help="One stage after the other in this process, without Ray.")
@click.option(
    "--threads", type=click.IntRange(1, 1024), default=1, show_default=True, help="Cores that a stage is given."
)
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder, in place of build/<sweep name>; of a cluster one that all machines share.",
)
@output_options
def sweep(
    sweep_file: Path,
    dry_run: bool,
    address: str | None,
    in_process: bool,
    threads: int,
    work: Path | None,
    as_json: bool,
) -> None:
    """Convert many adapters of a base at once, in many dtypes and layouts.

    SWEEP is a YAML file: recipes, adapters (a list, folders, an author's on the Hub), layouts, dtypes. Each recipe with
    each adapter goes through golden, merge, onnx and verify, and bench and push where the file says so; an architecture
    is traced once. Ray has the stages done, `pip install 'vlm-export[sweep]'`. What fails ends its own repo alone. What
    is done and unchanged is not done again, so that the same command goes on after a break. What came of it is one
    table, in sweep.json, sweep.csv and index.html. Where the file names an output, say s3://bucket/prefix, what is
    finished is copied there.

    Exit status 1 says that something failed.

    \b
    Example: vlm-export sweep captioners.yaml --dry-run
             vlm-export sweep captioners.yaml
             vlm-export sweep captioners.yaml --address 10.0.0.5:6379 --work /shared/captioners
    """
    from vlm_export.errors import InputError
    from vlm_export.files import graph_cache_folder
    from vlm_export.sweep import plan as plans
    from vlm_export.sweep.sweep_file import load_sweep

    if address is not None and in_process:
        raise InputError("--address and --in-process: one is on a cluster, the other is not; drop one")
    file = load_sweep(sweep_file)
    folder = work or Path("build") / file.sweep.name
    graphs = folder / ".graphs" if address else graph_cache_folder()  # a cache that all machines see
    plan = plans.plan(file, folder, graphs, threads, notify)
    told = plans.lines(plan)
    if dry_run:
        print_result(as_json, plans.as_json(plan), [*told, "nothing was done"])
        return
    for line in told:
        notify(line)
    from vlm_export.sweep.results import JSON
    from vlm_export.sweep.sweep import sweep as run

    try:
        with _engine(address, threads, in_process) as engine:
            result = run(plan, engine, notify)
    except KeyboardInterrupt:
        notify(f"{folder}: what is done is kept; the same command goes on from there")
        raise
    print_result(as_json, asdict(result) | {"path": str(folder / JSON)}, _lines(result, folder, file.output))
    if not result.passed:
        click.get_current_context().exit(1)


def _engine(address: str | None, threads: int, in_process: bool) -> AbstractContextManager[Engine]:
    if in_process:
        from vlm_export.sweep.in_process import InProcess

        return nullcontext(InProcess())
    from vlm_export.sweep.on_ray import on_ray

    return on_ray(address, threads)


def _lines(result: Any, folder: Path, output: str | None) -> list[str]:
    """What failed and why, how many did not, and where the table is."""
    from vlm_export.publish.findings import PAGE

    failed = [cell for cell in result.cells if cell.failure]
    passed = sum(cell.status == "pass" for cell in result.cells)
    return [
        *(f"FAILED {cell.cell} {cell.layout}: {cell.failure}" for cell in failed),
        f"{passed} of {len(result.cells)} repos pass every check",
        f"table   {folder / PAGE}",
        *([f"copied  {output}"] if output else []),
    ]
