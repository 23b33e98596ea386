"""A weight as integers, scales and zero points, computed from the checkpoint while the graph is written.

weight ≈ (number - zero point) · scale. What shares a scale is all inputs of an output, or a block of them. Without
offsets the zero point is the middle of the numbers. Scales of blocks are many, and so they are float16, rounded before
the numbers are made of them. Neither the weight nor its numbers are in memory as a whole: it is read twice, for the
scales and for the numbers. Where numbers were solved for on sample inputs (`quantize/solve.py`), they are taken as they
are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import onnx_ir as ir

from vlm_export.dtypes import Form
from vlm_export.graph.weights import CheckpointTensor, Rectangle, StreamedTensor

# Rounded at a time, so that they stay in a processor's cache. By NumPy: torch would give them to several threads, which
# takes thirty times as long where cores are busy (measured: 28 s in place of 0.9 for 134 M weights).
_CACHED_NUMBERS = 1 << 15
# Tried where a block's scale is searched for: shares of the range between its least and its largest weight.
_SHARES = np.linspace(0.6, 1.0, 17, dtype=np.float32)
_LEAST_SCALE = np.float32(np.finfo(np.float16).smallest_subnormal)


@dataclass(frozen=True)
class Solution:
    """A weight's numbers as they were solved for.

    Attributes:
        numbers: `[outputs, inputs] uint8`.
        scales: `[outputs, blocks] float16`.
        zero_points: `[outputs, blocks] uint8`.
    """

    numbers: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray


@dataclass(frozen=True)
class Part:
    """Some of a weight, `[outputs, inputs]`, from `output` and `input` on."""

    output: int
    input: int
    values: np.ndarray


@dataclass(frozen=True)
class Quantized:
    """A weight and the form that it gets.

    Attributes:
        outputs_last: the graph holds it as `[inputs, outputs]`, as MatMul does, not as the rows of a lookup table.
        solution: its numbers, if they were solved for.
    """

    weight: CheckpointTensor
    outputs_last: bool
    form: Form
    solution: Solution | None = field(default=None, compare=False)

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
        return self.form.block or self.inputs

    @property
    def blocks(self) -> int:
        """Scales of an output: the last one's inputs may be fewer."""
        return math.ceil(self.inputs / self.share)

    @property
    def middle(self) -> int:
        """The zero point where there are no offsets."""
        return 1 << self.form.bits - 1

    @property
    def scales(self) -> np.ndarray:
        """`[outputs, blocks]` float16 if there are blocks, else float32; 1 where all weights are zero."""
        return self.solution.scales if self.solution else _scales(self)[0]

    @property
    def zero_points(self) -> np.ndarray:
        """`[outputs, blocks] uint8`."""
        return self.solution.zero_points if self.solution else _scales(self)[1]

    def numbers(self) -> Iterator[Part]:
        """Cover the weight with its numbers, `[outputs, inputs] uint8`."""
        if self.solution:
            yield Part(0, 0, self.solution.numbers)
            return
        scales, zero_points = _scales(self)
        for part in self.parts():
            numbers = np.empty(part.values.shape, dtype=np.uint8)
            for rows in rows_at_once(part.values):
                blocks = in_blocks(part.values[rows], self.share)
                first = part.input // self.share
                here = (rows, slice(first, first + blocks.shape[1]), None)
                rounded = _rounded(blocks, scales[part.output :][here], zero_points[part.output :][here], self.form)
                numbers[rows] = rounded.reshape(len(rounded), -1)[:, : part.values.shape[1]]
            yield Part(part.output, part.input, numbers)

    def parts(self) -> Iterator[Part]:
        """Cover the weight; where it is not stored by outputs, a part begins where a block does."""
        multiple = 1 if self.weight.transposed == self.outputs_last else self.form.block or 1
        for row, column, values in self.weight.blocks(multiple):
            output, first_input = (column, row) if self.outputs_last else (row, column)
            yield Part(output, first_input, (values.T if self.outputs_last else values).float().numpy())


@lru_cache(maxsize=1)  # of the weight that is being written: its numbers need them, and they follow its numbers
def _scales(quantized: Quantized) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points of a weight, by the weight alone."""
    shape = quantized.outputs, quantized.blocks
    lowest, highest = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    for part in quantized.parts():
        first = part.input // quantized.share
        for rows in rows_at_once(part.values):
            blocks = in_blocks(part.values[rows], quantized.share)
            here = (slice(part.output + rows.start, part.output + rows.stop), slice(first, first + blocks.shape[1]))
            np.minimum(lowest[here], blocks.min(axis=-1), out=lowest[here])
            np.maximum(highest[here], blocks.max(axis=-1), out=highest[here])
    if quantized.form.offsets:
        return _with_offsets(lowest, highest, quantized.form)
    largest = np.maximum(-lowest, highest)
    found = np.where(largest > 0, largest / np.float32(quantized.middle - 1), np.float32(1))
    scales = found if quantized.form.block is None else _rounded_up(found)
    return scales, np.full(shape, quantized.middle, dtype=np.uint8)


def best_grid(blocks: np.ndarray, form: Form, importance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points with the least squared error, each square times its input's `importance`.

    `[outputs, blocks, share]` → `[outputs, blocks]` float16 and uint8. Ranges from 0.6 to 1 of what the weights span
    are tried, and with the best the zero points beside its own.
    """
    lowest, highest = np.minimum(blocks.min(axis=-1), 0), np.maximum(blocks.max(axis=-1), 0)
    least = np.full(lowest.shape, np.inf, dtype=np.float32)
    scales, zero_points = np.ones(lowest.shape, dtype=np.float16), np.zeros(lowest.shape, dtype=np.uint8)

    def consider(scale: np.ndarray, zero_point: np.ndarray) -> None:
        numbers = _rounded(blocks, scale[..., None], zero_point[..., None], form)
        error = unpacked(numbers, scale[..., None], zero_point[..., None]) - blocks
        error = (np.square(error, out=error) * importance).sum(axis=-1)
        better = error < least
        least[better], scales[better], zero_points[better] = error[better], scale[better], zero_point[better]

    for share in _SHARES:
        consider(*_with_offsets(lowest * share, highest * share, form))
    best, nearest = scales.copy(), zero_points.astype(np.int16)
    for beside in (nearest - 1, nearest + 1):
        consider(best, np.clip(beside, 0, (1 << form.bits) - 1).astype(np.uint8))
    return scales, zero_points


def _with_offsets(lowest: np.ndarray, highest: np.ndarray, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points that reach from the lowest weight, at most 0, to the highest, at least 0."""
    top = np.float32((1 << form.bits) - 1)
    scale = (highest - lowest) / top
    if form.block is None:
        scale = np.where(scale > 0, scale, np.float32(1))
    else:
        scale = np.clip(scale, _LEAST_SCALE, np.finfo(np.float16).max).astype(np.float16)
    return scale, np.clip(np.rint(-lowest / scale.astype(np.float32)), 0, top).astype(np.uint8)


def unpacked(numbers: np.ndarray, scales: np.ndarray, zero_points: np.ndarray) -> np.ndarray:
    """The weights, float32, that numbers stand for."""
    return (numbers.astype(np.float32) - zero_points) * scales.astype(np.float32)


def _rounded(values: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, form: Form) -> np.ndarray:
    """The nearest numbers, uint8; all arguments have one shape, or stretch to it."""
    found = values / scales.astype(np.float32)
    np.rint(found, out=found)
    found += zero_points
    lowest = 0 if form.offsets else 1  # as far below the middle as above it
    return np.clip(found, lowest, (1 << form.bits) - 1, out=found).astype(np.uint8)


def _rounded_up(scales: np.ndarray) -> np.ndarray:
    """float16 of at least the same size, so that no number is clipped; one too large for it becomes its largest."""
    halves = np.minimum(scales, np.finfo(np.float16).max).astype(np.float16)
    return np.where(halves < scales, np.nextafter(halves, np.float16(np.inf)), halves)


def rows_at_once(values: np.ndarray) -> Iterator[slice]:
    """Slices of some rows each, one after the other, that cover `[rows, columns]`."""
    count = max(1, _CACHED_NUMBERS // max(1, values.shape[1]))
    return (slice(first, min(first + count, len(values))) for first in range(0, len(values), count))


def in_blocks(values: np.ndarray, share: int) -> np.ndarray:
    """`[outputs, inputs]` → `[outputs, blocks, share]`, the last block filled up with zeros."""
    share = min(share, values.shape[1])
    return _filled(values, -values.shape[1] % share, 0).reshape(len(values), -1, share)


def _filled(values: np.ndarray, columns: int, value: int) -> np.ndarray:
    """`[rows, columns]` with so many more columns, of one value."""
    return np.pad(values, ((0, 0), (0, columns)), constant_values=value) if columns else values


def packed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """`[rows, columns]` of so many bits each → bytes `[rows, columns · bits / 8] uint8`, the first in the lowest bits.

    Columns that do not fill the last byte are followed by zeros.
    """
    each = 8 // bits
    if each == 1:
        return numbers
    # As many numbers as a byte holds are one word, whose own bytes are shifted onto the lowest.
    words = np.ascontiguousarray(_filled(numbers, -numbers.shape[1] % each, 0)).view(f"<u{each}")
    found = words.copy()
    for place in range(1, each):
        found |= words >> (place * (8 - bits))
    return found.astype(np.uint8)


class ByInput(StreamedTensor):
    """The numbers as MatMul takes a weight: `[inputs, outputs]`; without offsets int8, zero being zero, else uint8."""

    def __init__(self, quantized: Quantized):
        self.quantized, self.width = quantized, quantized.outputs
        shape = ir.Shape([quantized.inputs, quantized.outputs])
        dtype = ir.DataType.UINT8 if quantized.form.offsets else ir.DataType.INT8
        super().__init__(self.whole, dtype=dtype, shape=shape, name=f"{quantized.weight.name}.{dtype.name.lower()}")

    def rectangles(self) -> Iterator[Rectangle]:
        """The numbers, each part transposed."""
        for part in self.quantized.numbers():
            values = part.values
            if not self.quantized.form.offsets:
                values = (values ^ np.uint8(self.quantized.middle)).view(np.int8)  # takes the middle away
            yield Rectangle(part.input, part.output, values.T)


class ByOutput(StreamedTensor):
    """The numbers as MatMulNBits takes a weight: `[outputs, blocks, share · bits / 8] uint8`.

    A last block that is longer than the inputs ends in numbers that stand for zero.
    """

    def __init__(self, quantized: Quantized):
        self.quantized = quantized
        sizes = (quantized.outputs, quantized.blocks, quantized.share * quantized.form.bits // 8)
        self.width = math.prod(sizes[1:])
        name = f"{quantized.weight.name}.uint{quantized.form.bits}"
        super().__init__(self.whole, dtype=ir.DataType.UINT8, shape=ir.Shape(sizes), name=name)

    def rectangles(self) -> Iterator[Rectangle]:
        """The numbers, packed; a part that ends its rows also has those that fill the block."""
        quantized, bits = self.quantized, self.quantized.form.bits
        rest = quantized.blocks * quantized.share - quantized.inputs
        for part in quantized.numbers():
            ends = part.input + part.values.shape[1] == quantized.inputs
            values = _filled(part.values, rest if ends else 0, quantized.middle)
            yield Rectangle(part.output, part.input * bits // 8, packed(values, bits))


class Scales(ir.LazyTensor):
    """The scales: `[outputs, blocks]`, or `[outputs]` where all of an output share one, in the type that is asked for.

    Those of blocks are float16 unless another type is.
    """

    def __init__(self, quantized: Quantized, dtype: ir.DataType | None = None):
        sizes = [quantized.outputs, quantized.blocks] if quantized.form.block else [quantized.outputs]
        self._sizes, self._quantized = sizes, quantized
        own = ir.DataType.FLOAT16 if quantized.form.block else ir.DataType.FLOAT
        name = f"{quantized.weight.name}.scale"
        super().__init__(self._whole, dtype=dtype or own, shape=ir.Shape(sizes), name=name)

    def _whole(self) -> ir.Tensor:
        scales = self._quantized.scales.reshape(self._sizes).astype(self.dtype.numpy())
        return ir.Tensor(scales, name=self.name)


class ZeroPoints(ir.LazyTensor):
    """The zero points: packed as MatMulNBits takes them, or `[outputs] uint8` where all of an output share one."""

    def __init__(self, quantized: Quantized):
        columns = math.ceil(quantized.blocks * quantized.form.bits / 8)
        sizes = [quantized.outputs, columns] if quantized.form.block else [quantized.outputs]
        self._sizes, self._quantized = sizes, quantized
        name = f"{quantized.weight.name}.zero_point"
        super().__init__(self._whole, dtype=ir.DataType.UINT8, shape=ir.Shape(sizes), name=name)

    def _whole(self) -> ir.Tensor:
        values = packed(self._quantized.zero_points, self._quantized.form.bits)
        return ir.Tensor(np.ascontiguousarray(values.reshape(self._sizes)), name=self.name)
