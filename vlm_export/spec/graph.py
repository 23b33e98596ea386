"""What a graph is declared to be: its inputs and outputs, and the module that is traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlm_export.spec import cache

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph: `shape` holds integers for fixed sizes and symbols for dynamic axes.

    One symbol means one size in the whole graph: ONNX Runtime re-uses buffers by symbol.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class FrontEnd:
    """ONNX text put before a traced graph, so that it takes what the client feeds instead of what the tracer saw.

    `outputs` of the text replace the traced inputs of the same names; an input of the text that is a weight's name
    takes that weight.
    """

    text: str


@dataclass(frozen=True)
class Component:
    """One graph of a repo: the file `onnx/<name>.onnx`.

    Attributes:
        module: wraps the model into a module whose positional inputs are `traced_inputs`, in order.
        inputs, outputs: the graph as the client sees it.
        traced_inputs: what the tracer sees, where a front end stands before it; `inputs` otherwise.
        sample_values: of inputs whose numbers mean sizes, such as a grid: nested lists by name.
        sample_sizes: the sizes that fit them, by symbol. Other inputs may have any numbers, other symbols any sizes.
    """

    name: str
    module: Callable[[Any], nn.Module]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    traced_inputs: tuple[TensorSpec, ...] = ()
    front_end: FrontEnd | None = None
    sample_values: Mapping[str, Any] = field(default_factory=dict, hash=False)
    sample_sizes: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def trace_signature(self) -> tuple[TensorSpec, ...]:
        """The inputs that the tracer sees, in the order of the module's arguments."""
        return self.traced_inputs or self.inputs

    @property
    def has_cache(self) -> bool:
        """Whether it is a decoder, which runs once for every token."""
        return any(cache.is_past(spec.name) for spec in self.inputs)
