"""A weight as 8-bit numbers and their scales, both computed from the checkpoint while the graph is written.

weight ≈ number · scale; numbers are integers from -127 to 127, a scale is the largest magnitude of what shares it,
divided by 127. What shares one is all inputs of an output, or `block` of them. Scales of blocks are many, and so they
are float16, rounded up before the numbers are made of them. Neither the weight nor its numbers are ever in memory as a
whole: it is read twice, for the scales and for the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import onnx_ir as ir

from vlm_export.graph.weights import CheckpointTensor, Rectangle, StreamedTensor

LARGEST = 127  # of a number's magnitude, so that the range is as long below zero as above
ZERO_POINT = 128  # what is added to a number where it is stored as uint8
# Rounded at a time, so that they stay in a processor's cache. By NumPy: torch would give them to several threads, which
# takes thirty times as long where cores are busy (measured: 28 s in place of 0.9 for 134 M weights).
_CACHED_NUMBERS = 1 << 15


@dataclass(frozen=True)
class _Part:
    """Some of a weight, `[outputs, inputs]`, from `output` and `input` on."""

    output: int
    input: int
    values: np.ndarray


@dataclass(frozen=True)
class EightBits:
    """How a weight is quantized.

    Attributes:
        outputs_last: the graph holds it as `[inputs, outputs]`, as MatMul does, not as the rows of a lookup table.
        block: inputs that share a scale; None for all of an output.
    """

    weight: CheckpointTensor
    outputs_last: bool
    block: int | None = None

    @property
    def outputs(self) -> int:
        """Outputs of the weight: the columns of a MatMul's, the rows of a lookup table."""
        return self.weight.shape.numpy()[1 if self.outputs_last else 0]

    @property
    def inputs(self) -> int:
        """Inputs of the weight, which is what a scale is shared along."""
        return self.weight.shape.numpy()[0 if self.outputs_last else 1]

    @property
    def share(self) -> int:
        """Inputs that share a scale."""
        return self.block or self.inputs

    @property
    def blocks(self) -> int:
        """Scales of an output: the last one's inputs may be fewer."""
        return math.ceil(self.inputs / self.share)

    @property
    def scales(self) -> np.ndarray:
        """`[outputs, blocks]` float16 if there are blocks, else float32; 1 where all weights are zero."""
        return _scales(self)

    def numbers(self) -> Iterator[_Part]:
        """Cover the weight with its numbers, `[outputs, inputs] int8`."""
        scales = self.scales
        for part in self.parts():
            numbers = np.empty(part.values.shape, dtype=np.int8)
            for rows in _at_once(part.values):
                blocks = _in_blocks(part.values[rows], self.share)
                first = part.input // self.share
                rounded = blocks / scales[part.output :][rows, first : first + blocks.shape[1], None].astype(np.float32)
                np.clip(np.rint(rounded, out=rounded), -LARGEST, LARGEST, out=rounded)
                numbers[rows] = rounded.reshape(len(rounded), -1)[:, : part.values.shape[1]]
            yield _Part(part.output, part.input, numbers)

    def parts(self) -> Iterator[_Part]:
        """Cover the weight; where it is not stored by outputs, a part begins where a block does."""
        multiple = 1 if self.weight.transposed == self.outputs_last else self.block or 1
        for row, column, values in self.weight.blocks(multiple):
            output, first_input = (column, row) if self.outputs_last else (row, column)
            yield _Part(output, first_input, (values.T if self.outputs_last else values).float().numpy())


@lru_cache(maxsize=1)  # of the weight that is being written: its numbers need them, and they follow its numbers
def _scales(quantized: EightBits) -> np.ndarray:
    largest = np.zeros((quantized.outputs, quantized.blocks), dtype=np.float32)
    for part in quantized.parts():
        for rows in _at_once(part.values):
            found = np.abs(_in_blocks(part.values[rows], quantized.share)).max(axis=-1)
            first = part.input // quantized.share
            held = largest[part.output :][rows, first : first + found.shape[1]]
            np.maximum(held, found, out=held)
    scales = np.where(largest > 0, largest / np.float32(LARGEST), np.float32(1))
    return scales if quantized.block is None else _rounded_up(scales)


def _rounded_up(scales: np.ndarray) -> np.ndarray:
    """float16 of at least the same size, so that no number passes 127; one too large for it becomes its largest."""
    halves = np.minimum(scales, np.finfo(np.float16).max).astype(np.float16)
    return np.where(halves < scales, np.nextafter(halves, np.float16(np.inf)), halves)


def _at_once(values: np.ndarray) -> Iterator[slice]:
    """Slices of some rows each, one after the other, that cover `[rows, columns]`."""
    count = max(1, _CACHED_NUMBERS // max(1, values.shape[1]))
    return (slice(first, min(first + count, len(values))) for first in range(0, len(values), count))


def _in_blocks(values: np.ndarray, share: int) -> np.ndarray:
    """`[outputs, inputs]` → `[outputs, blocks, share]`, the last block filled up with zeros."""
    share = min(share, values.shape[1])
    return _filled(values, -values.shape[1] % share).reshape(len(values), -1, share)


def _filled(values: np.ndarray, zeros: int) -> np.ndarray:
    """`[rows, columns]` with `zeros` more columns, of zeros."""
    return np.pad(values, ((0, 0), (0, zeros))) if zeros else values


class ByInput(StreamedTensor):
    """The numbers as MatMul takes a weight: `[inputs, outputs] int8`."""

    def __init__(self, quantized: EightBits):
        self.quantized, self.width = quantized, quantized.outputs
        shape = ir.Shape([quantized.inputs, quantized.outputs])
        super().__init__(self.whole, dtype=ir.DataType.INT8, shape=shape, name=f"{quantized.weight.name}.int8")

    def rectangles(self) -> Iterator[Rectangle]:
        """The numbers, each part transposed."""
        for part in self.quantized.numbers():
            yield Rectangle(part.input, part.output, part.values.T)


class ByOutput(StreamedTensor):
    """The numbers as MatMulNBits takes a weight: `[outputs, blocks, share] uint8`, with a zero point of 128.

    A last block that is longer than the inputs ends in zeros.
    """

    def __init__(self, quantized: EightBits):
        self.quantized = quantized
        sizes = (quantized.outputs, quantized.blocks, quantized.share)
        self.width = math.prod(sizes[1:])
        name = f"{quantized.weight.name}.uint8"
        super().__init__(self.whole, dtype=ir.DataType.UINT8, shape=ir.Shape(sizes), name=name)

    def rectangles(self) -> Iterator[Rectangle]:
        """The numbers with the zero point added; a part that ends its rows also has the zeros that fill the block."""
        inputs, rest = self.quantized.inputs, self.width - self.quantized.inputs
        for part in self.quantized.numbers():
            ends = part.input + part.values.shape[1] == inputs
            values = _filled(part.values, rest if ends else 0)
            yield Rectangle(part.output, part.input, values.view(np.uint8) ^ np.uint8(ZERO_POINT))  # adds it


class Scales(ir.LazyTensor):
    """The scales: `[outputs, blocks] float16`, or `[outputs] float32` where all of an output share one."""

    def __init__(self, quantized: EightBits):
        sizes = [quantized.outputs, quantized.blocks] if quantized.block else [quantized.outputs]
        self._sizes, self._quantized = sizes, quantized
        name = f"{quantized.weight.name}.scale"
        dtype = ir.DataType.FLOAT16 if quantized.block else ir.DataType.FLOAT
        super().__init__(self._whole, dtype=dtype, shape=ir.Shape(sizes), name=name)

    def _whole(self) -> ir.Tensor:
        return ir.Tensor(self._quantized.scales.reshape(self._sizes), name=self.name)
