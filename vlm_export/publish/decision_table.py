"""The table that a dtype is chosen by: a row each, the smallest first, with its price and its speed.

One table for the report, the terminal and the model card, made of what `onnx`, `verify` and `bench` wrote. A column of
which nothing is known is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from vlm_export.dtypes import FP32
from vlm_export.files import Work
from vlm_export.manifest import Manifest, load_manifest
from vlm_export.measure.bench_table import duration, megabytes, significant
from vlm_export.targets import TARGETS
from vlm_export.verify import limits
from vlm_export.verify.report import DtypeRow, Speed
from vlm_export.verify.saved import load_report
from vlm_export.wanted import MIXED

_UNKNOWN = "-"
_RUNTIMES = {"ort": "CPU", "wasm": "WASM"}


@dataclass(frozen=True)
class Column:
    """A heading, what a row has below it (None: not known), and a sentence for who does not know the word."""

    title: str
    cell: Callable[[DtypeRow], str | None]
    meaning: str = ""


def rows(manifest: Manifest, report: Mapping[str, Any] | None, benchmark: Mapping[str, Any] | None) -> list[DtypeRow]:
    """A row for each dtype that every component has, and for those that a user mixed, the smallest first.

    `report` is a `Report` and `benchmark` a `Benchmark`, as JSON has them, of these graphs; None where there is none.
    """
    made = [_row(manifest, dtype, report, benchmark) for dtype in manifest.verified]
    return sorted(made, key=lambda row: row.total_bytes)


def rows_of(work: Work, benchmark: Mapping[str, Any]) -> list[DtypeRow]:
    """The rows of `repo/`, with what was measured just now; none if no report is about its graphs.

    Raises:
        InputError: the manifest or the report cannot be read.
    """
    report = load_report(work)
    return rows(load_manifest(work.repo), asdict(report), benchmark) if report else []


def _row(
    manifest: Manifest, dtype: str, report: Mapping[str, Any] | None, benchmark: Mapping[str, Any] | None
) -> DtypeRow:
    sizes = _sizes(manifest, dtype)
    checks = [check for check in report["checks"] if check["dtype"] == dtype] if report else []
    values = {check["metric"]: check["value"] for check in checks if check["runtime"] == "ort"}
    return DtypeRow(
        dtype=dtype,
        size_bytes=sizes,
        total_bytes=sum(sizes.values()),
        kl=values.get(limits.TEACHER_FORCED_KL),
        top1=values.get(limits.TOP1_AGREEMENT),
        captions_exact=_captions_exact(checks),
        rouge_l=values.get(limits.ROUGE_L),
        speed=_speed(benchmark, dtype),
        verdict=_verdict(manifest, dtype, checks),
    )


def _sizes(manifest: Manifest, dtype: str) -> dict[str, int]:
    """By component, bytes of the graph that a client loads."""
    components = dict.fromkeys(graph.component for graph in manifest.graphs)
    taken = manifest.mixed if dtype == MIXED else dict.fromkeys(components, dtype)
    sizes = {(graph.component, graph.dtype): graph.size_bytes for graph in manifest.graphs}
    return {component: sizes[component, taken[component]] for component in components}


def _captions_exact(checks: Sequence[Mapping[str, Any]]) -> str | None:
    """Of ONNX Runtime, or else of the first runtime that was asked."""
    found = {check["runtime"]: check for check in checks if check["metric"] == limits.TOKENS_EXACT}
    check = next((found[target] for target in TARGETS if target in found), None)
    if check is None or math.isnan(check["value"]):
        return None
    return str(check["detail"].partition(" images")[0])


def _speed(benchmark: Mapping[str, Any] | None, dtype: str) -> dict[str, Speed]:
    measured = [row for row in benchmark["rows"] if row["dtype"] == dtype] if benchmark else []
    return {
        row["runtime"]: Speed(row["first_token_seconds"], row["tokens_per_second"])
        for row in measured
        if row["failure"] is None
    }


def _verdict(manifest: Manifest, dtype: str, checks: Sequence[Mapping[str, Any]]) -> Literal["pass", "fail"] | None:
    if dtype in manifest.failed or any(check["verdict"] == "fail" for check in checks):
        return "fail"
    return "pass" if any(check["verdict"] != "left-out" for check in checks) else None


def markdown(found: Sequence[DtypeRow]) -> str:
    """For the model card: the table, with a column for each component, and what its words mean."""
    columns = [*_columns(found, by_component=True)]
    titles = [column.title for column in columns]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    lines += ["| " + " | ".join(column.cell(row) or _UNKNOWN for column in columns) + " |" for row in found]
    return "\n".join([*lines, "", *(f"- {meaning}" for meaning in _meanings(columns))])


def table(found: Sequence[DtypeRow]) -> Group:
    """For the terminal: the same without the components."""
    columns = _columns(found, by_component=False)
    made = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)  # 80 characters hold it
    for column in columns:
        made.add_column(
            column.title.replace(" ", "\n"),
            justify="left" if column is columns[0] else "right",
            vertical="bottom",
            no_wrap=True,
        )
    for row in found:
        made.add_row(
            *(column.cell(row) or _UNKNOWN for column in columns), style="red" if row.verdict == "fail" else ""
        )
    return Group(made, Text("\n".join(_meanings(columns)), style="dim"))


def _columns(found: Sequence[DtypeRow], *, by_component: bool) -> list[Column]:
    """Those of which at least one row knows something."""
    components = list(found[0].size_bytes) if found and by_component else []
    fails = any(row.verdict == "fail" for row in found)
    columns = [
        Column("dtype", lambda row: row.dtype),
        *(_component(name) for name in components),
        Column("size" if not components else "together", lambda row: megabytes(row.total_bytes)),
        *_PRICE,
        *(column for runtime in _RUNTIMES for column in _speeds(runtime)),
        Column("verify", lambda row: row.verdict and _VERDICTS[row.verdict], _FAILS if fails else ""),
    ]
    return [column for column in columns if any(column.cell(row) is not None for row in found)]


def _component(name: str) -> Column:
    return Column(f"`{name}`", lambda row: megabytes(row.size_bytes[name]))


def _speeds(runtime: str) -> tuple[Column, Column]:
    def of(row: DtypeRow, figure: Callable[[Speed], str]) -> str | None:
        return figure(row.speed[runtime]) if runtime in row.speed else None

    name = _RUNTIMES[runtime]
    return (
        Column(
            f"{name}: first token",
            lambda row: of(row, lambda speed: duration(speed.first_token_seconds)),
            "in ONNX Runtime, from the image file on; tok/s: tokens a second after it" if runtime == "ort" else "",
        ),
        Column(f"{name}: tok/s", lambda row: of(row, lambda speed: significant(speed.tokens_per_second))),
    )


def _kl(row: DtypeRow) -> str | None:
    """0 of float32 by definition, once it was verified."""
    if row.dtype == FP32.name and row.top1 is not None:
        return "0"
    return _number(row.kl, ".2g")


def _number(value: float | None, form: str) -> str | None:
    return None if value is None or math.isnan(value) else format(value, form)


_PRICE = (
    Column(
        "KL",
        _kl,
        "how far the probabilities of the next token are from float32's, in nats a token, behind PyTorch's tokens of "
        "the first images; 0 is no difference",
    ),
    Column(
        "same token",
        lambda row: _number(row.top1, ".1%"),
        "places where the likeliest token is PyTorch's, behind PyTorch's tokens",
    ),
    Column("same captions", lambda row: row.captions_exact, "captions that are PyTorch's to the last token"),
    Column(
        "ROUGE-L",
        lambda row: _number(row.rouge_l, ".3f"),
        "how much of PyTorch's captions the captions say: words in one order; 1 is all, and nothing else",
    ),
)
_VERDICTS = {"pass": "passes", "fail": "FAILS"}
_FAILS = "a dtype that FAILS is beyond a limit"


def _meanings(columns: Sequence[Column]) -> list[str]:
    return [f"{column.title}: {column.meaning}" for column in columns if column.meaning]
