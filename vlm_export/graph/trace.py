"""Trace a component into a skeleton: an ONNX graph whose weights are inputs.

Steps: give every parameter a zero-strided stand-in (the tracer needs shapes, not values), export with all declared
symbols dynamic, turn the parameters into graph inputs named as in the merged checkpoint, put the front end before it,
fold and fuse (`rewrites`). Weights join in `weights.py`. The only module that calls the exporter.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import nn

from vlm_export import patches
from vlm_export.graph import passes
from vlm_export.graph.rewrites import embedding_scale, front_end
from vlm_export.graph.weights import TOKEN_TABLE
from vlm_export.models import attention
from vlm_export.models.library import aliases
from vlm_export.spec import cache
from vlm_export.spec.graph import Component, TensorSpec

OPSET = 20  # the newest that every kernel of ONNX Runtime 1.24 and later has; LayerNormalization needs 17, Gelu 20
IR_VERSION = 10

UNFUSED = "vlm_export.unfused_attention"  # model metadata: why attention is plain operators
UNFUSED_ROTARY = "vlm_export.unfused_rotary"  # the same of rotary embedding
TRACE = "trace"  # the first stage that is watched
REWRITES = "vlm_export.rewrites"  # how often each rewrite applied, as JSON

# Sizes that the tracer sees; other axes have those from `_FIRST_OTHER_SIZE` on. All differ, and none is 0 or 1, which
# torch.export would take for constants.
_TRACED_SIZES = {
    "batch_size": 2,
    "sequence_length": 3,
    "past_sequence_length": 5,
    "total_sequence_length": 8,
    "past_encoder_sequence_length": 6,
    "new_encoder_sequence_length": 7,
    "seen_sequence_length": 13,  # of both
    "num_logits": 4,
    "height": 128,
    "width": 192,
}
_FIRST_OTHER_SIZE = 9
_TORCH_DTYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}


def trace(component: Component, model: nn.Module, watch: passes.Watch = passes.nobody) -> ir.Model:
    """The skeleton of one component: an ONNX model whose weights are graph inputs named as the model's parameters.

    `model` is weightless (`checkpoint.build_empty`) and stays so. `watch` is told of finished copies.
    """
    shared = aliases(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    with _stand_in_weights(model):
        skeleton, notes = _export_fused(component, model)
        embedding = _token_table(model)
    _weights_to_inputs(skeleton, parameters, shared)

    def finished(stage: str, unfinished: ir.Model) -> None:
        if watch is not passes.nobody:
            copy = unfinished.clone()
            _finish(copy, component, model, ir.Value(name=embedding.name, type=embedding.type, shape=embedding.shape))
            watch(stage, copy)

    finished(TRACE, skeleton)
    rewrites = passes.run(passes.AFTER_TRACE, skeleton, finished)
    skeleton.metadata_props.update(notes | {REWRITES: json.dumps(rewrites)})
    _finish(skeleton, component, model, embedding)
    return skeleton


def _finish(skeleton: ir.Model, component: Component, model: nn.Module, embedding: ir.Value) -> None:
    """Put the front end in front, and give inputs and outputs what the component declares of them."""
    if component.front_end is not None:
        front_end.attach(skeleton, component, embedding=embedding)
        module = model.get_input_embeddings()  # type: ignore[operator]
        embedding_scale.scale_lookups(skeleton, str(embedding.name), embedding_scale.scale_of(module))
    if any(value.name == embedding.name for value in skeleton.graph.inputs):
        skeleton.metadata_props[TOKEN_TABLE] = str(embedding.name)
    _declare(skeleton, component)
    skeleton.ir_version = IR_VERSION
    skeleton.producer_name = "vlm-export"


def _export_fused(component: Component, model: nn.Module) -> tuple[ir.Model, dict[str, str]]:
    """Export with attention as one operator; where that cannot be, with plain operators and the reason as metadata."""
    try:
        with attention.fused(model) as notes:
            skeleton = _export(component.module(model).eval(), component)
        reasons_by_key = {UNFUSED: notes.unfused_attention, UNFUSED_ROTARY: notes.unfused_rotary}
        return skeleton, {key: reason for key, reason in reasons_by_key.items() if reason}
    except Exception as error:
        reasons = [cause for cause in _causes(error) if isinstance(cause, attention.CannotFuse)]
        if not reasons:
            raise
    return _export(component.module(model).eval(), component), {UNFUSED: str(reasons[0])}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it was raised from: the exporter wraps what the traced code raises."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class _stand_in_weights:
    """Every parameter becomes one zero, expanded to its shape: as cheap as meta tensors, and the tracer accepts it."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.originals: list[tuple[nn.Module, str, nn.Parameter]] = []

    def __enter__(self) -> None:
        stand_ins: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                self.originals.append((module, name, parameter))
                zero = torch.zeros(1, dtype=torch.float32).expand(parameter.shape)
                module._parameters[name] = stand_ins.setdefault(id(parameter), nn.Parameter(zero, requires_grad=False))

    def __exit__(self, *_: object) -> None:
        for module, name, parameter in self.originals:
            module._parameters[name] = parameter


def _export(module: nn.Module, component: Component) -> ir.Model:
    arguments: list[Any] = []
    shapes: list[Any] = []
    inputs, values = component.trace_signature, component.sample_values
    sizes = {**_sizes(inputs), **component.sample_sizes}
    for is_cache, specs in itertools.groupby(inputs, lambda spec: cache.is_past(spec.name)):
        samples, axes = zip(*((_sample(spec, sizes, values), _dynamic_axes(spec)) for spec in specs), strict=True)
        arguments += [list(samples)] if is_cache else samples
        shapes += [list(axes)] if is_cache else axes
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        patches.operators_read_once(),
        patches.no_word_of_torchvision(),
    ):
        warnings.simplefilter("ignore")  # deprecations inside torch.export; failures raise
        program = torch.onnx.export(
            module,
            tuple(arguments),
            dynamo=True,
            dynamic_shapes=tuple(shapes),
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in component.outputs],
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return program.model


def _sizes(inputs: Sequence[TensorSpec]) -> dict[str, int]:
    """A size for each symbol of the inputs' shapes."""
    symbols = dict.fromkeys(size for spec in inputs for size in spec.shape if isinstance(size, str))
    others = [symbol for symbol in symbols if symbol not in _TRACED_SIZES]
    return _TRACED_SIZES | {symbol: size for size, symbol in enumerate(others, _FIRST_OTHER_SIZE)}


def _sample(spec: TensorSpec, of_symbols: Mapping[str, int], values: Mapping[str, Any]) -> torch.Tensor:
    if spec.name in values:
        return torch.tensor(values[spec.name], dtype=_TORCH_DTYPES[spec.dtype])
    sizes = [size if isinstance(size, int) else of_symbols[size] for size in spec.shape]
    if spec.dtype == "int64":
        count = math.prod(sizes)
        return torch.ones(sizes, dtype=torch.int64) if count > sizes[-1] else torch.arange(count)
    return torch.zeros(sizes, dtype=_TORCH_DTYPES[spec.dtype])


def _dynamic_axes(spec: TensorSpec) -> dict[int, Any]:
    return {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if isinstance(size, str)}


def _token_table(model: nn.Module) -> ir.Value:
    """The token table as a weight input, under the first of its names, which is what `aliases` keeps."""
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    name = next(name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is table)
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(table.shape))


def _weights_to_inputs(skeleton: ir.Model, parameters: set[str], shared: dict[str, str]) -> None:
    """Parameters become inputs under their checkpoint names (one for a tied pair): then folding is safe."""
    graph = skeleton.graph
    for name in [name for name in graph.initializers if name in parameters]:
        value = graph.initializers.pop(name)
        weight = ir.Value(name=shared.get(name, name), type=value.type, shape=value.shape)
        value.replace_all_uses_with(weight)
        graph.inputs.append(weight)
    onnxscript.optimizer.optimize(skeleton, onnx_shape_inference=False)


def _declare(skeleton: ir.Model, component: Component) -> None:
    """Write the component's names and axes into the graph, and drop what the tracer called its axes inside.

    One symbol must mean one size: a tracer's own symbols for the same length, or one symbol for two lengths, make ONNX
    Runtime re-use a buffer of the wrong size. It infers the inner shapes anew when it loads the graph.
    """
    graph = skeleton.graph
    declared = {spec.name: spec for spec in (*component.inputs, *component.outputs)}
    for value in (*graph.inputs, *graph.outputs):
        if value.name in declared:
            value.shape = ir.Shape(declared[value.name].shape)
    boundary = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
    for node in graph:
        node.metadata_props.clear()
        for output in node.outputs:
            if output not in boundary:
                output.shape = None
                output.metadata_props.clear()
