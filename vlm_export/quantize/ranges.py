"""How large the numbers in a component become: float16 ends at 65504, and what passes it there is infinite.

The float32 graph is run on sample inputs, and reduces every float value in it to its ends itself: none is kept for
longer than the run needs it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlm_export.graph.weights import CheckpointTensor
from vlm_export.manifest import Range
from vlm_export.quantize.calibration import Run, spread
from vlm_export.quantize.graph_edits import is_float
from vlm_export.quantize.masks import LARGEST, masked
from vlm_export.quantize.probe import Probe

# Other inputs than the samples make other numbers. Of SmolLM2-135M behind a ViT, what 32 pictures and texts make is at
# most 2.6 times as large as what 4 of them make; where it is above 100, 1.9 times, above 1000, 1.5 times; and the
# largest of all, 24221 in the residual, 1.08 times.
MARGIN = 2.0
RUNS = 4  # so many prompts, and texts, show how large numbers become


@dataclass(frozen=True)
class Ranges:
    """The largest magnitude of each float value of a graph on the samples, and of each weight and constant, by name."""

    values: Mapping[str, float]
    weights: Mapping[str, float]

    @property
    def too_large(self) -> frozenset[str]:
        """The names of what float16 is not to hold: values that reach its end within the margin, and larger weights."""
        values = {name for name, largest in self.values.items() if largest * MARGIN > LARGEST}
        return frozenset(values | {name for name, largest in self.weights.items() if largest > LARGEST})

    def summary(self, model: ir.Model) -> Range:
        """What the manifest says of them."""
        every = {**self.values, **self.weights}
        where = max(every, key=lambda name: every[name])
        largest = min(every[where], float(np.finfo(np.float32).max))  # JSON has no infinite numbers
        begins = next((name for name in every if name in self.too_large), None)
        return Range(
            largest=_to_three_digits(largest),
            where=_described(model.graph, where),
            headroom=_to_three_digits(LARGEST / max(largest, 1)),
            values=len(every),
            in_float32=len(self.too_large),
            begins=_described(model.graph, begins) if begins else "",
        )


def _to_three_digits(number: float) -> float:
    """A number without the digits that depend on the kernels of a processor, so that a repo's files do not."""
    return float(f"{number:.3g}")


def measure(model: ir.Model, runs: Sequence[Run]) -> Ranges:
    """Run a float32 graph, whose weights have joined, on some of the runs. Numbers that only mask do not count."""
    reduced = model.clone()
    ends = _reduce(reduced.graph)
    probe = Probe(reduced, [end for pair in ends.values() for end in pair])
    values = dict.fromkeys(ends, 0.0)
    prompts, texts = ([run for run in runs if run.is_text is kind] for kind in (False, True))
    for run in (*spread(prompts, RUNS), *spread(texts, RUNS)):
        made = probe.run(run.feeds, probe.outputs)
        for name, lowest, highest in zip(values, made[::2], made[1::2], strict=True):
            values[name] = max(values[name], -float(lowest), float(highest))  # -inf of an empty value
    return Ranges(values, dict(_of_weights(model.graph)))


def _of_weights(graph: ir.Graph) -> Iterator[tuple[str, float]]:
    """The largest magnitude of each weight, and of each constant but for those that mask."""
    masks = masked(graph)
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.size and is_float(value) and value not in masks:
            whole = [part.values for part in tensor.rectangles()] if isinstance(tensor, CheckpointTensor) else []
            yield name, max(float(np.abs([part.min(), part.max()]).max()) for part in whole or [tensor.numpy()])


def _reduce(graph: ir.Graph) -> dict[str, tuple[str, str]]:
    """Add what computes the ends of each float value. Returns their names by its name, in nodes' order."""
    masks = masked(graph)
    values = [*(value for node in graph for value in node.outputs if node.op_type != "Constant"), *graph.inputs]
    found = {}
    for value in [value for value in values if value.name and is_float(value)]:
        source = _without_masked(graph, value, masks[value]) if value in masks else value
        names = (f"{value.name}.lowest", f"{value.name}.highest")
        for kind, name in zip(("ReduceMin", "ReduceMax"), names, strict=True):
            _append(graph, ir.node(kind, [source], {"keepdims": 0}), name)
        found[str(value.name)] = names
    return found


def _without_masked(graph: ir.Graph, value: ir.Value, mask: float) -> ir.Value:
    """The value, with zeros where numbers as low as a mask's are."""
    numbers = [
        ir.Value(name=f"{value.name}.{name}", type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.tensor(number))
        for name, number in (("masked", np.float32(-mask / 2)), ("zero", np.float32(0)))
    ]
    for number in numbers:
        graph.register_initializer(number)
    is_kept = _append(graph, ir.node("Greater", [value, numbers[0]]), f"{value.name}.is_kept")
    return _append(graph, ir.node("Where", [is_kept, value, numbers[1]]), f"{value.name}.kept")


def _append(graph: ir.Graph, node: ir.Node, name: str) -> ir.Value:
    [made] = node.outputs
    made.name = name
    graph.append(node)
    return made


def _described(graph: ir.Graph, name: str) -> str:
    """A value by its name, and the matrix of weights that was the last to be multiplied by on the way to it."""
    found = next((value for node in graph for value in node.outputs if value.name == name), None)
    waiting = deque([found.producer()] if found is not None else [])
    seen: set[ir.Node] = set()
    while waiting:
        node = waiting.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        for value in node.inputs:
            if value is not None and isinstance(value.const_value, CheckpointTensor) and len(value.shape or ()) > 1:
                return f"{name}, behind {value.name}"
        waiting += [value.producer() for value in node.inputs if value is not None]
    return name
