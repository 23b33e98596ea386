"""A benchmark as text: a table for the terminal, and one in Markdown for the model card, of the same cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

COLUMNS = ("runtime", "dtype", "graphs", "load", "first token", "decode", "peak memory")
_RUNTIME_NAMES = {
    "ort": "vlm-export run",
    "node": "stock transformers.js in Node",
    "wasm": "the same on the WASM build of onnxruntime-web, in Node too",
}
_UNSTEADY = 1.5  # the fastest round over the slowest: more is not the model's doing
_MEANING = (
    "load: from files to sessions; first token: from the image file on; decode: the tokens after it; "
    "peak memory: the whole process"
)


def table(benchmark: Mapping[str, Any]) -> Group:
    """For the terminal. `benchmark` is a `Benchmark` as JSON has it."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in COLUMNS:
        made.add_column(name, justify="left" if name in ("runtime", "dtype") else "right", no_wrap=True)
    rows = benchmark["rows"]
    for index, row in enumerate(rows):
        is_first = index == 0 or rows[index - 1]["runtime"] != row["runtime"]
        is_last = index + 1 == len(rows) or rows[index + 1]["runtime"] != row["runtime"]
        name, *rest = cells(row)
        made.add_row(name if is_first else "", *rest, end_section=is_last)
    notes = "\n".join([*_failures(benchmark), *_unsteady(benchmark), *legend(benchmark), _MEANING])
    return Group(Text("\n".join(conditions(benchmark))), made, Text(notes, style="dim"))


def markdown(benchmark: Mapping[str, Any]) -> str:
    """For the model card."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in benchmark["rows"]]
    notes = [f"- {note}" for note in (*_failures(benchmark), *_unsteady(benchmark), *legend(benchmark), _MEANING)]
    return "\n".join(["; ".join(conditions(benchmark)) + ".", "", *lines, "", *notes])


def conditions(benchmark: Mapping[str, Any]) -> list[str]:
    """What was measured, and on what."""
    machine, images = benchmark["machine"], benchmark["images"]
    rounds = f"medians of {benchmark['rounds']} rounds" if benchmark["rounds"] > 1 else "one round"
    named = ", ".join(images) if len(images) < 4 else f"{images[0]} … {images[-1]}"
    pictures = f"{len(images)} images ({named})" if len(images) > 1 else named
    prompt = f"asked {benchmark['prompt']!r}, " if benchmark["prompt"] else ""
    return [
        f"{benchmark['model']} ({benchmark['layout']}): {rounds}",
        f"{pictures}, {prompt}{benchmark['new_tokens']} new tokens each, greedy",
        f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['memory_bytes'] / 1e9:.0f} GB, {machine['system']}",
    ]


def legend(benchmark: Mapping[str, Any]) -> list[str]:
    """Each runtime that has rows: what it is, its versions and threads."""
    threads = {row["runtime"]: row["threads"] for row in benchmark["rows"]}
    return [
        f"{runtime}: {_RUNTIME_NAMES[runtime]}; {', '.join(f'{name} {number}' for name, number in versions.items())}; "
        f"{threads[runtime]} {'thread' if threads[runtime] == 1 else 'threads'}"
        for runtime, versions in benchmark["versions"].items()
        if runtime in threads
    ]


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row, in the order of `COLUMNS`."""
    known = [row["runtime"], row["dtype"], megabytes(row["graph_bytes"])]
    if row["failure"]:
        return [*known, "failed", "", "", ""]
    return [
        *known,
        duration(row["load_seconds"]),
        duration(row["first_token_seconds"]),
        f"{significant(row['tokens_per_second'])} tok/s",
        "" if row["peak_memory_bytes"] is None else megabytes(row["peak_memory_bytes"]),
    ]


def _failures(benchmark: Mapping[str, Any]) -> list[str]:
    return [f"{row['runtime']} {row['dtype']} failed: {row['failure']}" for row in benchmark["rows"] if row["failure"]]


def _unsteady(benchmark: Mapping[str, Any]) -> list[str]:
    """The rows whose rounds say different things."""
    ranges = {f"{row['runtime']} {row['dtype']}": row["tokens_per_second_range"] for row in benchmark["rows"]}
    apart = [
        f"{name} {significant(found[0])} to {significant(found[1])}"
        for name, found in ranges.items()
        if found and found[1] > _UNSTEADY * found[0]
    ]
    return [f"the rounds differ, as on a busy machine (tok/s): {', '.join(apart)}"] if apart else []


def duration(seconds: float) -> str:
    """Seconds as text, in ms below one."""
    return f"{significant(seconds)} s" if seconds >= 1 else f"{significant(seconds * 1e3)} ms"


def megabytes(size: float) -> str:
    """Bytes as text, in MB of 10⁶."""
    return f"{size / 1e6:,.0f} MB" if size >= 100e6 else f"{size / 1e6:.1f} MB"


def significant(value: float) -> str:
    """A number as text: three digits, and no fewer than the whole ones."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
