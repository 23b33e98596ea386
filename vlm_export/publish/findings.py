"""What was found out about the graphs of a repo, beside its report: the last report, the figures of `bench`."""

from __future__ import annotations

import os

from vlm_export.documents import load_document
from vlm_export.errors import InputError
from vlm_export.files import Work
from vlm_export.measure.bench import Benchmark
from vlm_export.verify.report import REPORT, Report
from vlm_export.verify.saved import load_finding

BENCH, PAGE = "bench.json", "index.html"


def read_report(work: Work) -> Report | None:
    """The last report, whatever graphs it is about; none where it cannot be read."""
    path = work.report / REPORT
    try:
        return load_document(path, Report, "") if os.path.lexists(path) else None
    except InputError:
        return None


def load_benchmark(work: Work) -> Benchmark | None:
    """What was measured, if it was, of the graphs of `repo/` as they are."""
    found = load_finding(work, BENCH, Benchmark)
    for place, row in enumerate(found.rows if found else ()):
        if not row.is_whole:
            raise InputError(f"{work.report / BENCH}: is damaged: rows.{place}: has neither all figures nor a failure")
    return found
