"""What a client makes of image files: pixels beside those of PyTorch's processor, and captions.

Beside the golden images stand photographs that come with the package, among them kinds that decoders read in different
ways. Nothing is judged here: a client that resizes for itself makes other pixels, whatever the graphs are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_export import bundled
from vlm_export.runtime.images import ImageProcessor
from vlm_export.runtime.repo import open_repo
from vlm_export.runtime.sessions import Arrays
from vlm_export.runtime.text import Text
from vlm_export.spec.family import Preprocessor
from vlm_export.targets import ClientTarget
from vlm_export.verify import in_ort, limits
from vlm_export.verify.client_inputs import peculiarity
from vlm_export.verify.report import FromFile
from vlm_export.verify.verification import Verification
from vlm_export.web.captions import Caption


@dataclass(frozen=True, eq=False)
class Photograph:
    """An image file that no golden was recorded of, and what PyTorch's processor makes of it."""

    path: Path
    inputs: Arrays


def photographs(preprocessor: Preprocessor, text: str) -> list[Photograph]:
    """Those that come with the package, with a prompt for each."""
    return [Photograph(path, preprocessor.model_inputs(path, text)) for path in bundled.photographs()]


def add_golden_images(
    run: Verification, target: ClientTarget, dtype: str, captions: Sequence[Caption], golden_inputs: Sequence[Arrays]
) -> None:
    """Keep what a client makes of the golden images' files; what it should say is PyTorch's."""
    for path, image, caption, inputs in zip(
        run.golden.image_paths(), run.golden.facts.images, captions, golden_inputs, strict=True
    ):
        run.from_files.append(_from_file(run, target, dtype, path, caption, inputs, image.caption))


def add_photographs(
    run: Verification, target: ClientTarget, dtype: str, captions: Sequence[Caption], pictures: Sequence[Photograph]
) -> None:
    """Keep what a client makes of photographs; what it should say is what the same graphs say of PyTorch's pixels.

    Raises:
        FloatingPointError: the decoder's scores are no numbers.
    """
    expected = in_ort.tokens(run, dtype, [picture.inputs for picture in pictures])
    text = Text(run.repo)
    made = [
        _from_file(run, target, dtype, picture.path, caption, picture.inputs, text.decode(ids), is_golden=False)
        for picture, caption, ids in zip(pictures, captions, expected, strict=True)
    ]
    run.from_files += made
    equal = sum(list(caption.token_ids) == ids for caption, ids in zip(captions, expected, strict=True))
    seen = [each for each in made if each.pixel_difference is not None and not each.peculiarity]
    detail = f"{equal} of {len(made)}"
    if seen:
        worst = max(seen, key=lambda each: each.pixel_difference or 0.0)
        detail += f"; pixels of {worst.file} differ most, by {worst.pixel_difference:.2f} of 255 on the average"
    run.add("all", dtype, target, limits.PHOTOGRAPHS, equal / len(made), detail)


def _from_file(
    run: Verification,
    target: ClientTarget,
    dtype: str,
    path: Path,
    caption: Caption,
    inputs: Arrays,
    expected: str,
    *,
    is_golden: bool = True,
) -> FromFile:
    with Image.open(path) as picture:
        width, height = picture.size
    return FromFile(
        runtime=target,
        dtype=dtype,
        file=path.name,
        is_golden=is_golden,
        peculiarity=peculiarity(path),
        width=width,
        height=height,
        pixel_difference=_difference_of_255(run, run.made_pixels(caption.pixel_values), inputs["pixel_values"]),
        expected=expected,
        text=caption.text,
        failure=caption.failure or "",
    )


def _difference_of_255(run: Verification, found: np.ndarray | None, expected: np.ndarray) -> float | None:
    """The mean difference of two pictures as the model takes them, `[…, 3, H, W]` or patches `[…, patches, numbers]`.

    None of pictures of two shapes. Patches of zeros, which pad a tile, do not count.
    """
    if found is None or found.shape != expected.shape:
        return None
    settings = ImageProcessor(run.manifest.in_graph or open_repo(run.repo).preprocessor).settings
    scale = np.array(settings["image_std"] if settings["do_normalize"] else 1.0, dtype=np.float64)
    factor = settings["rescale_factor"] if settings["do_rescale"] else 1.0
    difference = np.abs(found - expected)
    if difference.ndim < 4:
        shown = found.any(axis=-1) | expected.any(axis=-1)
        return float(difference[shown].mean() * scale.mean() / factor)
    return float((difference * scale.reshape(-1, 1, 1)).mean() / factor)
