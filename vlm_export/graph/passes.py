"""The passes over a component's graph, in the order in which they run; each is a file of `rewrites/`.

    trace (two layers of each stack) → AFTER_TRACE → front end → BEFORE_ONNXSIM → onnxsim → repeat_layers → AFTER_REPEAT

What a dtype changes comes after that, with the weights (`quantize/`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import onnx_ir as ir

from vlm_export.graph.rewrites.flat_products import unflatten_products
from vlm_export.graph.rewrites.gather_positions import gather_positions
from vlm_export.graph.rewrites.gelu import fuse_gelu
from vlm_export.graph.rewrites.kept_rows import pick_rows_early
from vlm_export.graph.rewrites.ort_fusions import fuse_norms
from vlm_export.graph.rewrites.pack_attention import pack_attention
from vlm_export.graph.rewrites.rotary_tables import halve_tables
from vlm_export.graph.rewrites.same_shape import join_reshapes
from vlm_export.graph.rewrites.skip_norms import join_norms
from vlm_export.graph.rewrites.weight_layout import fold_transposes, gemm_to_matmul

Plain = Callable[[ir.Model], int]  # changes a graph; returns how often it applied
WithWeights = Callable[[ir.Model, Collection[str]], int]  # the same, told which inputs are no weights
# Is told of each stage of a skeleton, by the name of what was done last, and of the skeleton, which goes on changing.
Watch = Callable[[str, ir.Model], None]

AFTER_TRACE: Sequence[Plain] = (unflatten_products, join_reshapes, fuse_gelu, fuse_norms)  # need the tracer's shapes
BEFORE_ONNXSIM: tuple[Sequence[Plain], Sequence[WithWeights]] = (
    (gather_positions, halve_tables),
    (gemm_to_matmul, fold_transposes),
)
AFTER_REPEAT: Sequence[WithWeights] = (pack_attention, join_norms, pick_rows_early)


def nobody(stage: str, skeleton: ir.Model) -> None:
    """Watches nothing."""


def run(passes: Sequence[Plain], skeleton: ir.Model, watch: Watch = nobody) -> dict[str, int]:
    """Run passes in turn. Returns how often each applied, by its name."""
    return _counted([(each.__name__, partial(each, skeleton)) for each in passes], skeleton, watch)


def run_with_weights(
    passes: Sequence[WithWeights], skeleton: ir.Model, declared: Collection[str], watch: Watch = nobody
) -> dict[str, int]:
    """The same for passes that look at weights: the inputs that are not `declared`."""
    return _counted([(each.__name__, partial(each, skeleton, declared)) for each in passes], skeleton, watch)


def _counted(calls: Sequence[tuple[str, Callable[[], int]]], skeleton: ir.Model, watch: Watch) -> dict[str, int]:
    found = {}
    for name, call in calls:
        found[name] = call()
        if found[name]:
            watch(name, skeleton)
    return found
