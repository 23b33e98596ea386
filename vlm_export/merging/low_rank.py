"""What LoRA makes of a weight, computed from its factors alone: W + s·B·A, and DoRA's scaling of its outputs.

Hu et al. 2021 (arXiv 2106.09685), with s = alpha / rank; alpha / √rank of rsLoRA (arXiv 2312.03732); m·V / ‖V‖ of DoRA
(arXiv 2402.09353), where ‖V‖ is that of all that gives one output: a row of V, or a column if V is transposed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vlm_export.tensors.stored import Weight
from vlm_export.tensors.streaming import PART_ELEMENTS

_ROUNDINGS_OF_CHANGE = 8  # merging in float32 rounds ΔW as often as it has ranks
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class LowRank:
    """One module's factors, its s, and DoRA's magnitudes if there are any.

    Attributes:
        a, b: `[rank, in]` and `[out, rank]`, with the sides of the kernel behind if it is a convolution's.
        transposed: whether the weight is `[in, out]`, as those of `Conv1D` and of embeddings are.
    """

    a: Weight
    b: Weight
    scale: float
    magnitude: Weight | None = None
    transposed: bool = False

    def error(self, before: Weight, merged: Weight) -> float:
        """How far a merged weight is from the product by hand: the worst row's share of what it holds.

        Raises:
            ValueError: the factors do not have the weight's sides.
        """
        worst = 0.0
        rows = merged.load().flatten(1)
        for expected, base, start in self._products(before):
            given = rows[start : start + len(base)].double()
            size = base.norm(dim=-1) + _ROUNDINGS_OF_CHANGE * (expected - base).norm(dim=-1)
            found = ((given - expected).norm(dim=-1) / size.clamp_min(_TINY)).max()
            worst = max(worst, float(found)) if not math.isnan(found) else math.nan
            if math.isnan(worst):
                break
        return worst

    def _products(self, before: Weight) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """W as the adapter makes it, W as it was, and the index of their first row; some rows at a time.

        Both are `[rows, columns] float64`.
        """
        if self.magnitude is None:
            yield from self._sums(before)
            return
        magnitude = self.magnitude.load().double().flatten()
        if self.transposed:
            squares = sum((total.square().sum(0) for total, _, _ in self._sums(before)), torch.zeros(()))
            for total, base, start in self._sums(before):
                yield total * (magnitude / squares.sqrt()), base, start
            return
        for total, base, start in self._sums(before):
            factors = magnitude[start : start + len(base)] / total.norm(dim=-1)
            yield total * factors[:, None], base, start

    def _sums(self, before: Weight) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """W + s·B·A and W, in the form that `_products` has: without DoRA's scaling."""
        weight = before.load().flatten(1)
        a, b = self.a.load().double().flatten(1), self.b.load().double().flatten(1)
        left, right = (a.T, b.T) if self.transposed else (b, a)
        if (len(left), right.shape[1]) != tuple(weight.shape):
            raise ValueError(f"{self.a}: its product with B is {[len(left), right.shape[1]]}")
        count = max(1, PART_ELEMENTS // weight.shape[1])
        for start in range(0, len(weight), count):
            base = weight[start : start + count].double()
            yield base + self.scale * (left[start : start + count] @ right), base, start
