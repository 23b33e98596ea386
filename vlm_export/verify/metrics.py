"""How two results are compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm_export.runtime.logits import log_softmax


def max_relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    """`max |value - reference| / max |reference|`: relative to the largest element, so that zeros do not count.

    NaN anywhere gives NaN, which passes no limit.
    """
    difference = np.abs(value.astype(np.float64) - reference.astype(np.float64))
    return float(difference.max() / max(float(np.abs(reference).max()), np.finfo(np.float32).tiny))


def largest_difference(scores: np.ndarray, expected: np.ndarray) -> float:
    """`max |scores - expected| / max |expected|` of the tokens that can come; infinite where others can, or not these.

    Both are `[vocabulary] float32`; a token that cannot come has the score -inf.
    """
    can_come = np.isfinite(expected)
    if scores.shape != expected.shape or not np.array_equal(np.isneginf(scores), ~can_come):
        return float("inf")
    return max_relative_error(scores[can_come], expected[can_come])


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


def nats_lost(scores: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The KL divergence, in nats, of each row's distribution from the one that is expected: `[rows] float64`.

    0 where they are equal, NaN where a score is no number. Both are scores before softmax, `[rows, vocabulary]
    float32`; one of -inf is a token that cannot come, which makes the divergence infinite where it is expected to.
    """
    with np.errstate(invalid="ignore"):
        own, right = (log_softmax(array.astype(np.float64)) for array in (scores, expected))
    likely = np.exp(right)
    lost = np.zeros_like(likely)
    np.subtract(right, own, out=lost, where=likely > 0)
    return (likely * lost).sum(axis=-1)


def rouge_l(candidate: str, reference: str) -> float:
    """ROUGE-L of two texts: the F1 of the words that both have, in one order; 1 for equal words, 0 for none in common.

    With `LCS` the length of the longest common subsequence of words, recall is `LCS / len(reference)`, precision
    `LCS / len(candidate)`, and F1 is `2 · recall · precision / (recall + precision)`: Lin 2004, "ROUGE: A Package for
    Automatic Evaluation of Summaries", section 3.1, equations 2 to 4 with β = 1. Words are what white space parts; two
    texts without any are equal.
    """
    left, right = candidate.split(), reference.split()
    if not left and not right:
        return 1.0
    return 2 * _common_subsequence(left, right) / (len(left) + len(right))


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """The length of the longest sequence that comes of both by leaving elements out."""
    lengths = [0] * (len(right) + 1)  # against each beginning of `right`
    for word in left:
        before = lengths
        lengths = [0]
        for place, other in enumerate(right):
            lengths.append(before[place] + 1 if word == other else max(before[place + 1], lengths[place]))
    return lengths[-1]
