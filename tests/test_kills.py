"""What `kill -9` leaves is whole, and the next run completes it: the short form of `benchmarks/kills.py`."""

from __future__ import annotations

import random
from pathlib import Path

import kills
from checkpoints import SHAPES, write_captioner


def test_a_killed_conversion_is_completed_by_the_next(tmp_path: Path) -> None:
    """In the first, the second and the last third of the run that follows a change of the adapter."""
    (tmp_path / "captioner").mkdir()
    expected = kills.prepared(tmp_path, write_captioner(tmp_path / "captioner", SHAPES["pico"]), [kills.OLDER], [])
    [figures] = kills.kills(tmp_path, expected, 3, random.Random(0))
    assert figures.kills == 3 and figures.wrong == []


def test_what_is_left_or_torn_is_seen(tmp_path: Path) -> None:
    """The comparison itself: a file in the way, and a result of which a file is another."""
    place = kills.Place(tmp_path)
    for folder in ("build/tiny/repo", "golden", "tmp/vlm-export-abcd1234", "cache"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "build" / "tiny" / ".repo-abcd1234").mkdir()
    (tmp_path / "cache" / ".x.part").touch()
    assert place.left_over() == ["build/tiny/.repo-abcd1234", "tmp/vlm-export-abcd1234", "cache/.x.part"]
    before = place.hashes()
    (tmp_path / "build" / "tiny" / "repo" / "README.md").touch()
    assert place.hashes() != before
