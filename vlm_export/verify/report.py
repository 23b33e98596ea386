"""`report.json`: every comparison with its value, its limit and what was decided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlm_export.files import file_hashes
from vlm_export.manifest import Manifest
from vlm_export.recipe import Tolerance
from vlm_export.spec.family import Layout
from vlm_export.spec.graph import Component
from vlm_export.verify import limits
from vlm_export.verify.golden import GoldenFolder

Runtime = Literal["ort", "node"]


RUNTIMES: tuple[Runtime, ...] = ("ort", "node")


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
        return [check for check in self.checks if check.verdict == "fail"]

    @property
    def failed_dtypes(self) -> list[str]:
        """Those with a check that failed, in the order of the checks."""
        return list(dict.fromkeys(check.dtype for check in self.failures))


def with_files(report: Report, repo: Path) -> dict[str, Any]:
    """The report as JSON, with the sha256 of every file of the repo as it is now."""
    return asdict(report) | {"files_sha256": file_hashes(repo)}


@dataclass
class Verification:
    """What one verification reads, and what it has seen so far: its checks, and each dtype's tokens in ONNX Runtime."""

    repo: Path
    manifest: Manifest
    layout: Layout
    components: Sequence[Component]
    golden: GoldenFolder
    tolerances: tuple[Tolerance, ...]
    progress: Callable[[str], None]
    checks: list[Check] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    generated_in_ort: dict[str, list[list[int]]] = field(default_factory=dict)

    def add(self, component: str, dtype: str, runtime: str, metric: str, value: float, detail: str = "") -> bool:
        """Judge a value by its limit and keep the check. Returns whether it did not fail."""
        limit = limits.limit_for(metric, dtype, self.tolerances)
        verdict: Literal["pass", "fail", "reported"] = "reported"
        if limit is not None:
            verdict = "pass" if limit.holds(value) else "fail"
            detail = "; ".join(part for part in (detail, limit.reason and f"limit: {limit.reason}") if part)
        bound = None if limit is None else limit.limit
        self.checks.append(Check(component, dtype, runtime, metric, value, bound, verdict, detail))
        return verdict != "fail"

    def fail(self, component: str, dtype: str, runtime: str, metric: str, detail: str) -> None:
        """A check that needs no number: the graph is not what it should be."""
        self.checks.append(Check(component, dtype, runtime, metric, 1.0, 0.0, "fail", detail))
