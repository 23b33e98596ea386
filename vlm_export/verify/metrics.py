"""How two results are compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def max_relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    """`max |value - reference| / max |reference|`: relative to the largest element, so that zeros do not count.

    NaN anywhere gives NaN, which passes no limit.
    """
    difference = np.abs(value.astype(np.float64) - reference.astype(np.float64))
    return float(difference.max() / max(float(np.abs(reference).max()), np.finfo(np.float32).tiny))


def cosine_similarity(value: np.ndarray, reference: np.ndarray) -> float:
    """The lowest cosine between corresponding rows (last axis); of two rows of zeros it is 1, of one of them 0.

    A padding token's embedding, and so its keys and values in the first layer, are zeros in many models.
    """
    left, right = (array.astype(np.float64).reshape(-1, array.shape[-1]) for array in (value, reference))
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosines = (left * right).sum(axis=1) / np.maximum(norms, np.finfo(np.float32).tiny)
    return float(np.where(left.any(axis=1) | right.any(axis=1), cosines, 1.0).min())


def agreement(left: Sequence[int], right: Sequence[int]) -> float:
    """Share of equal places in two sequences of one length."""
    return sum(a == b for a, b in zip(left, right, strict=True)) / len(right)


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """The first place where two sequences differ (a missing element differs), or None."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))
