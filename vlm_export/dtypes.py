"""The dtypes that a repo can hold: transformers.js's names and file suffixes, and what each does to a graph.

Source of names and suffixes: transformers.js 4.3.1, `src/utils/dtypes.js`. A dtype is only a file name there; what a
file contains is decided here. Inputs and outputs of every graph are float32, since transformers.js never casts between
graphs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from vlm_export.contract import SUFFIXES

Arithmetic = Literal["float32", "float16"]
Kernel = Literal["plain", "packed", "folded", "nf4"]


@dataclass(frozen=True)
class Form:
    """How a matrix of weights is stored, and which operator multiplies by it.

    Attributes:
        kernel: `plain` MatMul of floats; `packed`, MatMulNBits; `folded`, which a session unpacks when it is made (Cast
            and Mul before a plain MatMul); `nf4`, MatMulBnb4.
        bits: of a number.
        block: inputs that share a scale; None for all of an output.
        offsets: what shares a scale also has a zero point of its own; else numbers are as many below zero as above.
    """

    kernel: Kernel
    bits: int = 32
    block: int | None = None
    offsets: bool = False

    @property
    def is_calibrated(self) -> bool:
        """Whether the numbers are chosen by what the model computes on sample inputs, not by the weight alone."""
        return self.kernel == "packed" and self.bits < 8

    def __str__(self) -> str:
        sharing = f" in blocks of {self.block}" if self.block else ""
        return "float" if self.kernel == "plain" else f"{self.bits} bits{sharing}, {self.kernel}"


PLAIN = Form("plain")
FOLDED_8 = Form("folded", 8)
FOLDED_8_OFFSETS = Form("folded", 8, offsets=True)
PACKED_8 = Form("packed", 8, 32)
PACKED_4 = Form("packed", 4, 32, offsets=True)
PACKED_2 = Form("packed", 2, 16, offsets=True)
NF4 = Form("nf4", 4, 64)


@dataclass(frozen=True)
class Dtype:
    """One row: a name as users and transformers.js write it, and what becomes of each kind of weight.

    Convolutions, norms and biases are floats in every dtype.

    Attributes:
        arithmetic: what is computed in, and the type of all weights that have no other form.
        decoder: matrices of a graph with a cache, which reads all of them for every token.
        table: the token table, and the head, which may be the same matrix.
        others: matrices of towers and other graphs that run many rows at a time.
    """

    name: str
    arithmetic: Arithmetic = "float32"
    decoder: Form = PLAIN
    table: Form = PLAIN
    others: Form = PLAIN

    @property
    def suffix(self) -> str:
        """What is appended to a graph's name."""
        return SUFFIXES[self.name]


FP32 = Dtype("fp32")
# Towers keep 8 bits in every dtype: with 4 bits some features of an image come out beyond recognition. The table and
# the head are read once a token, and are what 4 bits hurt most for what they save.
DTYPES: dict[str, Dtype] = {
    dtype.name: dtype
    for dtype in (
        FP32,
        Dtype("fp16", "float16"),
        Dtype("int8", decoder=PACKED_8, table=PACKED_8, others=FOLDED_8),
        Dtype("uint8", decoder=FOLDED_8_OFFSETS, table=FOLDED_8_OFFSETS, others=FOLDED_8_OFFSETS),
        Dtype("q8", decoder=FOLDED_8, table=FOLDED_8, others=FOLDED_8),
        Dtype("q4", decoder=PACKED_4, table=PACKED_8, others=FOLDED_8),
        Dtype("q4f16", "float16", decoder=PACKED_4, table=PACKED_8, others=FOLDED_8),
        Dtype("bnb4", decoder=NF4, table=PACKED_8, others=FOLDED_8),
        Dtype("q2", decoder=PACKED_2, table=PACKED_8, others=FOLDED_8),
        Dtype("q2f16", "float16", decoder=PACKED_2, table=PACKED_8, others=FOLDED_8),
    )
}
# What transformers.js also has a suffix for, and why there is no such file.
REFUSED = {
    name: "neither a processor nor WASM has a kernel for 1-bit weights (MatMulNBits takes 2, 4 or 8): choose q2"
    for name in ("q1", "q1f16")
}

# By device, what a client takes unless it is told otherwise: the fastest of those that a repo has, then the smallest.
# Decoder of SmolLM2-135M, tokens a second (benchmarks/dtypes.py, vlm-export bench): on two threads of a processor int8
# 86, q8 41, fp32 40; in WASM on one thread q8 19.5, fp32 20, int8 2.2. Graphics adapters have kernels for packed
# weights; not all have float16.
PREFERRED: dict[str, tuple[str, ...]] = {
    "cpu": ("int8", "q4", "q8", "uint8", "fp32"),
    "wasm": ("q8", "uint8", "fp32"),
    "webgpu": ("q4", "fp32"),
}


def preferred(device: str, available: Collection[str]) -> str | None:
    """The dtype that a device takes of those that are there, if one of them serves it."""
    return next((name for name in PREFERRED[device] if name in available), None)


# Model metadata of a quantized graph of ours: no row's activations are rounded by what is in other rows.
ACTIVATIONS, BY_ROW = "vlm_export.activations", "by_row"
