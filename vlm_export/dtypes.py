"""The dtypes that a repo can hold: transformers.js's names and file suffixes, and how each is made.

Source of names and suffixes: transformers.js 4.3.1, `src/utils/dtypes.js`. A dtype is only a file name there; what a
file contains is decided here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Maker = Literal["float32", "float16", "packed_8_bits", "folded_8_bits"]


@dataclass(frozen=True)
class Dtype:
    """One row: `name` as users and transformers.js write it, `suffix` of the file, and how `variants.py` makes it."""

    name: str
    suffix: str
    made_by: Maker


FP32 = Dtype("fp32", "", "float32")
DTYPES: dict[str, Dtype] = {
    dtype.name: dtype
    for dtype in (
        FP32,
        Dtype("fp16", "_fp16", "float16"),
        Dtype("int8", "_int8", "packed_8_bits"),
        Dtype("q8", "_quantized", "folded_8_bits"),
    )
}
