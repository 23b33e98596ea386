"""Compare what was written with what PEFT computes, and with W + s·B·A by hand, each adapter on its own version."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vlm_export.errors import CheckFailed
from vlm_export.merging import layer_proof
from vlm_export.merging.layer_proof import LayerProof, Placed
from vlm_export.merging.low_rank import LowRank
from vlm_export.merging.states import Merged, Step, Version
from vlm_export.merging.values import equal
from vlm_export.source.checkpoint import open_checkpoint


@dataclass(frozen=True)
class Proof:
    """What was seen of a merge that is right: the numbers of `MergeReport`, and what could not be compared."""

    versus_adapter: float
    versus_base: float
    worst: LayerProof | None
    by_hand: int
    not_by_hand: Sequence[str]
    warnings: Sequence[str]


def prove(base: Version, steps: Sequence[Step], folder: Path) -> Proof:
    """Compare what was written with what PEFT computes, every adapter on what it was merged into.

    Raises:
        CheckFailed: a merge is not what PEFT computes, what was to be copied was not, or an adapter does not matter.
    """
    family = base.checkpoint.family
    inputs = family.sample_inputs(base.checkpoint.config, torch.Generator().manual_seed(0))
    checkpoint = open_checkpoint(folder)
    written = Version(checkpoint, checkpoint.tensors)
    _check_copies(steps[-1].after, written)
    first = base.placed().logits(family, inputs)
    worst: list[LayerProof] = []
    versus_adapter, by_hand = 0.0, 0
    not_by_hand: list[str] = []
    warnings: list[str] = []
    for step in steps:
        before, adapted = step.before.placed(), Placed(step.attached.model, step.values)
        merged = (written if step is steps[-1] else step.after).placed()
        with layer_proof.calls(adapted.model, before.model, step.attached.layers) as seen:
            expected = adapted.logits(family, inputs)
        found = {name: layer_proof.prove_layer(name, before, adapted, merged, seen) for name in step.attached.layers}
        layers = [layer for layer in found.values() if layer is not None]
        _check_layers(step, layers)
        warnings += [
            f"{step.adapter.source}: {name}: nothing called it, so its merge was not compared with what PEFT computes"
            for name, layer in found.items()
            if layer is None
        ]
        worst += layers
        products, left_out = step.adapter.products(step.before.build())
        by_hand += _check_products(step, products, written if step is steps[-1] else step.after)
        not_by_hand += left_out
        logits = merged.logits(family, inputs)
        error, limit = layer_proof.logits_error(family, inputs, expected, logits, (adapted, merged))
        if not error <= limit:
            raise CheckFailed(
                f"{step.adapter.source}: merged logits differ from base + adapter by {error:.1e} "
                f"(limit {limit:.1e}): the merge is wrong, nothing was written"
            )
        versus_adapter = max(versus_adapter, error)
    return Proof(versus_adapter, layer_proof.relative(logits, first), _worst(worst), by_hand, not_by_hand, warnings)


def _check_copies(last: Version, written: Version) -> None:
    """Raises CheckFailed unless all that no adapter was merged into was written as it was read."""
    for name, weight in last.weights.items():
        if not isinstance(weight, Merged) and not equal(weight, written.weights[name]):
            raise CheckFailed(
                f"{weight}: written as {name}, it is not what was read: the merge is wrong, nothing was written"
            )


def _check_products(step: Step, products: Mapping[str, LowRank], after: Version) -> int:
    """Each merged weight is W + s·B·A, with s from the adapter's files: PEFT might compute and merge a wrong one.

    Returns:
        How many were compared.
    """
    compared = 0
    for name, product in products.items():
        before, merged = step.after.weights.get(name), after.weights.get(name)
        if not isinstance(before, Merged) or merged is None:  # tied to another that is
            continue
        compared += 1
        error = product.error(before.before, merged)
        if not error <= layer_proof.MAX_LAYER_ERROR:
            raise CheckFailed(
                f"{step.adapter.source}: {name}, merged, differs from W + s·B·A by {error:.1e} (limit "
                f"{layer_proof.MAX_LAYER_ERROR:.1e}; s = {product.scale:g}): the merge is wrong, nothing was written"
            )
    return compared


def _check_layers(step: Step, layers: Sequence[LayerProof]) -> None:
    worst = _worst(layers)
    if worst is not None and not worst.error <= layer_proof.MAX_LAYER_ERROR:
        raise CheckFailed(
            f"{step.adapter.source}: {worst.name}, merged, differs from base + adapter by {worst.error:.1e} "
            f"(limit {layer_proof.MAX_LAYER_ERROR:.1e}): the merge is wrong, nothing was written"
        )
    if layers and not any(layer.effective for layer in layers) and all(equal(*pair) for pair in step.replaced):
        raise CheckFailed(
            f"{step.adapter.source}: has no effect: what it adds is lost in rounding; nothing was written"
        )


def _worst(layers: Sequence[LayerProof]) -> LayerProof | None:
    """The layer with the largest error; NaN is larger than any number."""
    return max(layers, key=lambda layer: (math.isnan(layer.error), layer.error), default=None)
