"""Generated tokens, beside those that they should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from vlm_export.dtypes import FP32
from vlm_export.targets import Target
from vlm_export.verify import limits
from vlm_export.verify.client_inputs import peculiarity
from vlm_export.verify.metrics import first_difference
from vlm_export.verify.report import Check
from vlm_export.verify.verification import Verification


def add_tokens(run: Verification, dtype: str, runtime: Target, metric: str, generated: Sequence[Sequence[int]]) -> None:
    """The rate of images whose tokens are the golden ones, near-ties counted as equal in float32 and named.

    What the tokens say is kept for the report.
    """
    run.keep_captions(dtype, runtime, "file" if metric == limits.FROM_FILE_EXACT else "pixels", generated)
    images = run.golden.facts.images
    near, different = [], []
    tie = limits.near_tie([dtype], runtime) * run.golden.largest_logit() if dtype == FP32.name else 0.0
    for image, tokens in zip(images, generated, strict=True):
        place = first_difference(tokens, image.token_ids)
        if place is None:
            continue
        if dtype == FP32.name and place < len(image.margins) and image.margins[place] < tie:
            near.append(image.file)
        else:
            kind = peculiarity(run.golden.path / "images" / image.file) if metric == limits.FROM_FILE_EXACT else ""
            different.append(f"{image.file} from token {place + 1}" + (f" ({kind})" if kind else ""))
    add_rate(run, dtype, runtime, metric, len(images), near, different)


def add_searched(run: Verification, dtype: str, runtime: Target, generated: Sequence[Sequence[int]]) -> None:
    """The rate of images whose search with beams finds PyTorch's tokens, near-ties counted as equal in float32."""
    near: list[str] = []
    different: list[str] = []
    for image, tokens in zip(run.golden.facts.images, generated, strict=True):
        if list(tokens) != image.searched:
            is_near = dtype == FP32.name and (image.search_margin or 0.0) < limits.NEAR_TIE
            (near if is_near else different).append(image.file)
    add_rate(run, dtype, runtime, limits.SEARCHED_EXACT, len(generated), near, different)


def add_rate(
    run: Verification,
    dtype: str,
    runtime: Target,
    metric: str,
    count: int,
    near: Sequence[str],
    different: Sequence[str],
) -> None:
    """Add the rate of `count` images whose tokens are as they should be: all but the `different` ones.

    The check is a near-tie where it passes and some are `near`.
    """
    detail = f"{count - len(near) - len(different)} of {count} images"
    if near:
        detail += f"; near-ties: {', '.join(near)}"
    if different:
        detail += f"; differ: {', '.join(different[:5])}"
    run.add("all", dtype, runtime, metric, (count - len(different)) / count, detail)
    if near and run.checks[-1].verdict == "pass":
        run.checks[-1] = Check(**(asdict(run.checks[-1]) | {"verdict": "near-tie"}))
