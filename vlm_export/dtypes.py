"""The dtypes that a repo can hold: transformers.js's names and file suffixes, and how each is made.

Source of names and suffixes: transformers.js 4.3.1, `src/utils/dtypes.js`. A dtype is only a file name there; what a
file contains is decided here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from vlm_export.contract import SUFFIXES

Maker = Literal["float32", "float16", "packed_8_bits", "folded_8_bits"]


@dataclass(frozen=True)
class Dtype:
    """One row: `name` as users and transformers.js write it, and how `quantize/variants.py` makes it."""

    name: str
    made_by: Maker

    @property
    def suffix(self) -> str:
        """What is appended to a graph's name."""
        return SUFFIXES[self.name]


# By device, what a client takes unless it is told otherwise: the fastest of those that a repo has, then the smallest.
# Decoder of SmolLM2-135M, tokens a second (benchmarks/dtypes.py, vlm-export bench): on two threads of a processor int8
# 86, q8 41, fp32 40; in WASM on one thread q8 19.5, fp32 20, int8 2.2.
PREFERRED: dict[str, tuple[str, ...]] = {
    "cpu": ("int8", "q8", "fp32"),
    "wasm": ("q8", "fp32"),
    "webgpu": ("fp32",),
}


def preferred(device: str, available: Collection[str]) -> str | None:
    """The dtype that a device takes of those that are there, if one of them serves it."""
    return next((name for name in PREFERRED[device] if name in available), None)


# Model metadata of an 8-bit graph of ours: no row's activations are rounded by what is in other rows.
ACTIVATIONS, BY_ROW = "vlm_export.activations", "by_row"

FP32 = Dtype("fp32", "float32")
DTYPES: dict[str, Dtype] = {
    dtype.name: dtype
    for dtype in (
        FP32,
        Dtype("fp16", "float16"),
        Dtype("int8", "packed_8_bits"),
        Dtype("q8", "folded_8_bits"),
    )
}
