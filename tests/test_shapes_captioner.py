"""The bundled checkpoint captions held-out images, and its adapter is what makes it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "shapes-captioner"


def test_captions_are_exact_with_the_adapter_and_not_without() -> None:
    done = subprocess.run(
        [sys.executable, "train.py", "evaluate"], cwd=RECIPE, capture_output=True, text=True, check=True
    )
    rates = [float(rate) for rate in re.findall(r"([\d.]+)% of 500 captions exact", done.stdout)]
    with_adapter, without_adapter = rates
    assert with_adapter >= 95
    assert without_adapter < 20


def test_checkpoint_is_small_enough_to_ship() -> None:
    size_bytes = sum(path.stat().st_size for path in (RECIPE / "checkpoint").iterdir())
    assert size_bytes <= 8e6
