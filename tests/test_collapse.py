"""Each detector of a collapse fires on one, and not on what PyTorch does too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from vlm_export.dtypes import DTYPES
from vlm_export.runtime.logits import log_softmax
from vlm_export.verify import collapse, limits
from vlm_export.verify.collapse import Finding
from vlm_export.verify.golden import Golden, GoldenCase, GoldenFolder, GoldenImage

END = 0
CAT, DOG, BIRD, FISH = ([number, 9, END] for number in (1, 2, 3, 4))
LOOP = [1, *[5, 6] * 6]


def images(token_ids: Sequence[Sequence[int]]) -> list[GoldenImage]:
    return [
        GoldenImage(f"{index}.png", "", "", "", list(ids), text(ids), [1.0] * len(ids))
        for index, ids in enumerate(token_ids)
    ]


def text(token_ids: Sequence[int]) -> str:
    """A letter a token; 10 is a space, and the end is nothing."""
    return "".join(" " if token == 10 else chr(ord("a") + token) for token in token_ids if token != END)


def found(expected: Sequence[Sequence[int]], said: Sequence[Sequence[int]]) -> dict[str, Finding]:
    findings = collapse.of_captions(images(expected), said, [text(ids) for ids in said])
    return {finding.metric: finding for finding in findings}


def fired(expected: Sequence[Sequence[int]], said: Sequence[Sequence[int]]) -> set[str]:
    """The metrics whose limit does not hold."""
    return {metric for metric, finding in found(expected, said).items() if not holds(finding)}


def holds(finding: Finding) -> bool:
    limit = limits.limit_for(finding.metric, "int8")
    assert limit is not None
    return limit.holds(finding.value)


@pytest.mark.parametrize("dtype", [*DTYPES, "a dtype of another day"])
def test_every_dtype_is_judged_alike(dtype: str) -> None:
    assert set(collapse.MEANINGS) == set(limits.COLLAPSE)
    for metric in limits.COLLAPSE:
        assert limits.limit_for(metric, dtype) == limits.limit_for(metric, "fp32") != None  # noqa: E711


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        ([CAT, DOG], [CAT, CAT]),
        ([CAT, DOG, BIRD, FISH], [[7, END]] * 4),
        ([CAT, DOG, BIRD, FISH], [DOG] * 4),
        ([CAT, CAT, DOG, DOG], [BIRD] * 4),
    ],
)
def test_one_caption_for_all_images(expected: list[list[int]], said: list[list[int]]) -> None:
    assert fired(expected, said) == {limits.DISTINCT_CAPTIONS}


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        ([CAT] * 4, [CAT] * 4),
        ([CAT] * 4, [DOG] * 4),  # wrong, and not less distinct than PyTorch's
        ([CAT, CAT, CAT, DOG], [CAT] * 4),  # PyTorch has few: one that is wrong is no collapse
        ([CAT, CAT, DOG, DOG], [DOG, DOG, CAT, CAT]),
        ([CAT, DOG, BIRD, FISH], [CAT, DOG, BIRD, BIRD]),
    ],
)
def test_few_captions_are_no_collapse_where_pytorch_has_few(expected: list[list[int]], said: list[list[int]]) -> None:
    assert fired(expected, said) == set()


def test_a_finding_names_the_images() -> None:
    finding = found([CAT, DOG, BIRD, FISH], [CAT, CAT, CAT, FISH])[limits.DISTINCT_CAPTIONS]
    assert (finding.value, finding.detail) == (
        0.5,
        "2 distinct captions of 4 images, 4 in PyTorch; not told apart: 1.png, 2.png",
    )


@pytest.mark.parametrize(
    ("token_ids", "length"),
    [
        ([7] * 12, 12),
        ([1, 2, 3, *[7] * 9, END], 9),
        (LOOP, 12),
        ([5, 6, 7, 8] * 3, 12),
        ([5, 6, 7, 8, 5, 6, 7, 8], 0),  # twice is no loop
        ([1, 1], 0),
        ([1, 2, 3, 4], 0),
        ([], 0),
    ],
)
def test_the_longest_repeated_stretch(token_ids: list[int], length: int) -> None:
    assert collapse.repeated_stretch(token_ids) == length
    assert collapse.loops(token_ids) == (length >= 8)


@pytest.mark.parametrize("said", [[7] * 30, LOOP, [1, 2, *[5, 6, 7] * 4]])
def test_the_same_words_again_and_again(said: list[int]) -> None:
    assert fired([CAT, DOG, BIRD], [CAT, DOG, said]) == {limits.LOOPING_CAPTIONS}
    assert found([CAT, DOG, BIRD], [CAT, DOG, said])[limits.LOOPING_CAPTIONS].detail == "1 of 3 images: 2.png"


@pytest.mark.parametrize("said", [[1, 1, END], [7, 7, 7, END], [5, 6, 5, 6, 5, 6, END], [1, 2, 3, 8, 1, 2, 3, 9, END]])
def test_repetition_that_language_has_is_no_loop(said: list[int]) -> None:
    assert fired([CAT, DOG], [CAT, said]) == set()


def test_a_loop_of_pytorchs_own_is_no_collapse() -> None:
    assert fired([LOOP, CAT], [[2, *LOOP], CAT]) == set()


@pytest.mark.parametrize("said", [[END], [], [10, 10, END]])
def test_an_empty_caption(said: list[int]) -> None:
    assert fired([CAT, DOG], [CAT, said]) == {limits.EMPTY_CAPTIONS}
    assert fired([CAT, said], [CAT, [END]]) == set(), "PyTorch says nothing of it either"
    assert fired([CAT, DOG], [CAT, [2, END]]) == set(), "short is not empty"


def scores(seed: int = 0) -> np.ndarray:
    """PyTorch's, of two images: `[2, vocabulary] float32`."""
    return np.random.default_rng(seed).normal(scale=3, size=(2, 50)).astype(np.float32)


def test_nats_of_pytorchs_own_scores_are_the_divergence_both_ways() -> None:
    first, second = log_softmax(scores().astype(np.float64))
    ways = [(np.exp(left) * (left - right)).sum() for left, right in ((first, second), (second, first))]
    assert collapse.nats_apart(scores(), scores()) == pytest.approx(np.mean(ways))


def test_scores_that_do_not_depend_on_the_image() -> None:
    blind = np.repeat(scores()[:1], 2, axis=0)
    finding = collapse.image_swap([blind], [scores()])
    assert 0 < finding.value < 0.05 and not holds(finding)
    assert finding.detail.startswith("tells two images apart by 0 nats, PyTorch by ")
    assert collapse.image_swap([scores()[::-1]], [scores()]).value < 0, "one for the other"


def test_gibberish_that_differs_from_image_to_image_has_a_large_divergence_and_tells_nothing() -> None:
    gibberish, expected = scores(1), scores()
    assert collapse.nats_apart(gibberish, gibberish) > 0.5 * collapse.nats_apart(expected, expected)
    assert not holds(collapse.image_swap([gibberish], [expected]))


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_rounding_is_no_collapse(noise: float) -> None:
    expected = scores()
    rounded = expected + np.random.default_rng(1).normal(scale=noise, size=expected.shape).astype(np.float32)
    finding = collapse.image_swap([rounded], [expected])
    assert finding.value == pytest.approx(1, abs=noise / 2)
    assert holds(finding)


def test_images_that_pytorch_hardly_tells_apart_decide_nothing() -> None:
    alike = np.repeat(scores()[:1], 2, axis=0)
    assert collapse.image_swap([alike], [alike]).value == 1
    nearly = alike + np.random.default_rng(1).normal(scale=0.2, size=alike.shape).astype(np.float32)
    assert 0 < collapse.nats_apart(nearly, nearly) < 0.1
    assert holds(collapse.image_swap([alike], [nearly]))


def test_masked_scores_count_as_none_and_infinite_ones_fail() -> None:
    masked = scores()
    masked[:, 7] = -np.inf
    assert collapse.image_swap([masked], [masked]).value == 1
    infinite = scores()
    infinite[0, 3] = np.inf
    finding = collapse.image_swap([infinite], [scores()])
    assert np.isnan(finding.value) and not holds(finding)


def folder(cases: Sequence[GoldenCase], tensors: dict[str, np.ndarray]) -> GoldenFolder:
    facts = Golden("r", {}, {}, {}, [END], {}, "", images([CAT, DOG]), list(cases))
    return GoldenFolder(Path("golden"), facts, tensors)


def test_a_pair_goes_as_far_as_pytorch_says_the_same_of_both_images() -> None:
    """And is of the case in which another image changes most."""
    alike, apart = np.repeat(scores()[:1], 2, axis=0)[:, None], scores()[:, None]
    cases = [GoldenCase("case0", 1, "", [[5]]), GoldenCase("case1", 2, "", [[5, 6]])]
    cases.append(GoldenCase("case2", 2, "a", [[5, 5], [6, 6], [7, 8]]))
    tensors = {"case0/prefill.logits": apart[:1], "case1/prefill.logits": alike}
    tensors |= {f"case2/{name}.logits": alike for name in ("prefill", "step0", "step2")} | {"case2/step1.logits": apart}
    pair = collapse.image_pair(folder(cases, tensors))
    assert pair is not None
    assert (pair.case.name, pair.steps) == ("case2", [[5, 5], [6, 6]])
    assert [each.shape for each in pair.scores] == [(2, 50)] * 3
    np.testing.assert_array_equal(pair.scores[2], scores())


def test_a_golden_without_two_images_in_a_case_has_no_pair() -> None:
    assert collapse.image_pair(folder([GoldenCase("case0", 1, "", [])], {"case0/prefill.logits": scores()[:1]})) is None
