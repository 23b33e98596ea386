"""Whether a variant collapsed: one caption for all images, the same words again and again, or none at all.

A cosine near 1 does not tell, because what differs between two images is a small part of every output. Four detectors
look at captions, and at what another image changes in the scores of the next token. Each counts only what PyTorch does
not do itself: where PyTorch says one caption of all images, that is no collapse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from vlm_export.runtime.logits import log_softmax, softmax
from vlm_export.verify import limits
from vlm_export.verify.golden import GoldenCase, GoldenFolder, GoldenImage

# What each metric says, for who reads a model card.
MEANINGS = {
    limits.IMAGE_SWAP: "how well the next token's scores tell two images apart, as a share of how well PyTorch's do",
    limits.DISTINCT_CAPTIONS: "images whose caption is PyTorch's, or is not also said of an image that PyTorch "
    "captions otherwise",
    limits.LOOPING_CAPTIONS: "images whose caption says the same words again and again, as PyTorch's does not",
    limits.EMPTY_CAPTIONS: "images of which nothing is said, as PyTorch does say something",
}
# What is said three times in a row and fills eight tokens is a loop; "a a" and "ha ha ha" are language.
_LOOP_ROUNDS, _LOOP_TOKENS = 3, 8
# Where PyTorch itself hardly tells two images apart, rounding is a large share of it. With this much added to both
# sides of the ratio, a variant that sees no image falls below the limit of 0.3 only where PyTorch tells by 0.23 nats.
_UNTOLD_NATS = 0.1
_LEAST_LOGARITHM = -50.0  # of a probability: a masked token's is -inf, of which no difference can be taken


@dataclass(frozen=True)
class Finding:
    """A detector's value, to be judged by the limit of its metric."""

    metric: str
    value: float
    detail: str


@dataclass(frozen=True)
class ImagePair:
    """A golden case of two images under one text, as far as PyTorch says the same tokens of both.

    `steps` are those tokens, `[2]` each; `scores` `[2, vocabulary] float32` are PyTorch's before each and after the
    last of them.
    """

    case: GoldenCase
    steps: list[list[int]]
    scores: list[np.ndarray]


def of_captions(
    images: Sequence[GoldenImage], token_ids: Sequence[Sequence[int]], texts: Sequence[str]
) -> list[Finding]:
    """What the captions of all images show; `token_ids` and `texts` are a variant's, in the images' order."""
    expected = [image.token_ids for image in images]
    shared = shared_captions(token_ids, expected)
    looping = [
        index
        for index, (own, right) in enumerate(zip(token_ids, expected, strict=True))
        if loops(own) and not loops(right)
    ]
    empty = [
        index
        for index, (text, image) in enumerate(zip(texts, images, strict=True))
        if image.caption.strip() and not text.strip()
    ]
    count = len(images)
    distinct = f"{_distinct(token_ids)} distinct captions of {count} images, {_distinct(expected)} in PyTorch"
    distinct += _named("; not told apart", images, shared)
    return [
        Finding(limits.DISTINCT_CAPTIONS, 1 - len(shared) / count, distinct),
        Finding(limits.LOOPING_CAPTIONS, len(looping) / count, _share(images, looping)),
        Finding(limits.EMPTY_CAPTIONS, len(empty) / count, _share(images, empty)),
    ]


def shared_captions(token_ids: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> list[int]:
    """The images that a variant no longer tells from another: their places.

    The caption of each is not PyTorch's, and is also that of an image which PyTorch captions otherwise.
    """
    pairs = [(tuple(own), tuple(right)) for own, right in zip(token_ids, expected, strict=True)]
    originals: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for own, right in pairs:
        originals.setdefault(own, set()).add(right)
    return [index for index, (own, right) in enumerate(pairs) if own != right and len(originals[own]) > 1]


def loops(token_ids: Sequence[int]) -> bool:
    """Whether a stretch of the tokens is the same few said again and again."""
    return repeated_stretch(token_ids) >= _LOOP_TOKENS


def repeated_stretch(token_ids: Sequence[int]) -> int:
    """The length of the longest stretch that is one sequence of tokens said three times or more in a row, else 0."""
    longest = 0
    for period in range(1, len(token_ids) // _LOOP_ROUNDS + 1):
        repeated = 0
        for token, later in zip(token_ids, token_ids[period:], strict=False):
            repeated = repeated + 1 if token == later else 0
            if repeated >= period * (_LOOP_ROUNDS - 1):
                longest = max(longest, repeated + period)
    return longest


def image_pair(golden: GoldenFolder) -> ImagePair | None:
    """The golden case whose two images PyTorch tells apart best; None where no case has two."""
    pairs = [_pair(golden, case) for case in golden.facts.cases if case.batch == 2]
    return max(pairs, key=lambda pair: sum(nats_apart(scores, scores) for scores in pair.scores), default=None)


def _pair(golden: GoldenFolder, case: GoldenCase) -> ImagePair:
    steps = list(takewhile(lambda tokens: tokens[0] == tokens[1], case.step_token_ids))
    names = ["prefill", *(f"step{index}" for index in range(len(steps)))]
    return ImagePair(case, steps, [golden.case(case.name)[f"{name}.logits"][:, -1] for name in names])


def image_swap(scores: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> Finding:
    """How well a variant tells two images apart, as a share of how well PyTorch does.

    1 is as well, 0 not at all, and below 0 it takes one for the other. Both are a list of scores of the next token,
    `[2, vocabulary] float32`, a row for each image behind the same tokens.
    """
    told = sum(nats_apart(own, right) for own, right in zip(scores, expected, strict=True))
    tellable = sum(nats_apart(right, right) for right in expected)
    share = (told + _UNTOLD_NATS) / (tellable + _UNTOLD_NATS)
    detail = f"tells two images apart by {told:.3g} nats, PyTorch by {tellable:.3g}"
    return Finding(limits.IMAGE_SWAP, share, detail)


def nats_apart(scores: np.ndarray, expected: np.ndarray) -> float:
    """How surely `scores` say which of two images a token of PyTorch's was said of: the mean over both, in nats.

    For PyTorch's own scores, it is the KL divergence between the two images' distributions, the mean of both ways.
    A variant's own divergence would not do: captions that have nothing to do with the image, and differ, have a large
    one. Of real-captioner with its tower's last layer in 4 levels it is 12.9, where PyTorch's is 9.1 and this is -1.0.
    Both are `[2, vocabulary] float32`. NaN where a score is no number.
    """
    with np.errstate(invalid="ignore"):
        logarithms = np.maximum(log_softmax(scores.astype(np.float64)), _LEAST_LOGARITHM)
        likely = softmax(expected.astype(np.float64))
    return float(((likely[0] - likely[1]) * (logarithms[0] - logarithms[1])).sum() / 2)


def _distinct(token_ids: Sequence[Sequence[int]]) -> int:
    return len({tuple(ids) for ids in token_ids})


def _share(images: Sequence[GoldenImage], places: Sequence[int]) -> str:
    return f"{len(places)} of {len(images)} images" + _named("", images, places)


def _named(words: str, images: Sequence[GoldenImage], places: Sequence[int]) -> str:
    """The first five files at these places, behind some words; nothing where there are none."""
    return f"{words}: {', '.join(images[place].file for place in places[:5])}" if places else ""
