"""The files that an export would write and what they take, out of the shapes of a checkpoint's tensors.

What a graph adds to its weights is left out but for a round number, so that sizes are good to about a hundredth; those
that `vlm-export onnx` tells before it writes are exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlm_export.contract import LayoutName
from vlm_export.dtypes import DTYPES, PLAIN, Dtype, Form
from vlm_export.quantize.estimate import Estimate, Solved, VariantCost, estimate
from vlm_export.start.parts import PartName, Placed
from vlm_export.wanted import Wanted

_GRAPH_BYTES = 100_000  # beside its weights
_SCALE_BYTES = 2  # of what shares one, in every form but nf4
_ABSMAX_BYTES = 4
# 2-D, and never multiplied by.
_LOOKED_UP = re.compile(r"position|embed|wpe")
# Projections of one value: their inputs' products are collected once for all of them.
_SHARED_INPUT = re.compile(r"(?<=\.)([qkv]_proj|gate_proj|up_proj|query|key|value)(?=\.)")
_IN_DECODER: tuple[PartName, ...] = ("decoder", "head")
_IN_ENCODER: tuple[PartName, ...] = ("vision tower", "projector")


@dataclass(frozen=True)
class GraphParts:
    """A component and the parts whose weights it holds; `has_cache` as of `spec.graph.Component`."""

    component: str
    parts: tuple[PartName, ...]
    has_cache: bool = False


_DECODER = GraphParts("decoder_model_merged", _IN_DECODER, has_cache=True)
_EMBED = GraphParts("embed_tokens", ("token table",))
GRAPHS: Mapping[LayoutName, tuple[GraphParts, ...]] = {  # single joins those of another layout
    "captioner": (
        GraphParts("encoder_model", _IN_ENCODER),
        GraphParts("decoder_model_merged", ("token table", *_IN_DECODER), has_cache=True),
    ),
    "chat": (GraphParts("vision_encoder", _IN_ENCODER), _EMBED, _DECODER),
    "tasks": (
        GraphParts("vision_encoder", _IN_ENCODER),
        _EMBED,
        GraphParts("encoder_model", ("text encoder",)),
        _DECODER,
    ),
    "components": (
        GraphParts("vision_encoder", ("vision tower",)),
        GraphParts("projection", ("projector",)),
        GraphParts("prefix_init", ("token table", *_IN_DECODER)),
        _EMBED,
        GraphParts("language_model", _IN_DECODER, has_cache=True),
    ),
}


def expected(tensors: Sequence[Placed], layout: LayoutName, wanted: Wanted, *, tied: bool) -> Estimate:
    """What an export of these tensors would take; `tied` says that the token table is the head too."""
    names = [graph.component for graph in GRAPHS[layout]]
    mixed = wanted.mixed(names)
    return estimate(
        [
            _cost(graph, DTYPES[name], _weights(graph, tensors, tied))
            for graph in GRAPHS[layout]
            for name in wanted.of(graph.component, mixed)
        ]
    )


def _weights(graph: GraphParts, tensors: Sequence[Placed], tied: bool) -> list[Placed]:
    parts = set(graph.parts)
    if tied and "head" in parts:
        parts = parts - {"head"} | {"token table"}
    return [tensor for tensor in tensors if tensor.part in parts]


def _cost(graph: GraphParts, dtype: Dtype, weights: Sequence[Placed]) -> VariantCost:
    solved = [_solved(graph, dtype, weight) for weight in weights if _form(graph, dtype, weight).is_calibrated]
    return VariantCost(
        graph.component,
        dtype.name,
        f"{graph.component}{dtype.suffix}.onnx",
        _GRAPH_BYTES + sum(_size_bytes(weight, _form(graph, dtype, weight), dtype) for weight in weights),
        sum(weight.parameters for weight in weights),
        0 if dtype.name == "fp32" else max((weight.parameters for weight in weights), default=0),
        tuple(solved),
    )


def _form(graph: GraphParts, dtype: Dtype, weight: Placed) -> Form:
    """How a weight is stored, as `Variant.forms` decides it from the graph."""
    if len(weight.shape) != 2:  # a table too, in a damaged checkpoint
        return PLAIN
    if weight.part in ("token table", "head"):
        return dtype.table
    if _LOOKED_UP.search(weight.key):
        return PLAIN
    return dtype.decoder if graph.has_cache else dtype.others


def _size_bytes(weight: Placed, form: Form, dtype: Dtype) -> int:
    count = weight.parameters
    if form.kernel == "plain":
        return count * (2 if dtype.arithmetic == "float16" else 4)
    outputs, inputs = weight.shape
    groups = outputs * math.ceil(inputs / form.block) if form.block else outputs
    zeros = math.ceil(groups * form.bits / 8) if form.offsets else 0
    return math.ceil(count * form.bits / 8) + groups * (_ABSMAX_BYTES if form.kernel == "nf4" else _SCALE_BYTES) + zeros


def _solved(graph: GraphParts, dtype: Dtype, weight: Placed) -> Solved:
    form = _form(graph, dtype, weight)
    outputs, inputs = weight.shape
    value = _SHARED_INPUT.sub(lambda found: "gate_up" if found[0] in ("gate_proj", "up_proj") else "qkv", weight.key)
    return Solved(graph.component, weight.key, form, value, inputs, outputs, math.ceil(inputs / (form.block or inputs)))
