"""A model on its way through its adapters: its weights before and after each, computed when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vlm_export.merging import adapters
from vlm_export.merging.adapters import Adapter, Attached
from vlm_export.merging.layer_proof import Placed
from vlm_export.source.checkpoint import Checkpoint, build_empty
from vlm_export.tensors.stored import Weight

_HALF_PRECISION = ("F16", "BF16")


@dataclass(frozen=True)
class Version:
    """The model after some of its adapters: its config, and every parameter's weight, tied ones once."""

    checkpoint: Checkpoint
    weights: Mapping[str, Weight]

    def build(self) -> nn.Module:
        """The model without weights that the version's config describes."""
        return build_empty(self.checkpoint)

    def values(self, model: nn.Module) -> dict[nn.Parameter, Weight]:
        """The weights by the parameters of a model that `build` returned."""
        return {parameter: self.weights[name] for name, parameter in model.named_parameters()}

    def placed(self) -> Placed:
        """A model without weights, with the weight of each of its parameters."""
        model = self.build()
        return Placed(model, self.values(model))


@dataclass(frozen=True)
class Step:
    """One adapter on the version before it.

    `values` has every parameter of the attached model that is used; `replaced` says by which weight the adapter
    replaces which.
    """

    before: Version
    adapter: Adapter
    attached: Attached
    values: Mapping[nn.Parameter, Weight]
    replaced: Sequence[tuple[Weight, Weight]]
    after: Version


@dataclass(frozen=True)
class Merged:
    """A parameter of a layer that PEFT merges each time it is asked for: in float32, and not rounded back."""

    layer: nn.Module
    name: str
    values: Mapping[nn.Parameter, Weight]
    before: Weight

    @property
    def dtype(self) -> str:
        """F32 where the weight before is in half precision, else its dtype."""
        return "F32" if self.before.dtype in _HALF_PRECISION else self.before.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight before, which merging keeps."""
        return self.before.shape

    @property
    def origin(self) -> Weight:
        """The weight on disk that adapters were merged into."""
        return self.before.origin if isinstance(self.before, Merged) else self.before

    def load(self) -> torch.Tensor:
        """Let PEFT merge the layer, and return this parameter of it, float32."""
        return adapters.merged_parameters(self.layer, self.values)[self.name]

    def rounded(self, value: torch.Tensor) -> torch.Tensor:
        """What would be left of `value` in the form of the weight on disk."""
        return self.origin.rounded(value)


def origin_of(weight: Weight) -> Weight:
    """The weight on disk that adapters were merged into, or the weight itself where none was."""
    return weight.origin if isinstance(weight, Merged) else weight
