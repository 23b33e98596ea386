"""A sweep on three Ray nodes, on one of which the disk is full; then that node is gone, and the same command again.

    python benchmarks/sweep_full_disk.py [--adapters 4] [--room 64k 400k] [--keep FOLDER]

Needs Linux, and root: the node runs in a mount namespace of its own, where the sweep's folder is an overlay whose upper
side is a tmpfs of so much room. Each of its cells must fail with one line that says so, every other must pass, and the
rerun must end with the bytes of a sweep that was left alone.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import sweep as benchmark
import sweep_adapters
import sweep_faults

from vlm_export.files import read_json
from vlm_export.sweep.results import JSON

_NO_ROOM = ("No space left on device", "of disk, and")  # what the system says, and what an export says before it begins
_START_SECONDS = 60.0


def main() -> None:
    options = _options()
    with harness.workspace(options.keep) as folder:
        if not (folder / "base").is_dir():
            checkpoint = benchmark.ROOT / "recipes" / "shapes-captioner" / "checkpoint"
            sweep_adapters.main(checkpoint, folder, options.adapters)
        benchmark.write_sweep(folder, options.adapters, ["q8"], real=False)
        with benchmark.cluster(2) as made:
            place = sweep_faults.Place(
                made, folder / f"sweep-{options.adapters}.yaml", folder / "alone", options.adapters
            )
            assert sweep_faults.swept(place, place.alone) == 0, "the sweep that is left alone fails"
            expected = benchmark.repos(place.alone)
            rows = [_row(place, folder / f"room-{room}", room, expected) for room in options.room]
        harness.report("sweep_full_disk", rows, adapters=options.adapters)


def _row(place: sweep_faults.Place, work: Path, room: str, expected: sweep_faults.Repos) -> harness.Row:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    shutil.copytree(place.alone / ".graphs", work / ".graphs")
    with _full_node(place.cluster, work, room):
        first = sweep_faults.swept(place, work)
    cells = read_json(work / JSON)["cells"]
    lines = [cell["failure"] for cell in cells if cell["status"] == "failed"]
    assert all("\n" not in line and any(each in line for each in _NO_ROOM) for line in lines), lines
    passed = sum(cell["status"] == "pass" for cell in cells)
    assert passed + len(lines) == len(cells) and first == (1 if lines else 0), cells
    second = sweep_faults.swept(place, work)
    same = second == 0 and benchmark.repos(work) == expected
    assert same, work
    row = {"room": room, "cells": len(cells), "passed": passed, "failed": len(lines), "same bytes after a rerun": same}
    harness.progress(f"{row} {lines}")
    shutil.rmtree(work)
    return row


@contextmanager
def _full_node(cluster: Any, work: Path, room: str) -> Iterator[None]:
    """Within, the cluster has a third node, which has so much room in the sweep's folder."""
    upper = shlex.quote(str(work.with_name(f".{work.name}-upper")))
    target = shlex.quote(str(work))
    mounted = (
        f"mkdir -p {upper} && mount -t tmpfs -o size={room} tmpfs {upper} && mkdir {upper}/up {upper}/work && "
        f"mount -t overlay overlay -o lowerdir={target},upperdir={upper}/up,workdir={upper}/work {target}"
    )
    resources = benchmark.NODE
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={cluster.address}"]
    start += [f"--num-cpus={resources['num_cpus']}", f"--memory={resources['memory']}"]
    start += [f"--object-store-memory={resources['object_store_memory']}"]
    log = work.with_name(f"{work.name}-node.log").open("wb")
    command = ["unshare", "--mount", "sh", "-c", f"{mounted} && exec {shlex.join(start)}"]
    node = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
    try:
        _wait_for_nodes(cluster, 3, node)
        yield
    finally:
        sweep_faults.kill_tree(node.pid)
        node.wait()
        log.close()
        _wait_for_nodes(cluster, 2)


def _wait_for_nodes(cluster: Any, count: int, node: subprocess.Popen[bytes] | None = None) -> None:
    ends = time.monotonic() + _START_SECONDS
    while sum(each["Alive"] for each in cluster.global_state.node_table()) != count:
        assert node is None or node.poll() is None, "the node did not start: are you root, on Linux?"
        assert time.monotonic() < ends, f"the cluster has other than {count} nodes after a minute"
        time.sleep(0.2)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--room", nargs="+", default=["64k", "400k"], help="of the full disk, as tmpfs takes it")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep everything here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
