"""The places that cases spoil copies of, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from bad import place as places


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name."""
    return {name: getattr(places, name)(tmp_path_factory.mktemp(name)) for name in places.NAMES}
