"""A component in a dtype: its skeleton and the merged weights, each in the form that `dtypes.py` says.

Weights are read, cast and quantized as they are written. In float16 (`quantize/half.py`) inputs and outputs stay
float32, because transformers.js never casts between graphs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import onnx_ir as ir

from vlm_export.dtypes import ACTIVATIONS, BY_ROW, PLAIN, Dtype, Form
from vlm_export.graph.weights import CheckpointTensor, attach_weights
from vlm_export.quantize import folded, graph_edits, half, nf4, packed
from vlm_export.quantize.numbers import Quantized, Solution
from vlm_export.spec.graph import Component
from vlm_export.tensors.stored import TensorRef

Solutions = Mapping[str, Solution]

_SMALLEST_BLOCK = 16  # that MatMulNBits takes
_MULTIPLY = {"packed": packed.multiply, "folded": folded.multiply, "nf4": nf4.multiply}
_LOOK_UP = {"packed": packed.look_up, "folded": folded.look_up}


@dataclass(frozen=True)
class Source:
    """What the variants of a component are made of: its skeleton, and a merged checkpoint's tensors."""

    component: Component
    skeleton: ir.Model
    tensors: Mapping[str, TensorRef]

    @property
    def name(self) -> str:
        """The component's."""
        return self.component.name

    @cached_property
    def model(self) -> ir.Model:
        """The graph in float32, its weights still on disk. It is not to be changed."""
        return attach_weights(self.skeleton, self.component, self.tensors)


@dataclass(frozen=True)
class Variant:
    """A component in a dtype.

    Attributes:
        chosen: forms of single weights that are not the dtype's, by the weight's name in the graph.
        too_large: names of values in the graph that float16 is not to hold, where it is computed in.
        rounded: numbers of few bits are the nearest, since calibrating them needs more memory than there is.
        unmeasured: nobody looks for values that float16 cannot hold, since that needs more memory than there is.
    """

    source: Source
    dtype: Dtype
    chosen: Mapping[str, Form] = field(default_factory=dict)
    too_large: frozenset[str] = frozenset()
    rounded: bool = False
    unmeasured: bool = False

    @property
    def file(self) -> str:
        """Its name, as clients ask for it."""
        return f"{self.source.name}{self.dtype.suffix}.onnx"

    @property
    def title(self) -> str:
        """For the progress of an export."""
        return f"{self.source.name} in {self.dtype.name}"

    @property
    def contents(self) -> Hashable:
        """What decides the bytes of its file: two dtypes may be the same for a component."""
        forms = tuple(sorted(self.forms.items(), key=lambda item: item[0]))
        return self.source.name, self.dtype.arithmetic, forms, self.too_large

    @property
    def is_calibrated(self) -> bool:
        """Whether numbers of its weights are chosen by what the component computes on sample inputs."""
        return not self.rounded and any(form.is_calibrated for form in self.forms.values())

    @property
    def is_half(self) -> bool:
        """Whether it computes in float16."""
        return self.dtype.arithmetic == "float16"

    @property
    def needs_samples(self) -> bool:
        """Whether the float32 graphs must have run before it can be made."""
        return (self.is_half and not self.unmeasured) or self.is_calibrated

    @cached_property
    def forms(self) -> dict[str, Form]:
        """The form of each matrix that the graph multiplies by or looks tokens up in, by its name."""
        model, dtype = self.source.model, self.dtype
        heads = graph_edits.heads(model)
        plain = dtype.decoder if self.source.component.has_cache else dtype.others
        weights = [weight for _, weight in (*graph_edits.lookups(model), *graph_edits.products(model.graph))]
        names = dict.fromkeys(str(weight.name) for weight in weights)
        return {name: self.chosen.get(name, dtype.table if name in heads else plain) for name in names}

    def to_solve(self) -> Iterator[tuple[str, Quantized]]:
        """The weights whose numbers are solved for, each with the name of the value that it multiplies."""
        for node, weight in graph_edits.products(self.source.model.graph):
            form = self.forms[str(weight.name)]
            if form.is_calibrated:
                value = node.inputs[0]
                assert value is not None
                yield str(value.name), fitted(Quantized(weight, True, form))

    def make(self, solutions: Solutions | None = None) -> ir.Model:
        """The graph, to be saved: its weights are read, cast and quantized when it is written.

        Those that are not among the `solutions` are rounded to the nearest.
        """
        skeleton = self.source.skeleton
        if self.is_half:
            skeleton = half.converted(skeleton, self.source.component, self.too_large)
        model = attach_weights(skeleton, self.source.component, self.source.tensors)
        if any(form != PLAIN for form in self.forms.values()):
            quantize(model, self.forms, solutions or {})
        return model


def quantize(model: ir.Model, forms: Mapping[str, Form], solutions: Solutions) -> int:
    """Give each weight of a MatMul, and the token table, its form. Returns how many products and lookups changed.

    The table stays one tensor with a tied head, which has its form.
    """
    graph = model.graph

    def in_form(weight: CheckpointTensor, *, outputs_last: bool) -> Quantized:
        form = forms[str(weight.name)]
        solution = solutions.get(str(weight.name)) if form.is_calibrated else None
        return fitted(Quantized(weight, outputs_last, form, solution))

    changed = 0
    for lookup, table in list(graph_edits.lookups(model)):
        if forms[str(table.name)] != PLAIN:
            quantized = in_form(table, outputs_last=graph_edits.is_by_columns(lookup))
            _LOOK_UP[quantized.form.kernel](graph, lookup, quantized)
            changed += 1
    for node, weight in list(graph_edits.products(graph)):
        if forms[str(weight.name)] != PLAIN:
            quantized = in_form(weight, outputs_last=True)
            _MULTIPLY[quantized.form.kernel](graph, node, quantized)
            changed += 1
    graph_edits.drop_unused(graph)
    model.metadata_props[ACTIVATIONS] = BY_ROW
    return changed


def fitted(quantized: Quantized) -> Quantized:
    """The same in smaller blocks, where fewer zeros fill those up."""
    form = quantized.form
    if form.kernel != "packed" or form.block is None:
        return quantized
    halved = (form.block >> times for times in range(form.block.bit_length()))
    sizes = [size for size in halved if size >= _SMALLEST_BLOCK]
    return replace(quantized, form=replace(form, block=min(sizes, key=lambda size: -quantized.inputs % size)))
