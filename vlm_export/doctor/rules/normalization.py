"""Contract §6.3, §14.9: `do_normalize` is off in transformers.js where it is not written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm_export.doctor.findings import Finding, error, warning
from vlm_export.doctor.repo_view import PREPROCESSOR, RepoView


def check(repo: RepoView) -> Iterator[Finding]:
    """Find normalization that is not said to happen, or cannot."""
    settings = repo.document(PREPROCESSOR)
    if not settings:
        return
    if not isinstance(settings.get("do_normalize"), bool):
        found = error if "image_mean" in settings else warning
        fix = 'write "do_normalize": true, or false where the model was trained without'
        yield found(PREPROCESSOR, "does not say do_normalize, which is then off in transformers.js", fix)
    for key in ("image_mean", "image_std") if settings.get("do_normalize") is True else ():
        if not _is_one(settings.get(key), nonzero=key == "image_std"):
            yield error(PREPROCESSOR, f"{key} is {settings.get(key)!r}", "write a number for each of the 3 channels")


def _is_one(value: Any, *, nonzero: bool) -> bool:
    """Whether a mean or a deviation is a number, or three."""
    numbers = value if isinstance(value, list) and len(value) == 3 else [value]
    return all(
        isinstance(number, int | float) and not isinstance(number, bool) and (number != 0 or not nonzero)
        for number in numbers
    )
