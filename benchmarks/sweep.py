"""What N adapters of one base take, in one process and on Ray clusters of this machine; are the repos the same bytes?

    python benchmarks/sweep.py [--adapters 1 4 16] [--nodes 1 2 4] [--dtypes int8 q8 q4] [--real]

Each node has one core. Seconds are of processors, which other work on the machine does not lengthen as it does those of
the clock. `stages` is what the stages took, without loading libraries; `all` is that of all processes; Ray's own are
those that do no stage: its servers, and the agents of each node. Unavoidable are N times the median golden, merge, onnx
and verify of an adapter whose architecture was traced, the first one's trace, and libraries loaded once for each core.
Bytes are what was read of the base, of tensors and to hash files: from the system's cache of it, but for the first
time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import psutil
import yaml

from vlm_export.files import file_hashes
from vlm_export.sweep import plan as plans
from vlm_export.sweep.in_process import InProcess
from vlm_export.sweep.on_ray import on_ray
from vlm_export.sweep.results import SweepResult
from vlm_export.sweep.sweep import Engine, sweep
from vlm_export.sweep.sweep_file import load_sweep

ROOT = Path(__file__).parents[1]
NODE: dict[str, Any] = {"num_cpus": 1, "memory": 4 << 30, "object_store_memory": 80 << 20}


def main() -> None:
    options = _options()
    with harness.workspace(options.keep) as folder:
        checkpoint = _real(folder) if options.real else ROOT / "recipes" / "shapes-captioner" / "checkpoint"
        most = max(options.adapters)
        if not (folder / "base").is_dir():
            import sweep_adapters  # and torch, which a process that hands stages to Ray does without

            sweep_adapters.main(checkpoint, folder, most)
        rows = []
        for count in options.adapters:
            write_sweep(folder, count, options.dtypes, options.real)
            for nodes in (0, *options.nodes):
                rows.append(_measured(folder, count, nodes))
                harness.progress(str(rows[-1]))
        _check_same(folder, options.adapters, options.nodes)
        loading = harness.in_new_process(_loading_seconds)
        stages = {row["adapters"]: row.pop("unavoidable") for row in rows if not row["nodes"]}
        for row in rows:
            unavoidable = stages[row["adapters"]] + max(1, row["nodes"]) * loading
            row["all / unavoidable"] = row["all, s"] / unavoidable
        harness.report("sweep", rows, dtypes=options.dtypes, real=options.real)


def write_sweep(folder: Path, count: int, dtypes: Sequence[str], real: bool) -> None:
    """The recipe and the sweep of the first `count` adapters, `sweep-COUNT.yaml`."""
    images = ROOT / "recipes" / "real-captioner" / "images" / "00*.png"
    recipe = {
        "name": "captioner",
        "model": "base",
        "golden": {"images": [str(images)]} if real else {"prompts": ["a large"]},
        "hub": {"license": "apache-2.0"},
    }
    (folder / "captioner.yaml").write_text(yaml.safe_dump(recipe))
    values = {
        "name": f"of-{count}",
        "recipes": ["captioner.yaml"],
        "adapters": [f"adapters/{number:02}" for number in range(count)],
        "dtypes": list(dtypes),
        "runtimes": ["ort"],
    }
    (folder / f"sweep-{count}.yaml").write_text(yaml.safe_dump(values))


def _measured(folder: Path, count: int, nodes: int) -> harness.Row:
    """A sweep in a process of its own, from nothing."""
    work = place(folder, count, nodes)
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(folder / "graphs", ignore_errors=True)
    return harness.in_new_process(_swept, folder, count, nodes)


def place(folder: Path, count: int, nodes: int) -> Path:
    """Where the repos of a sweep are."""
    return folder / f"{count}-adapters-{nodes}-nodes"


def _swept(folder: Path, count: int, nodes: int) -> harness.Row:
    made = plans.plan(
        load_sweep(folder / f"sweep-{count}.yaml"), place(folder, count, nodes), folder / "graphs", 1, print
    )
    read: Counter[str] = Counter()
    if not nodes:
        _count_bytes(folder / "base", read)
    with engine(nodes) as on:
        result = sweep(made, on, harness.progress)
        everything, of_ray = _cpu_seconds()
    assert result.passed, [cell.failure for cell in result.cells]
    stages = sum(stage.cpu_seconds for cell in result.cells for stage in cell.stages)
    row: harness.Row = {"adapters": count, "nodes": nodes, "stages, s": stages, "all, s": everything}
    row["peak of a process, MB"] = max(stage.peak_bytes for cell in result.cells for stage in cell.stages) / 1e6
    if nodes:
        row["of it Ray's own, s"] = of_ray
    else:
        row["base read, MB"] = sum(read.values()) / 1e6
        row["unavoidable"] = _unavoidable(result, count)
    return row


def _loading_seconds() -> float:
    """Processor seconds of a process that loads what the stages need."""
    from vlm_export import pipeline

    assert pipeline
    return time.process_time()


def _unavoidable(result: SweepResult, count: int) -> float:
    """Processor seconds: of the median of each stage, N times, and of what the first `onnx` took beyond it."""
    seconds: dict[str, list[float]] = {}
    for cell in result.cells:
        for stage in cell.stages:
            seconds.setdefault(stage.stage, []).append(stage.cpu_seconds)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return count * sum(medians.values()) + max(seconds["onnx"]) - medians["onnx"]


@contextmanager
def engine(nodes: int) -> Iterator[Engine]:
    """This process, or a cluster of nodes of one core."""
    if not nodes:
        yield InProcess()
        return
    with cluster(nodes) as made, on_ray(made.address, 1) as on:
        yield on


@contextmanager
def cluster(nodes: int) -> Iterator[Any]:
    """A cluster of Ray nodes of one core on this machine, each a few processes."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        for _ in range(nodes - 1):
            made.add_node(**NODE)
        yield made
    finally:
        made.shutdown()


def _cpu_seconds() -> tuple[float, float]:
    """Of this process and all that it started and that are alive; and of those that do nothing but keep Ray going."""
    own = psutil.Process()
    total = of_ray = 0.0
    for process in (own, *own.children(recursive=True)):
        try:
            times, title = process.cpu_times(), " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        seconds = times.user + times.system
        total += seconds
        does_stages = process == own or (title.startswith("ray::") and "Agent" not in title)
        of_ray += 0.0 if does_stages else seconds
    return total, of_ray


def _count_bytes(base: Path, read: Counter[str]) -> None:
    """From now on what this process reads of files in `base` is counted: tensors, and files that are hashed."""
    from vlm_export import files
    from vlm_export.tensors.stored import TensorRef

    load, sha256 = TensorRef.load, files.sha256

    def counted_load(ref: TensorRef, rows: slice | None = None) -> object:
        tensor = load(ref, rows)
        read["tensors"] += tensor.nbytes if ref.file.is_relative_to(base) else 0
        return tensor

    def counted_sha256(path: Path) -> str:
        read["hashes"] += path.stat().st_size if Path(path).is_relative_to(base) else 0
        return sha256(path)

    TensorRef.load = counted_load  # type: ignore[method-assign, assignment]

    for module in [each for name, each in sys.modules.items() if name.startswith("vlm_export")]:
        if getattr(module, "sha256", None) is sha256:
            module.sha256 = counted_sha256  # type: ignore[attr-defined]


def _check_same(folder: Path, counts: Sequence[int], nodes: Sequence[int]) -> None:
    """Every repo is the same bytes wherever it was made."""
    for count in counts:
        expected = repos(place(folder, count, 0))
        assert len(expected) == count
        for each in nodes:
            assert repos(place(folder, count, each)) == expected, f"{count} adapters on {each} nodes: other bytes"


def repos(work: Path) -> dict[str, dict[str, str]]:
    """By path of each repo of a sweep, the hashes of its files."""
    return {path.relative_to(work).as_posix(): file_hashes(path) for path in sorted(work.glob("*/*/repo"))}


def _real(folder: Path) -> Path:
    """The captioner of real size with its LoRA, assembled at the first use."""
    target = folder / "checkpoint"
    if not target.is_dir():
        assemble = ROOT / "recipes" / "real-captioner" / "assemble.py"
        subprocess.run([sys.executable, assemble, target], check=True, stdout=sys.stderr)
    return target


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--nodes", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--dtypes", nargs="+", default=["int8", "q8", "q4"])
    parser.add_argument("--real", action="store_true", help="of the captioner of real size")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep everything here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
