"""What `vlm-export inspect` prints: lines for people, and one JSON object."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from vlm_export.contract import SUFFIXES
from vlm_export.dtypes import DTYPES
from vlm_export.start.figures import columns, minutes, number, size
from vlm_export.start.inspection import Adapter, Checkpoint, Inspected, Machine, Repo, sizes_of
from vlm_export.start.parts import Part
from vlm_export.start.uses import USUAL, dtypes_for
from vlm_export.wanted import parse


def as_json(inspected: Inspected, machine: Machine) -> dict[str, Any]:
    """One object; `kind` says which of the three it is."""
    named = inspected.named
    found = {"reference": named.reference, "path": str(named.path), "commit": named.commit}
    if isinstance(inspected, Repo):
        return {"kind": "repo", **found, **asdict(inspected.graphs), "size_bytes": inspected.graphs.size_bytes}
    if isinstance(inspected, Adapter):
        values = {"lora": asdict(inspected.lora), "base_model": inspected.base_model, "refused": inspected.refused}
        return {"kind": "adapter", **found, **values}
    usual = inspected.expected(inspected.layouts[0], parse(dtypes_for(USUAL), "dtypes"))
    return {
        "kind": "checkpoint",
        **found,
        "model_type": inspected.model_type,
        "parts": [asdict(part) for part in inspected.parts],
        "tied_head": inspected.tied,
        "lora": asdict(inspected.lora) if inspected.lora else None,
        "quantized": inspected.quantized,
        "layouts": inspected.layouts,
        "sizes_bytes": sizes_of(inspected),
        "estimate": asdict(usual) if usual else None,
        "machine": asdict(machine),
    }


def lines(inspected: Inspected, machine: Machine) -> list[str]:
    """The same for people; the last line is the next command."""
    if isinstance(inspected, Repo):
        return _of_repo(inspected)
    if isinstance(inspected, Adapter):
        return _of_adapter(inspected)
    return _of_checkpoint(inspected, machine)


def _of_checkpoint(checkpoint: Checkpoint, machine: Machine) -> list[str]:
    reference = checkpoint.named.reference
    said = [f"{reference}: a checkpoint of the family {checkpoint.model_type}{_where(checkpoint)}", ""]
    said += [*_parts(checkpoint.parts), ""]
    if checkpoint.tied:
        said.append("the head is the token table (tied)")
    if checkpoint.lora:
        said.append(f"LoRA inside: {checkpoint.lora}")
    if checkpoint.quantized:
        said.append(f"quantized with {checkpoint.quantized}: sizes are known once it is merged (`base: dequantized`)")
    else:
        said += ["", *_exports(checkpoint), "", *_takes(checkpoint, machine)]
    return [*said, "", f"next: vlm-export init {shlex.quote(reference)}"]


def _where(checkpoint: Checkpoint) -> str:
    commit = checkpoint.named.commit
    return f", on the Hub at {commit[:12]}" if commit else ""


def _parts(parts: Iterable[Part]) -> list[str]:
    parts = list(parts)
    rows = [
        (part.name, str(part.tensors), number(part.parameters), size(part.size_bytes), ", ".join(part.dtypes))
        for part in parts
    ]
    sums = [sum(getattr(part, name) for part in parts) for name in ("tensors", "parameters", "size_bytes")]
    total = ("all", str(sums[0]), number(sums[1]), size(sums[2]), "")
    return columns([("part", "tensors", "parameters", "size", "stored as"), *rows, total])


def _exports(checkpoint: Checkpoint) -> list[str]:
    found = sizes_of(checkpoint)
    rows = [(dtype, *(size(found[layout][dtype]) for layout in found), _what(dtype)) for dtype in DTYPES]
    return columns([("can be exported in", *(f"as {layout}" for layout in found), ""), *rows])


def _what(dtype: str) -> str:
    serves = [use for use, best in _SERVED.items() if dtype in best]
    return f"for {' and '.join(serves)}" if serves else ""


_SERVED = {"a browser": dtypes_for(("browser",))[1:], "Node and servers": dtypes_for(("node",))[1:]}


def _takes(checkpoint: Checkpoint, machine: Machine) -> Iterator[str]:
    """What the export for the usual use takes, beside what there is."""
    dtypes = dtypes_for(USUAL)
    expected = checkpoint.expected(checkpoint.layouts[0], parse(dtypes, "dtypes"))
    if expected is None:
        return
    disk, memory = expected.disk_bytes + checkpoint.merged_bytes, expected.memory_bytes
    yield f"as {checkpoint.layouts[0]} in {', '.join(dtypes)}, merged checkpoint included:"
    yield f"  disk    {size(disk):>9}  of {size(machine.disk_bytes)} free here"
    calibrated = expected.calibration_memory_bytes
    beside = f"; {size(calibrated)} to calibrate on images" if calibrated > memory else ""
    yield f"  memory  {size(memory):>9}  of {size(machine.memory_bytes)} free{beside}"
    yield f"  time    {minutes(expected.seconds):>9}  of one core to write the graphs; tracing them comes first, once"


def _of_adapter(adapter: Adapter) -> list[str]:
    reference, lora = adapter.named.reference, adapter.lora
    said = [
        f"{reference}: a LoRA adapter, {number(lora.parameters)} parameters, {size(lora.size_bytes)}",
        "",
        str(lora),
        *([f"targets: {', '.join(lora.targets)}"] if lora.targets else []),
        f"trained on: {adapter.base_model or 'its adapter_config.json does not say what'}",
    ]
    if adapter.refused:
        return [*said, "", f"cannot be merged: {adapter.refused}"]
    base = shlex.quote(adapter.base_model or "CHECKPOINT")
    return [*said, "", f"next: vlm-export init {base} {shlex.quote(reference)}"]


def _of_repo(repo: Repo) -> list[str]:
    graphs, reference = repo.graphs, repo.named.reference
    made = f", made by the recipe {graphs.recipe}" if graphs.recipe else ", not made by vlm-export"
    dtypes = [dtype for dtype in SUFFIXES if dtype in graphs.dtypes]
    rows = [
        (component, *(size(sizes[dtype]) if dtype in sizes else "-" for dtype in dtypes), "")
        for component, sizes in graphs.graphs.items()
    ]
    total = (
        "all",
        *(size(sum(sizes.get(dtype, 0) for sizes in graphs.graphs.values())) for dtype in dtypes),
        "",
    )
    said = [
        f"{reference}: an exported {graphs.model_type} ({graphs.layout or 'layout unknown'}){made}",
        "",
        *columns([("graph", *dtypes, ""), *rows, total]),
    ]
    if graphs.failed:
        said += ["", f"verify failed {', '.join(graphs.failed)}"]
    if graphs.mixed:
        said += ["", "a client takes " + ", ".join(f"{name} in {dtype}" for name, dtype in graphs.mixed.items())]
    return [*said, "", f"next: vlm-export doctor {shlex.quote(reference)}"]
