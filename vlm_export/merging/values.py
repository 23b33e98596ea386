"""The values of tensors, a part at a time: what compares or sums them never copies a large one whole."""

from __future__ import annotations

import torch

from vlm_export.tensors.stored import Weight
from vlm_export.tensors.streaming import PART_ELEMENTS


def parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The values of a tensor, flat, in parts of `PART_ELEMENTS` at most, small enough to be copied."""
    return tensor.reshape(-1).split(PART_ELEMENTS)


def finite(tensor: torch.Tensor) -> bool:
    """Whether there is no NaN and no Inf."""
    return all(bool(torch.isfinite(part).all()) for part in parts(tensor))


def equal(one: Weight, other: Weight) -> bool:
    """Whether two weights hold the same values, in whatever dtypes."""
    if one.shape != other.shape:
        return False
    a, b = one.load(), other.load()
    both = torch.promote_types(a.dtype, b.dtype)
    return all(torch.equal(x.to(both), y.to(both)) for x, y in zip(parts(a), parts(b), strict=True))
