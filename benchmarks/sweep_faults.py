"""Kills a worker, a node or the driver in the middle of a sweep; one rerun ends with the bytes of a sweep left alone.

    python benchmarks/sweep_faults.py [--kinds worker node driver] [--rounds 20] [--adapters 2] [--keep FOLDER]

Two nodes of one core, as processes of this machine. What is killed, and when, is drawn anew in each round.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import psutil
import sweep as benchmark
import sweep_adapters

_NODES = 2


def main() -> None:
    options = _options()
    with harness.workspace(options.keep) as folder:
        if not (folder / "base").is_dir():
            checkpoint = benchmark.ROOT / "recipes" / "shapes-captioner" / "checkpoint"
            sweep_adapters.main(checkpoint, folder, options.adapters)
        benchmark.write_sweep(folder, options.adapters, ["q8"], real=False)
        file = folder / f"sweep-{options.adapters}.yaml"
        alone = folder / "alone"
        with benchmark.cluster(_NODES) as made:
            started = time.monotonic()
            status = _driver(file, alone, made).wait()
            seconds = time.monotonic() - started
            assert status == 0, "the sweep that is left alone fails"
        expected = benchmark.repos(alone)
        harness.progress(f"left alone: {seconds:.0f} s, {len(expected)} repos")
        rows = [
            _round(file, alone, seconds, expected, kind, number)
            for number in range(options.rounds)
            for kind in options.kinds
        ]
        harness.report("sweep_faults", rows, adapters=options.adapters)


def _round(file: Path, alone: Path, seconds: float, expected: object, kind: str, number: int) -> harness.Row:
    work = alone.with_name(f"{kind}-{number}")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(alone / ".graphs", work / ".graphs")
    delay = random.Random(f"{kind} {number}").uniform(0.15, 0.85) * seconds
    with benchmark.cluster(_NODES) as made:
        driver = _driver(file, work, made)
        time.sleep(delay)
        ended = driver.poll() is not None
        killed = {"worker": _kill_worker, "node": _kill_node, "driver": _kill_driver}[kind](made, driver)
        first = driver.wait()
        whole = first == 0 and benchmark.repos(work) == expected
        second = _driver(file, work, made).wait()
    same = second == 0 and benchmark.repos(work) == expected
    row = {
        "round": number,
        "killed": f"{killed}, too late" if ended else killed,
        "after, s": delay,
        "status": first,
        "whole without a rerun": whole,
        "same bytes": same,
    }
    harness.progress(str(row))
    if same:
        shutil.rmtree(work)
    return row


def _driver(file: Path, work: Path, cluster: Any) -> subprocess.Popen[bytes]:
    """The command, in a process of its own."""
    command = [sys.executable, "-m", "vlm_export", "sweep", str(file), "--work", str(work), "--address"]
    with work.with_name(f"{work.name}.log").open("ab") as log:
        return subprocess.Popen([*command, cluster.address], stdout=log, stderr=log)


def _kill_worker(cluster: Any, driver: subprocess.Popen[bytes]) -> str:
    """A process that does a job, else one that waits for one."""
    workers = [
        (name, each)
        for each in psutil.Process().children(recursive=True)
        if (name := _command(each)).startswith("ray::") and "Agent" not in name
    ]
    busy = [(name, each) for name, each in workers if "IDLE" not in name]
    name, chosen = random.choice(busy or workers)
    chosen.send_signal(signal.SIGKILL)
    return f"worker {name}"


def _command(process: psutil.Process) -> str:
    """What it runs; nothing of one that has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _kill_node(cluster: Any, driver: subprocess.Popen[bytes]) -> str:
    """The node that the driver is not at."""
    node = next(each for each in cluster.list_all_nodes() if each is not cluster.head_node)
    cluster.remove_node(node, allow_graceful=False)
    return "node"


def _kill_driver(cluster: Any, driver: subprocess.Popen[bytes]) -> str:
    os.kill(driver.pid, signal.SIGKILL)
    return "driver"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kinds", nargs="+", choices=["worker", "node", "driver"], default=["worker", "node", "driver"]
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--adapters", type=int, default=2)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep everything here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
