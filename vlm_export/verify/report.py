"""`report.json`: every comparison with its value, its limit and what was decided."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlm_export.files import file_hashes

REPORT = "report.json"  # in the work folder's report/
# Metrics of checks that need no tolerance: a graph is as it should be, or it is not.
LOADS, RUNS, SHAPE, SIGNATURE, SATURATION = "loads", "runs", "shape", "signature", "largest_pair_of_integer_weights"
CAPTIONS = 64  # golden images of which a report holds captions
# By choice of `verify --fail-on`, the verdicts of checks that it fails for.
FAIL_ON: dict[str, frozenset[str]] = {
    "fail": frozenset({"fail"}),
    "near-tie": frozenset({"fail", "near-tie"}),
    "never": frozenset(),
}
MadeOf = Literal["pixels", "file"]


@dataclass(frozen=True)
class Check:
    """One comparison.

    `verdict` is pass, fail, reported (no limit applies), near-tie (tokens differ where two scores are equal to
    rounding, which passes), or left-out: a runtime of this machine cannot run the dtype, whatever the graphs are, so
    that nothing is known of it there. Of a graph's output, `output` is its name and `phase` the run that gave it:
    `prefill`, `decode step 1`; an encoder has one run, and no name for it.
    """

    component: str
    dtype: str
    runtime: str
    metric: str
    value: float
    limit: float | None
    verdict: Literal["pass", "fail", "near-tie", "reported", "left-out"]
    detail: str = ""
    output: str = ""
    phase: str = ""


@dataclass(frozen=True)
class Captions:
    """What a dtype says in one runtime of the first golden images, in their order; PyTorch's captions are the golden's.

    `made_of` says whether it was given the golden's pixels, or the image files.
    """

    dtype: str
    runtime: str
    made_of: MadeOf
    texts: list[str]


@dataclass(frozen=True)
class FromFile:
    """What a client made of an image file, beside what PyTorch's processor makes of it.

    Attributes:
        runtime, dtype: where it was captioned, and by which graphs.
        file: its name.
        is_golden: whether it is one of the golden images; else it is one of the package's photographs.
        peculiarity: what decoders read in different ways in it, or nothing.
        width, height: px.
        pixel_difference: of what the tower takes, the mean, as a part of 255; None where the sizes differ, or nothing
            was made.
        expected: PyTorch's caption, or of a photograph what the same graphs say of PyTorch's pixels.
        text: what the client says.
        failure: why it says nothing, or nothing.
    """

    runtime: str
    dtype: str
    file: str
    is_golden: bool
    peculiarity: str
    width: int
    height: int
    pixel_difference: float | None
    expected: str
    text: str
    failure: str = ""


@dataclass(frozen=True)
class Fault:
    """The first thing that is wrong, as `bisect.py` finds it.

    Attributes:
        component: the graph, or `files` where what it is fed is wrong.
        dtype: the one that it was found in.
        stage: what was done last before it is wrong.
        before: the stage before, after which it is right; nothing where there is none.
        tensor: the first weight or value that is wrong, or what a check says.
        layer: the number of its layer, if its name has one.
        place: where in it the difference is largest.
        value, expected: what is there, and what was there before.
    """

    component: str
    dtype: str
    stage: str
    before: str
    tensor: str
    layer: int | None = None
    place: list[int] = field(default_factory=list)
    value: float = 0.0
    expected: float = 0.0

    def __str__(self) -> str:
        right = f", right after {self.before}" if self.before else ""
        layer = "" if self.layer is None else f"layer {self.layer}, "
        values = f": {self.value:.6g} at {self.place}, where {self.expected:.6g} is right" if self.place else ""
        return f"{self.component} in {self.dtype}: first wrong after {self.stage}{right}: {layer}{self.tensor}{values}"


@dataclass(frozen=True)
class Speed:
    """How fast a dtype captions in one runtime: medians, as `bench` measured them."""

    first_token_seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class DtypeRow:
    """What who chooses a dtype wants to know of one; None, or nothing, of what was not verified or measured.

    Attributes:
        dtype: its name, or `mixed` where a user chose one for each component.
        size_bytes: by component, of its graph with external data.
        total_bytes: of all its graphs.
        kl: nats a token by which the next token's distributions are off float32's, PyTorch's tokens given.
        top1: share of places at which the likeliest token is PyTorch's, PyTorch's tokens given.
        captions_exact: how many captions have exactly PyTorch's tokens, as `31 of 32`.
        rouge_l: of the captions against PyTorch's, the mean.
        speed: by runtime.
        verdict: whether a check failed.
    """

    dtype: str
    size_bytes: dict[str, int]
    total_bytes: int
    kl: float | None = None
    top1: float | None = None
    captions_exact: str | None = None
    rouge_l: float | None = None
    speed: dict[str, Speed] = field(default_factory=dict)
    verdict: Literal["pass", "fail"] | None = None


@dataclass(frozen=True)
class Report:
    """`report.json`. `table` says what the checks come to, a row a dtype, with the speeds that `bench` measured.

    `faults` are what `verify --bisect` found. `captions` are of the first `CAPTIONS` golden images, of each dtype in
    each runtime that made some; `from_files` of one dtype in each, from image files. `fingerprints` are of what a
    dtype's checks in a runtime depend on, and `reused` those that an earlier verification made, both by `DTYPE in
    RUNTIME`. `commits` are, by a key of the recipe, what came of the Hub, as `org/model@…`.
    """

    recipe: str
    layout: str
    verdict: Literal["pass", "fail"]
    runtimes: list[str]
    checks: list[Check]
    graphs_sha256: dict[str, str]
    files_sha256: dict[str, str]
    golden_inputs_sha256: dict[str, str]
    versions: dict[str, str]
    table: list[DtypeRow] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    captions: list[Captions] = field(default_factory=list)
    from_files: list[FromFile] = field(default_factory=list)
    commits: dict[str, str] = field(default_factory=dict)
    schema: int = 1

    @property
    def failures(self) -> list[Check]:
        """The checks that failed, in their order."""
        return [check for check in self.checks if check.verdict == "fail"]

    def fails(self, fail_on: str) -> bool:
        """Whether it fails by a choice of `FAIL_ON`; no checks are no pass."""
        failing = FAIL_ON[fail_on]
        return bool(failing) and (self.verdict == "fail" or any(check.verdict in failing for check in self.checks))

    @property
    def verified_dtypes(self) -> list[str]:
        """Those that ran somewhere, in the order of the checks."""
        return list(dict.fromkeys(check.dtype for check in self.checks if check.verdict != "left-out"))

    @property
    def failed_dtypes(self) -> list[str]:
        """Those with a check that failed, in the order of the checks."""
        return list(dict.fromkeys(check.dtype for check in self.failures))


def with_files(report: Report, repo: Path) -> dict[str, Any]:
    """The report as JSON, with the sha256 of every file of the repo as it is now."""
    return asdict(report) | {"files_sha256": file_hashes(repo)}
