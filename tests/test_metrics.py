"""What a dtype costs, in numbers: each says what it must of known cases, and nothing of what costs nothing."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_export.verify.metrics import largest_difference, nats_lost, rouge_l


def test_scores_differ_by_a_share_of_the_largest() -> None:
    never = -np.inf
    expected = np.array([4.0, -8.0, never, 0.0], np.float32)
    assert largest_difference(expected, expected) == 0.0
    assert largest_difference(np.array([4.0, -8.0, never, 2.0], np.float32), expected) == 0.25
    for scores in ([4.0, -8.0, 0.0, 0.0], [never, -8.0, never, 0.0], [4.0, -8.0, never], [np.inf, -8.0, never, 0.0]):
        assert largest_difference(np.array(scores, np.float32), expected) == np.inf
    assert np.isnan(largest_difference(np.array([np.nan, -8.0, never, 0.0], np.float32), expected))


@pytest.mark.parametrize(
    ("candidate", "reference", "share"),
    [
        ("police killed the gunman", "police killed the gunman", 1.0),
        ("police kill the gunman", "police killed the gunman", 0.75),  # the examples of the paper, its section 3.1
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("a dog", "police killed the gunman", 0.0),
        ("a cat", "a cat on a mat", 2 * (1 * 0.4) / 1.4),  # all that is said is right, and two fifths of it are said
        ("a mat on a cat", "a cat on a mat", 0.6),  # "a … on a …" in both orders
        ("cat cat cat", "cat", 0.5),
        ("", "", 1.0),
        ("", "a cat", 0.0),
        ("a cat", "", 0.0),
    ],
)
def test_rouge_l(candidate: str, reference: str, share: float) -> None:
    assert rouge_l(candidate, reference) == pytest.approx(share, abs=1e-12)


def test_rouge_l_counts_words_and_not_spaces_or_sides() -> None:
    assert rouge_l("a  red\ncat ", "a red cat") == 1.0
    assert rouge_l("a cat", "a red cat") == rouge_l("a red cat", "a cat")


def test_nats_lost_of_known_distributions() -> None:
    expected = np.log(np.array([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]], dtype=np.float32))
    scores = np.log(np.array([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]], dtype=np.float32))
    assert nats_lost(scores, expected) == pytest.approx([0.25 * np.log(2), 0.0], abs=1e-7)


def test_nats_lost_are_none_where_only_a_constant_differs() -> None:
    scores = np.random.default_rng(0).normal(size=(5, 1000)).astype(np.float32) * 8
    assert np.abs(nats_lost(scores, scores)).max() == 0
    assert np.abs(nats_lost(scores + np.float32(64), scores)).max() < 1e-9
    assert nats_lost(np.roll(scores, 1, axis=1), scores).min() > 1


def test_nats_lost_see_what_float32_would_lose() -> None:
    """A divergence of 1e-9 is a difference of sums near 1, which float32 rounds to 1e-7."""
    scores = np.random.default_rng(1).normal(size=(1, 50_000)).astype(np.float32)
    apart = scores + np.float32(1e-4) * np.random.default_rng(2).normal(size=scores.shape).astype(np.float32)
    assert nats_lost(apart, scores)[0] == pytest.approx(0.5e-8, rel=0.1)


def test_a_token_that_cannot_come_costs_nothing_unless_it_is_expected() -> None:
    excluded = np.array([[0.0, 0.0, -np.inf]], dtype=np.float32)
    assert nats_lost(excluded, excluded)[0] == 0
    assert nats_lost(np.zeros((1, 3), dtype=np.float32), excluded)[0] == pytest.approx(np.log(1.5))
    assert nats_lost(excluded, np.zeros((1, 3), dtype=np.float32))[0] == np.inf
    for wrong in (np.nan, np.inf):
        assert np.isnan(nats_lost(np.full((1, 3), wrong, dtype=np.float32), excluded)[0])
