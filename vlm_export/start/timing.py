"""How long the stages beside `onnx` take, which has an estimate of its own: roughly, in seconds of one core.

Measured on SmolLM-135M's and SigLIP-base's shapes, 230 M random weights in float32 (x86-64, processor seconds of one
thread): golden outputs of two images and 30 tokens took 18.5 s and of six 31.1 s, the merge of a LoRA with its proof
15.3 s, and `verify` of two images in one dtype in ONNX Runtime 106 s, which is taken for the cases, once a dtype. A
caption is `recipes/real-captioner`'s, 157 M weights: 0.45 s on two cores. Loading libraries takes some seconds more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_export.targets import Target

_SECONDS_A_RECORDED_WEIGHT = 53e-9  # in the cases, once
_SECONDS_A_RECORDED_CAPTION = 14e-9  # of each image and weight
_SECONDS_A_MERGED_WEIGHT = 67e-9
_SECONDS_A_VERIFIED_WEIGHT = 460e-9  # in each dtype, in ONNX Runtime
_SECONDS_A_CAPTIONED_WEIGHT = 6e-9  # of each image, in each dtype and runtime


@dataclass(frozen=True)
class Times:
    """Seconds of one core: of each stage."""

    golden: float
    merge: float
    verify: float


def times(parameters: int, images: int, dtypes: int, runtimes: Sequence[Target]) -> Times:
    """What a model of so many parameters takes, with so many golden images, in so many dtypes and these runtimes."""
    cases = _SECONDS_A_VERIFIED_WEIGHT * ("ort" in runtimes)
    captions = _SECONDS_A_CAPTIONED_WEIGHT * images * len(runtimes)
    return Times(
        parameters * (_SECONDS_A_RECORDED_WEIGHT + _SECONDS_A_RECORDED_CAPTION * images),
        _SECONDS_A_MERGED_WEIGHT * parameters,
        parameters * dtypes * (cases + captions),
    )


def about(seconds: float) -> str:
    """A time as a plan tells it: no more digits than are known."""
    return "under a minute" if seconds < 60 else f"about {round(seconds / 60)} min"
