"""A component's skeleton: its finished graph, in which weights are inputs.

Steps: trace (two layers of each stack of equal ones), simplify, repeat the second layer, join what leads from one layer
into the next, and let the last one compute only the rows that are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

import onnx_ir as ir
from torch import nn

from vlm_export.graph import passes
from vlm_export.graph.onnxsim_process import Onnxsim
from vlm_export.graph.rewrites.repeat_layers import NotRepeatable, repeat_layers
from vlm_export.graph.simplify import count_fused, simplify
from vlm_export.graph.simplify_report import SimplifyReport
from vlm_export.graph.stacks import find_stacks, two_layer_component, two_layers
from vlm_export.graph.trace import trace
from vlm_export.spec.graph import Component


def make_skeleton(
    component: Component,
    model: nn.Module,
    whole: Mapping[str, str] | None = None,
    onnxsim: Onnxsim | None = None,
    watch: passes.Watch = passes.nobody,
) -> tuple[ir.Model, SimplifyReport]:
    """The simplified skeleton of a component, at the cost of two layers wherever more of them are alike.

    `onnxsim` is used where it was started for several components. `whole` says by path why a stack must be traced
    whole; one whose graph turns out not to repeat joins them. `watch` is told of each stage of the layers that are
    traced.
    """
    stacks, refused = find_stacks(component, model, whole or {})
    with nullcontext(onnxsim) if onnxsim else Onnxsim() as process:
        process.start()
        with two_layers(model, stacks):
            traced = trace(two_layer_component(component, stacks), model, watch)
        skeleton, report = simplify(traced, component, process, watch=watch)
    repeated: dict[str, int] = {}
    for stack in stacks:
        try:
            repeated[stack.path] = repeat_layers(
                skeleton, stack.path, stack.layers, cached=stack.cached, period=stack.period, leading=stack.leading
            )
        except NotRepeatable as error:
            return make_skeleton(component, model, {**(whole or {}), stack.path: str(error)}, onnxsim, watch)
    declared = {spec.name for spec in component.inputs}
    rewrites = passes.run_with_weights(passes.AFTER_REPEAT, skeleton, declared, watch)
    return skeleton, replace(
        report,
        rewrites={**report.rewrites, **rewrites},
        nodes_after=len(skeleton.graph),
        fused=count_fused(skeleton),
        repeated=repeated,
        not_repeated=refused,
    )
