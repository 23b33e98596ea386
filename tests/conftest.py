"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@pytest.fixture(autouse=True)
def _small_thread_pools() -> Iterator[None]:
    """Tests run side by side; one thread each is faster than fighting over cores."""
    import torch

    torch.set_num_threads(1)
    yield
