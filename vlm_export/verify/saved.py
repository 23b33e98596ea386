"""The report that lies beside a repo, as long as it is about the graphs that the repo has now."""

from __future__ import annotations

from typing import Any, TypeVar

from vlm_export.documents import load_document
from vlm_export.files import Work, sha256
from vlm_export.manifest import ONNX
from vlm_export.own_files import own_file
from vlm_export.typed import command
from vlm_export.verify.report import REPORT, Report

Finding = TypeVar("Finding")


def load_report(work: Work) -> Report | None:
    """The report, if there is one, and it is about the graphs of `repo/` as they are.

    Raises:
        InputError: it cannot be read.
    """
    return load_finding(work, REPORT, Report)


def load_finding(work: Work, name: str, kind: type[Finding]) -> Finding | None:
    """What a command found out about the graphs of `repo/`, as `load_report`.

    Args:
        work: where it was written.
        name: its file in `report/`.
        kind: its dataclass, whose `graphs_sha256` says which graphs it is about.

    Raises:
        InputError: it cannot be read.
    """
    path = work.report / name
    if own_file(path.parent, path.name) is None:
        return None
    again = f"remove it, or run `{command(path.stem.replace('report', 'verify'))}` again"
    found: Any = load_document(path, kind, again)
    graphs = {work.repo / ONNX / file: digest for file, digest in found.graphs_sha256.items()}
    same = all(graph.is_file() and sha256(graph) == digest for graph, digest in graphs.items())
    return found if graphs and same else None
