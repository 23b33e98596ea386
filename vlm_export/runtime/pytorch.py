"""The fallback: the recipe's own PyTorch model, run by transformers' `generate`.

The only file here that imports torch and transformers, and it is itself imported only where something falls back.
"""

from __future__ import annotations

from pathlib import Path

from vlm_export.errors import InputError
from vlm_export.runtime.model import Engine


def beside(folder: Path, *, because: str) -> Engine:
    """The merged checkpoint in the work folder of an exported repo.

    Raises:
        InputError: there is none.
    """
    raise InputError(f"{because or folder}: no PyTorch model beside it, in {folder.resolve().parent / 'merged'}")
