"""Stacks of alike layers in a model, and the two-layer model and component that stand for them in a trace.

What an export costs should not grow with depth: layers that are alike are traced once and repeated in the graph
(`rewrites/repeat_layers.py`). Layer 0 is traced as well, because what all layers share is computed in it. Where kinds
of layers take turns (Gemma 3's windows, SmolLM3's layers without rotary embedding), a period of them is such a layer.
Layers of other kinds that come first (those of Qwen3-VL that take features of an image) are traced whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vlm_export.spec import cache
from vlm_export.spec.graph import Component, TensorSpec

TRACED = 2  # periods of a stack that are traced: the first, and the one that is repeated
_PLAIN_TYPES = (bool, int, float, complex, str, type(None), torch.dtype, torch.Size, type)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Stack:
    """`layers` layers in the module list `path` of a model; `cached` if the component's cache is theirs.

    Those `period` apart are alike, but for the `leading` ones: what is left over of whole periods, and of other kinds.
    """

    path: str
    layers: int
    cached: bool = False
    period: int = 1
    leading: int = 0

    @property
    def traced(self) -> int:
        """How many layers are traced: the leading ones, and two periods."""
        return self.leading + TRACED * self.period


def find_stacks(
    component: Component, model: nn.Module, whole: Mapping[str, str]
) -> tuple[tuple[Stack, ...], dict[str, str]]:
    """Returns the stacks of a component that can be repeated, and for each other one, by path, why it cannot.

    `whole` are stacks that are known beforehand not to repeat, with the reason.
    """
    used = set(component.module(model).modules())
    cached = _cached_layers((*component.trace_signature, *component.outputs))
    stacks: list[Stack] = []
    refused: dict[str, str] = {}
    for path, layers in _module_lists(model):
        if layers not in used:
            continue
        lists = _lists_in_config(model, path, len(layers))
        period, leading = _pattern(lists, len(layers))
        stack = Stack(path, len(layers), len(layers) == cached, period, leading)
        difference = whole.get(path) or _difference(layers, stack) or _list_difference(lists, stack)
        if difference:
            refused[path] = difference
        else:
            stacks.append(stack)
    if sum(stack.cached for stack in stacks) > 1:
        return (), refused | {stack.path: "another stack is as deep: the cache could be of either" for stack in stacks}
    return tuple(stacks), refused


@contextmanager
def two_layers(model: nn.Module, stacks: Iterable[Stack]) -> Iterator[None]:
    """Cut the stacks of a model to their first two layers, or periods, while the block runs."""
    whole: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for stack in stacks:
            parent, _, name = stack.path.rpartition(".")
            owner, layers = model.get_submodule(parent), model.get_submodule(stack.path)
            whole.append((owner, name, layers))
            setattr(owner, name, nn.ModuleList(list(layers.children())[: stack.traced]))
        yield
    finally:
        for owner, name, layers in whole:
            setattr(owner, name, layers)


def two_layer_component(component: Component, stacks: Iterable[Stack]) -> Component:
    """The component as a model cut by `two_layers` has it: with two layers of cache, if the cache is a stack's."""
    traced = next((stack.traced for stack in stacks if stack.cached), None)
    if traced is None:
        return component
    return replace(
        component,
        inputs=_first_layers(component.inputs, traced),
        outputs=_first_layers(component.outputs, traced),
        traced_inputs=_first_layers(component.traced_inputs, traced),
    )


def _first_layers(specs: Sequence[TensorSpec], traced: int) -> tuple[TensorSpec, ...]:
    return tuple(spec for spec in specs if _cached_layers([spec]) <= traced)


def _cached_layers(specs: Iterable[TensorSpec]) -> int:
    """How many layers have a cache among these tensors."""
    layers = (cache.layer_of(spec.name) for spec in specs)
    return max((layer + 1 for layer in layers if layer is not None), default=0)


def _module_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The outermost module lists that are worth repeating: more layers than are traced, all with parameters.

    A list of lists is none: it holds the stages of a tower, each of which is a stack.
    """
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer, _ in found) or not isinstance(module, nn.ModuleList):
            continue
        if any(isinstance(layer, nn.ModuleList) for layer in module):
            continue
        if len(module) > TRACED and all(next(layer.parameters(), None) is not None for layer in module):
            found.append((path, module))
    return found


def _difference(layers: nn.ModuleList, stack: Stack) -> str | None:
    """How layers of one kind differ, or None: module types, parameters, buffers and plain attributes.

    Those after the traced ones are compared with the second traced of their kind; `repeat_layers` compares the first.
    """
    owners: dict[int, int] = {}
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            if owners.setdefault(id(parameter), index) != index:
                return f"layers {owners[id(parameter)]} and {index} share {name}"
    for index in range(stack.traced, len(layers)):
        model = stack.traced - stack.period + (index - stack.traced) % stack.period
        expected, modules = (dict(layers[i].named_modules()) for i in (model, index))
        if modules.keys() != expected.keys():
            return f"layers {model} and {index} differ in {min(modules.keys() ^ expected.keys())}"
        for name, module in modules.items():
            difference = _module_difference(expected[name], module, model, index)
            if difference:
                return f"layers {model} and {index} differ in {'.'.join(part for part in (name, difference) if part)}"
    return None


def _module_difference(expected: nn.Module, module: nn.Module, model: int, index: int) -> str | None:
    """The name of what differs between a module of layer `model` and the same of layer `index`, or None."""
    if type(expected) is not type(module):
        return f"{type(expected).__name__} and {type(module).__name__}"
    for tensors, others in ((expected._parameters, module._parameters), (expected._buffers, module._buffers)):
        if tensors.keys() != others.keys():
            return min(tensors.keys() ^ others.keys())
        for name, tensor in tensors.items():
            if not _alike(tensor, others[name]):
                return name
    ours, theirs = attributes(expected), attributes(module)
    if ours.keys() != theirs.keys():
        return min(ours.keys() ^ theirs.keys())
    return next((name for name in ours if not _same(ours[name], theirs[name], model, index)), None)


def _alike(expected: torch.Tensor | None, tensor: torch.Tensor | None) -> bool:
    """Same shape and type, and for what is no parameter the same values: a buffer is a constant of the graph."""
    if expected is None or tensor is None:
        return expected is tensor
    if (expected.shape, expected.dtype) != (tensor.shape, tensor.dtype):
        return False
    return isinstance(expected, nn.Parameter) or expected.is_meta or torch.equal(expected, tensor)


def attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes that a module's own class has set on it, by name."""
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def _same(expected: Any, value: Any, model: int, index: int) -> bool:
    """Whether attributes of two layers are alike: equal, or of one type where equality says nothing.

    Each layer's own index, from 0 or 1, counts as alike; `model` and `index` are the layers'.
    """
    if type(expected) is int and type(value) is int and (expected - model, value - index) in ((0, 0), (1, 1)):
        return True
    if isinstance(expected, (list, tuple)) and isinstance(value, (list, tuple)) and len(expected) == len(value):
        return all(_same(one, other, model, index) for one, other in zip(expected, value, strict=True))
    if isinstance(expected, _PLAIN_TYPES) or isinstance(value, _PLAIN_TYPES):
        return type(expected) is type(value) and expected == value
    return type(expected) is type(value)


def _lists_in_config(model: nn.Module, path: str, layers: int) -> dict[str, Sequence[Any]]:
    """Lists in a config around the stack with one entry a layer (`layer_types`)."""
    parts = path.split(".")[:-1]
    found: dict[str, Sequence[Any]] = {}
    for depth in range(len(parts) + 1):
        config = getattr(model.get_submodule(".".join(parts[:depth])), "config", None)
        for name, value in vars(config).items() if hasattr(config, "__dict__") else ():
            if isinstance(value, (list, tuple)) and len(value) == layers:
                found[name] = value
    return found


def _pattern(lists: Mapping[str, Sequence[Any]], layers: int) -> tuple[int, int]:
    """After how many layers the kinds in all the lists repeat, and how many come before; 1 and 0 if they never do.

    That of which the fewest layers are traced.
    """
    found: list[Stack] = []
    for period in range(1, layers // TRACED):
        for leading in range(layers % period, layers - TRACED * period, period):
            stack = Stack("", layers, period=period, leading=leading)
            if all(
                values[i] == values[i - period] for values in lists.values() for i in range(leading + period, layers)
            ):
                found.append(stack)
                break
    best = min(found, key=lambda stack: stack.traced, default=Stack("", layers))
    return best.period, best.leading


def _list_difference(lists: Mapping[str, Sequence[Any]], stack: Stack) -> str | None:
    """What says that layers which should be alike are not, but for the first of each kind."""
    period = stack.period
    for name, values in lists.items():
        if any(values[i] != values[i - period] for i in range(stack.traced, stack.layers)):
            return f"layers differ in the config's {name}"
    return None
