"""What proves a merge: layers, compared one by one in float64, then the logits of the whole model.

A right merge differs from PEFT's base + adapter by the rounding of merged weights to float32, and by nothing else. In
logits that is lost among the roundings of a forward in float32 (4e-4 in 20 on a decoder of 30 layers), and what a layer
adds to them may be less still. So each layer that PEFT adapts is called by itself, in float64, on inputs made up for
it: random ones see every entry of a matrix alike, where those of a real image see what is large in them. The logits
then show that the layers are where they belong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from vlm_export.spec.family import Family
from vlm_export.tensors.stored import Weight
from vlm_export.tensors.streaming import PART_ELEMENTS, Streamed

# One rounding to float32 is 6e-8 of a weight (2^-24). A merge rounds W + ΔW once, DoRA's scale of it a few times more,
# and ΔW as often as it has ranks. So a row may be wrong by 8 roundings of W, and by eight times as many of its ΔW.
# Measured on SmolLM2-135M with a ΔW of 1 % in 120 layers: right merges 4e-8 to 6e-8; 0.1 % too much of one ΔW at least
# 1.6e-5, which in the logits, in float64, may be 1.25e-7, as it is without the fault. ΔW that is 0.1 % off passes only
# where it is below 0.05 % of W.
MAX_LAYER_ERROR = 8 * 2**-24
_ROUNDINGS_OF_CHANGE = 8
# Logits as close as this in float32 are equal (the same right merge: 7e-6); where they are not, float64 decides, where
# weights alone are rounded (1.2e-7).
MAX_LOGITS_ERROR = 1e-5
MAX_WIDE_LOGITS_ERROR = 1e-6
_PROBES = 16
_TINY = torch.finfo(torch.float32).tiny
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_AFFINE = (nn.Linear, Conv1D, *_CONVOLUTIONS)
_PROBED_KINDS = (*_AFFINE, nn.Embedding)

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
_Rows = tuple[torch.Tensor, int]  # numbers, and along which axis they are one row


@dataclass(frozen=True)
class Placed:
    """A model without weights, and where each of its parameters' values lies."""

    model: nn.Module
    values: Mapping[nn.Parameter, Weight]

    def logits(
        self, family: Family, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Logits of the reference's first run, `[batch, positions, vocabulary]`.

        Its weights are read from disk operation by operation, and computed with in `dtype`.
        """
        with torch.no_grad(), self._streamed(dtype):
            return family.reference(self.model).prefill(inputs).logits

    def layer(self, name: str, call: Call) -> Any:
        """What one module computes, in float64."""
        with torch.no_grad(), self._streamed(torch.float64):
            return self.model.get_submodule(name)(*call[0], **call[1])

    def _streamed(self, dtype: torch.dtype) -> Streamed:
        return Streamed({parameter: weight.load for parameter, weight in self.values.items()}, dtype)


@dataclass(frozen=True)
class LayerProof:
    """A merged layer beside PEFT's.

    Attributes:
        error: the worst row's difference, as a share of its size; rows are what one row of the weight gives.
        effective: whether rounding took less than half of what the adapter changes.
    """

    name: str
    error: float
    effective: bool


@dataclass(frozen=True)
class _Probe:
    """One call of a layer, and the rows that its output is judged by."""

    call: Call
    rows: Callable[[Any], list[_Rows]]


def prove_layer(
    name: str, before: Placed, adapted: Placed, merged: Placed, seen: Mapping[str, Call]
) -> LayerProof | None:
    """Compare one layer; None where inputs cannot be made up for such a module, and `seen` has none for it."""
    errors, change, loss = [], 0.0, 0.0
    for probe in _probes(before.model.get_submodule(name), seen.get(name)):
        outputs = [probe.rows(placed.layer(name, probe.call)) for placed in (before, adapted, merged)]
        for (base, axis), (expected, _), (given, _) in zip(*outputs, strict=True):
            changes, losses = (expected - base).norm(dim=axis), (given - expected).norm(dim=axis)
            size = base.norm(dim=axis) + _ROUNDINGS_OF_CHANGE * changes
            errors.append((losses / size.clamp_min(_TINY)).max())
            change, loss = change + float(changes.square().sum()), loss + float(losses.square().sum())
    return LayerProof(name, float(torch.stack(errors).max()), change > 4 * loss) if errors else None


@contextmanager
def calls(adapted: nn.Module, before: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Call]]:
    """Within, the first call of each of those modules that no inputs can be made up for is kept, by name."""
    seen: dict[str, Call] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault(name, (args, kwargs))

        return hook

    hooks = [
        adapted.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True)
        for name in names
        if not isinstance(before.get_submodule(name), _PROBED_KINDS)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _probes(module: nn.Module, call: Call | None) -> Iterator[_Probe]:
    """Inputs made up for a matrix or a table, else what the module was called with, if it was."""
    if isinstance(module, nn.Embedding):
        count = max(1, PART_ELEMENTS // 4 // module.embedding_dim)
        for ids in torch.arange(module.num_embeddings).split(count):
            yield _Probe(((ids[None],), {}), lambda output: [(output, -1)])
    elif isinstance(module, _AFFINE):
        yield _Probe(((_random_inputs(module),), {}), _bias_and_rows)
    elif call is not None:
        yield _Probe(call, _whole)


def _random_inputs(module: nn.Module) -> torch.Tensor:
    """Zeros, for which nothing but the bias is computed, then `_PROBES` random inputs, float64."""
    if isinstance(module, _CONVOLUTIONS):
        sides = zip(module.kernel_size, module.dilation, strict=True)
        shape = (module.in_channels, *(dilation * (side - 1) + 1 for side, dilation in sides))
    else:
        weight: Any = module.weight
        shape = (weight.shape[0 if isinstance(module, Conv1D) else 1],)
    inputs = torch.randn(1 + _PROBES, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs[0] = 0
    return inputs


def _bias_and_rows(output: torch.Tensor) -> list[_Rows]:
    """A bias may be a hundred times as large as what is added to it, and would hide it."""
    return [(output[:1], 0), (output[1:] - output[:1], 0)]


def _whole(output: Any) -> list[_Rows]:
    """Every tensor of numbers in an output as one row: where a module's zeros lie is not known."""
    return [(leaf.reshape(-1), 0) for leaf in tree_leaves(output) if _is_numbers(leaf)]


def _is_numbers(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def logits_error(
    family: Family,
    inputs: Mapping[str, torch.Tensor],
    adapted: torch.Tensor,
    merged: torch.Tensor,
    models: tuple[Placed, Placed],
) -> tuple[float, float]:
    """How far merged logits are from adapted ones, of their size, and the limit that this must not exceed.

    `adapted` and `merged` are what `models` gave in float32. Where they are not as good as equal, both are run in
    float64. Only the rounding of merged weights is different there, and that does less than all the roundings of a run
    in float32 do, which are seen beside it: so the limit holds at any depth.
    """
    error = relative(merged, adapted)
    if error <= MAX_LOGITS_ERROR:
        return error, MAX_LOGITS_ERROR
    wide_adapted, wide_merged = (placed.logits(family, inputs, torch.float64) for placed in models)
    return relative(wide_merged, wide_adapted), max(MAX_WIDE_LOGITS_ERROR, relative(merged, wide_merged))


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value; NaN if there is one."""
    pairs = [((a - b).abs().max(), b.abs().max()) for a, b in zip(one, other, strict=True)]
    differences, sizes = (torch.stack(values).max() for values in zip(*pairs, strict=True))
    return float(differences / sizes.clamp_min(_TINY))
