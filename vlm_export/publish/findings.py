"""What was found out about the graphs of a repo: the report of `verify`, the figures of `bench`."""

from __future__ import annotations

from typing import TypeVar

from vlm_export.documents import load_document
from vlm_export.errors import InputError
from vlm_export.files import Work, sha256
from vlm_export.manifest import ONNX
from vlm_export.measure.bench import Benchmark
from vlm_export.typed import command
from vlm_export.verify.report import REPORT, Report

BENCH, PAGE = "bench.json", "index.html"
Finding = TypeVar("Finding", Report, Benchmark)


def load_report(work: Work) -> Report | None:
    """The report, if there is one, and it is about the graphs of `repo/` as they are."""
    return _of_these_graphs(work, REPORT, Report)


def read_report(work: Work) -> Report | None:
    """The last report, whatever graphs it is about; none where it cannot be read."""
    path = work.report / REPORT
    try:
        return load_document(path, Report, "") if path.is_file() else None
    except InputError:
        return None


def load_benchmark(work: Work) -> Benchmark | None:
    """What was measured, if it was, of the graphs of `repo/` as they are."""
    return _of_these_graphs(work, BENCH, Benchmark)


def _of_these_graphs(work: Work, name: str, kind: type[Finding]) -> Finding | None:
    path = work.report / name
    if not path.is_file():
        return None
    found = load_document(path, kind, f"remove it, or run `{command(path.stem.replace('report', 'verify'))}` again")
    graphs = {work.repo / ONNX / file: digest for file, digest in found.graphs_sha256.items()}
    same = all(graph.is_file() and sha256(graph) == digest for graph, digest in graphs.items())
    return found if graphs and same else None
