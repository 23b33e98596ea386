"""A graph's inputs and outputs against the family's declaration: names, types, fixed sizes, and the batch symbol."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from vlm_export.spec.graph import Component, TensorSpec

_TYPES = {
    "float32": ir.DataType.FLOAT,
    "int64": ir.DataType.INT64,
    "bool": ir.DataType.BOOL,
    "uint8": ir.DataType.UINT8,
}
VISION_LOGITS = (
    ": {count} rows of logits where the next token's alone is wanted: the graph predicts at the image's positions, "
    "as one forward pass over the image does, and cannot continue a text"
)


def differences(component: Component, graph: ir.Graph) -> list[str]:
    """Everything in which a graph differs from the declaration; empty when it is as declared.

    Inputs and outputs in every dtype are float32, int64 and bool: transformers.js never casts between graphs.
    """
    return [
        *_differences("input", component.inputs, graph.inputs),
        *_differences("output", component.outputs, graph.outputs),
    ]


def _differences(kind: str, declared: Sequence[TensorSpec], found: Iterable[ir.Value]) -> list[str]:
    by_name = {str(value.name): value for value in found}
    problems = [f"{kind} {spec.name} is missing" for spec in declared if spec.name not in by_name]
    problems += [f"{kind} {name} is not declared" for name in by_name.keys() - {spec.name for spec in declared}]
    for spec in declared:
        value = by_name.get(spec.name)
        if value is None:
            continue
        if value.dtype != _TYPES[spec.dtype]:
            problems.append(f"{kind} {spec.name} is {value.dtype}, not {spec.dtype}")
        shape = None if value.shape is None else [_size(size) for size in value.shape]
        if shape is None or not _agrees(kind, spec, shape):
            problems.append(f"{kind} {spec.name} has shape {shape}, not {list(spec.shape)}{_hint(spec, shape)}")
    return problems


def _size(size: int | ir.SymbolicDim) -> int | str:
    return size if isinstance(size, int) else str(size.value)


def _agrees(kind: str, spec: TensorSpec, shape: Sequence[int | str]) -> bool:
    """Fixed sizes are equal, dynamic axes dynamic, and an input's batch axis has the symbol transformers.js knows."""
    return len(shape) == len(spec.shape) and all(
        declared == found
        if isinstance(declared, int) or (kind == "input" and declared == "batch_size")
        else isinstance(found, str)
        for declared, found in zip(spec.shape, shape, strict=True)
    )


def _hint(spec: TensorSpec, shape: Sequence[int | str] | None) -> str:
    """Recognise the graph that answers for the image's own positions."""
    if spec.name == "logits" and shape is not None and len(shape) == 3 and shape[1] != spec.shape[1]:
        return VISION_LOGITS.format(count=shape[1])
    return ""
