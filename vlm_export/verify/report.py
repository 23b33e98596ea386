"""`report.json`: every comparison with its value, its limit and what was decided."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vlm_export.files import file_hashes

# Metrics of checks that need no tolerance: a graph is as it should be, or it is not.
LOADS, RUNS, SHAPE, SIGNATURE, SATURATION = "loads", "runs", "shape", "signature", "largest_pair_of_integer_weights"


@dataclass(frozen=True)
class Check:
    """One comparison.

    `verdict` is pass, fail, reported (no limit applies), or near-tie: tokens that differ where two scores are equal to
    rounding, which passes.
    """

    component: str
    dtype: str
    runtime: str
    metric: str
    value: float
    limit: float | None
    verdict: Literal["pass", "fail", "near-tie", "reported"]
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """`report.json`."""

    recipe: str
    layout: str
    verdict: Literal["pass", "fail"]
    runtimes: list[str]
    checks: list[Check]
    graphs_sha256: dict[str, str]
    files_sha256: dict[str, str]
    golden_inputs_sha256: dict[str, str]
    versions: dict[str, str]
    schema: int = 1

    @property
    def failures(self) -> list[Check]:
        """The checks that failed, in their order."""
        return [check for check in self.checks if check.verdict == "fail"]

    @property
    def failed_dtypes(self) -> list[str]:
        """Those with a check that failed, in the order of the checks."""
        return list(dict.fromkeys(check.dtype for check in self.failures))


def with_files(report: Report, repo: Path) -> dict[str, Any]:
    """The report as JSON, with the sha256 of every file of the repo as it is now."""
    return asdict(report) | {"files_sha256": file_hashes(repo)}
