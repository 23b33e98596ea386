"""Kills a driver, a worker or a node that is at work on a sweep; one rerun ends with the bytes of one left alone.

    python benchmarks/sweep_faults.py [--kinds driver worker node] [--kills 20] [--adapters 2] [--keep FOLDER]

Two nodes of one core, as processes of this machine. The kinds take turns. In each round it is drawn after how many
stages, and how much later, the kill comes: at the first moment at which what is killed is at work, of a worker or a
node by the name of its stage. A round whose sweep has ended by then is not counted: it is drawn again. Every fourth
begins without traced graphs. With `--keep` rounds that were counted are kept, and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import psutil
import sweep as benchmark
import sweep_adapters

from vlm_export.files import write_json
from vlm_export.sweep.jobs import STAGES

_NODES = 2
_DTYPES = ("q8",)
_STAGES_EACH = 4  # golden, merge, onnx and verify
_SECONDS = 1.5  # within which a kill is drawn, after the stage that it waits for
_TRACES = 4  # one round of so many traces
Repos = dict[str, dict[str, str]]  # by path, the hashes of files
_DRAWS = 100  # of one round, after which the sweeps are too short to be hit


@dataclass(frozen=True)
class Kill:
    """What was killed, and at which stage it was; of a driver one that was done for it."""

    what: str
    at_work: str


@dataclass
class Place:
    """The cluster, the sweep, and the folder of one that is left alone."""

    cluster: Any
    file: Path
    alone: Path
    adapters: int


def main() -> None:
    options = _options()
    with harness.workspace(options.keep) as folder:
        if not (folder / "base").is_dir():
            checkpoint = benchmark.ROOT / "recipes" / "shapes-captioner" / "checkpoint"
            sweep_adapters.main(checkpoint, folder, options.adapters)
        benchmark.write_sweep(folder, options.adapters, _DTYPES, real=False)
        counted = folder / "kills.json"
        rows: list[harness.Row] = json.loads(counted.read_text()) if counted.is_file() else []
        with benchmark.cluster(_NODES) as made:
            place = Place(made, folder / f"sweep-{options.adapters}.yaml", folder / "alone", options.adapters)
            assert swept(place, place.alone) == 0, "the sweep that is left alone fails"
            expected = benchmark.repos(place.alone)
            for number in range(len(rows), options.kills):
                kind = options.kinds[number % len(options.kinds)]
                rows.append(_round(place, expected, kind, number))
                harness.progress(str(rows[-1]))
                write_json(counted, rows)
        harness.report("sweep_faults", rows, adapters=options.adapters)
        whole = sum(row["same bytes"] for row in rows)
        harness.progress(f"{whole} of {len(rows)} kills ended with the same bytes after one rerun")
    sys.exit(whole < len(rows))


def _round(place: Place, expected: Repos, kind: str, number: int) -> harness.Row:
    """The first draw whose kill hits a sweep that is at work."""
    for draw in range(_DRAWS):
        drawn = random.Random(f"{kind} {number} {draw}")
        row = _drawn(place, expected, kind, number, drawn)
        if row is not None:
            return {"round": number, **row, "draws": draw + 1}
    raise AssertionError(f"round {number}: in {_DRAWS} draws no {kind} was at work")


def _drawn(place: Place, expected: Repos, kind: str, number: int, drawn: random.Random) -> harness.Row | None:
    """A sweep from nothing, the kill and one rerun; None where the sweep ended before the kill."""
    work = place.alone.with_name(f"{kind}-{number}")
    shutil.rmtree(work, ignore_errors=True)
    work.with_name(f"{work.name}.log").unlink(missing_ok=True)
    if number % _TRACES:
        shutil.copytree(place.alone / ".graphs", work / ".graphs")
    after = drawn.randrange(place.adapters * _STAGES_EACH)
    later = drawn.uniform(0, _SECONDS)
    with _driver(place, work) as driver:
        killed = _kill(place, kind, driver, work, after, later, drawn)
        if killed is None:
            return None
        first = driver.wait()
    _whole_cluster(place.cluster)
    whole = first == 0 and benchmark.repos(work) == expected
    second = swept(place, work)
    same = second == 0 and benchmark.repos(work) == expected
    if same:
        shutil.rmtree(work)
    return {
        "killed": killed.what,
        "at work": killed.at_work,
        "stages ended": after,
        "status": first,
        "whole without a rerun": whole,
        "same bytes": same,
    }


def _kill(
    place: Place, kind: str, driver: subprocess.Popen[bytes], work: Path, after: int, later: float, drawn: random.Random
) -> Kill | None:
    """Kill when `after` stages have ended, `later` seconds after that, and what is killed is at work."""
    while driver.poll() is None and _ended(work) < after:
        time.sleep(0.05)
    time.sleep(later)
    found: list[tuple[psutil.Process, str]] = []
    while driver.poll() is None:
        if found := _at_work(place, kind):
            process, stage = drawn.choice(found)
            if _KILLS[kind](place, driver, process):
                return Kill(kind, stage)
        time.sleep(0.02)
    return None


def _ended(work: Path) -> int:
    """How many stages the driver has told of."""
    log = work.with_name(f"{work.name}.log")
    return sum(line.startswith(b"[") for line in log.read_bytes().splitlines())


def _at_work(place: Place, kind: str) -> list[tuple[psutil.Process, str]]:
    """Workers that do a stage, each with its name; of kind node those of the node that would be killed."""
    top = psutil.Process()
    if kind == "node":
        top = psutil.Process(_other_node(place.cluster).all_processes["raylet"][0].process.pid)
    named = [(each, _command(each)) for each in top.children(recursive=True)]
    return [
        (each, stage)
        for each, name in named
        for stage in STAGES
        if name.startswith("ray::") and name.endswith(f": {stage}")
    ]


def _command(process: psutil.Process) -> str:
    """What it runs; nothing of one that has ended."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.NoSuchProcess:
        return ""


def _kill_driver(place: Place, driver: subprocess.Popen[bytes], worker: psutil.Process) -> bool:
    if driver.poll() is not None:
        return False
    os.kill(driver.pid, signal.SIGKILL)
    return driver.wait() == -signal.SIGKILL


def _kill_worker(place: Place, driver: subprocess.Popen[bytes], worker: psutil.Process) -> bool:
    """Stopped first, so that it cannot end its stage between a look at it and its death."""
    try:
        name = _command(worker)
        worker.suspend()
        if _command(worker) != name or name.endswith("IDLE"):
            worker.resume()
            return False
        worker.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def _kill_node(place: Place, driver: subprocess.Popen[bytes], worker: psutil.Process) -> bool:
    """All processes of the node that the driver is not at."""
    place.cluster.remove_node(_other_node(place.cluster), allow_graceful=False)
    return True


_KILLS: dict[str, Callable[[Place, subprocess.Popen[bytes], psutil.Process], bool]] = {
    "driver": _kill_driver,
    "worker": _kill_worker,
    "node": _kill_node,
}


def _other_node(cluster: Any) -> Any:
    """The one that is not the head."""
    [node] = cluster.worker_nodes
    return node


def _whole_cluster(cluster: Any) -> None:
    """A node in place of one that was killed."""
    if not cluster.worker_nodes:
        cluster.add_node(**benchmark.NODE)


def swept(place: Place, work: Path) -> int:
    """The status of a sweep that is left alone."""
    with _driver(place, work) as driver:
        return driver.wait()


def kill_tree(pid: int) -> None:
    """Kill a process and all that it started."""
    top = psutil.Process(pid)
    for each in (*top.children(recursive=True), top):
        with suppress(psutil.NoSuchProcess):
            each.kill()


@contextmanager
def _driver(place: Place, work: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command, in a process of its own that does not outlive the block."""
    command = [sys.executable, "-m", "vlm_export", "sweep", str(place.file), "--work", str(work), "--address"]
    with work.with_name(f"{work.name}.log").open("ab") as log:
        driver = subprocess.Popen([*command, place.cluster.address], stdout=log, stderr=log)
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(_KILLS), default=list(_KILLS))
    parser.add_argument("--kills", type=int, default=20, help="of work, in all (%(default)s)")
    parser.add_argument("--adapters", type=int, default=2)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep everything here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
