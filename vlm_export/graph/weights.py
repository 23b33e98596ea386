"""Join a skeleton with the weights of a merged checkpoint, which stay on disk until the graph is written.

A weight input's name says what it is made of: `WEIGHT`, `WEIGHT|transposed`, or several of them packed side by side,
`q+k+v|transposed`, by the names of the merged checkpoint.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
import torch

from vlm_export.spec.graph import Component
from vlm_export.tensors.stored import TensorRef

TOKEN_TABLE = "vlm_export.token_table"  # model metadata: the weight that token ids look up
_PACKED, _TRANSPOSED = "+", "|transposed"
BLOCK_BYTES = 8 << 20  # a weight above this is written in blocks of this size in float32
_TORCH_DTYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}


@dataclass(frozen=True)
class WeightRef:
    """The tensors that a weight input is made of, as the input's name spells them.

    Attributes:
        parts: names of the merged checkpoint; several are packed side by side, along the last axis.
        transposed: whether each joins transposed.
    """

    parts: tuple[str, ...]
    transposed: bool = False

    @classmethod
    def parse(cls, name: str) -> WeightRef:
        """Read the name of a weight input."""
        return cls(tuple(name.removesuffix(_TRANSPOSED).split(_PACKED)), name.endswith(_TRANSPOSED))

    @property
    def initializer(self) -> str:
        """The name of the initializer that takes the input's place."""
        return _PACKED.join(self.parts)

    @property
    def name(self) -> str:
        """The name of the input."""
        return self.initializer + (_TRANSPOSED if self.transposed else "")


def weight_inputs(graph: ir.Graph, declared: Collection[str]) -> set[ir.Value]:
    """The inputs of a skeleton's graph that are weights: those that its component does not declare."""
    return {value for value in graph.inputs if value.name not in declared}


@dataclass(frozen=True)
class Rectangle:
    """Values of a matrix from `row` and `column` on, `[rows, columns]`, in the dtype that they are stored in."""

    row: int
    column: int
    values: np.ndarray


class StreamedTensor(ir.LazyTensor):
    """A tensor that is computed when it is written, in rectangles of the matrix `[rows, width]` that its bytes are."""

    width: int

    @abstractmethod
    def rectangles(self) -> Iterator[Rectangle]:
        """Cover the matrix, in any order; no rectangle takes much more than `BLOCK_BYTES` to compute."""

    def whole(self) -> ir.Tensor:
        """The tensor in memory."""
        array = np.empty((self.size // self.width, self.width), dtype=self.dtype.numpy())
        for part in self.rectangles():
            height, width = part.values.shape
            array[part.row : part.row + height, part.column : part.column + width] = part.values
        return ir.Tensor(array.reshape(self.shape.numpy()), name=self.name)

    def tofile(self, file: BinaryIO) -> None:
        """Write the tensor at the file's position, which is behind it afterwards."""
        start, item = file.tell(), self.dtype.itemsize
        for part in self.rectangles():
            values = np.ascontiguousarray(part.values)
            rows = [values] if values.shape[1] == self.width else values  # whole rows lie behind each other
            for number, row in enumerate(rows, start=part.row):
                file.seek(int(start + (number * self.width + part.column) * item))
                file.write(row.data)
        file.seek(start + self.nbytes)


class CheckpointTensor(StreamedTensor):
    """A weight in the layout and dtype of its graph, read from the checkpoint when it is written.

    A large one is read in blocks: neither it nor what it becomes is ever in memory as a whole. Finite values that
    float16 cannot hold become its largest ones.
    """

    def __init__(self, name: str, tensors: Mapping[str, TensorRef], dtype: ir.DataType):
        ref = WeightRef.parse(name)
        self.transposed = ref.transposed
        self.parts = [tensors[part] for part in ref.parts]
        shapes = [part.shape[::-1] if self.transposed else part.shape for part in self.parts]
        self.widths = [math.prod(shape[1:]) for shape in shapes]
        self.width = sum(self.widths)
        shape = ir.Shape([*shapes[0][:-1], sum(shape[-1] for shape in shapes)] if shapes[0] else [])
        super().__init__(self._whole, dtype=dtype, shape=shape, name=ref.initializer)

    def _whole(self) -> ir.Tensor:
        parts = [part.load() for part in self.parts]
        parts = [part.T for part in parts] if self.transposed else parts
        return ir.Tensor(_cast(torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0], self.dtype), name=self.name)

    def tofile(self, file: BinaryIO) -> None:
        """Write the weight at the file's position, which is behind it afterwards."""
        if self.nbytes <= BLOCK_BYTES or len(self.shape) < 2:
            file.write(self.tobytes())
        else:
            super().tofile(file)

    def rectangles(self) -> Iterator[Rectangle]:
        """The weight's blocks, cast to the graph's dtype."""
        for row, column, values in self.blocks():
            yield Rectangle(row, column, _cast(values, self.dtype))

    def blocks(self, multiple: int = 1) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Row, column and values of rectangles that cover the matrix, each of some rows of one part as it is stored.

        The stored rows of each are a multiple of `multiple`, but for the last of a part.
        """
        column = 0
        for part, width in zip(self.parts, self.widths, strict=True):
            count = max(1, BLOCK_BYTES * part.shape[0] // (4 * math.prod(part.shape)))
            count = max(1, count // multiple) * multiple
            for first in range(0, part.shape[0], count):
                values = part.load(slice(first, first + count))
                if self.transposed:
                    yield 0, column + first, values.T
                else:
                    yield first, column, values.reshape(len(values), -1)
            column += width


def _cast(values: torch.Tensor, dtype: ir.DataType) -> np.ndarray:
    if dtype == ir.DataType.FLOAT16 and values.dtype != torch.float16:
        largest = torch.finfo(torch.float16).max
        values = values.float()
        values = torch.where(values.isfinite(), values.clamp(-largest, largest), values)
    return values.to(_TORCH_DTYPES[dtype]).contiguous().numpy()


def attach_weights(skeleton: ir.Model, component: Component, tensors: Mapping[str, TensorRef]) -> ir.Model:
    """A copy of a skeleton whose weight inputs are initializers of their type, each read when the graph is written.

    Raises:
        KeyError: the graph asks for a weight that the checkpoint does not have.
    """
    model = skeleton.clone()
    graph = model.graph
    declared = [spec.name for spec in component.inputs]
    joined = weight_inputs(graph, declared)
    for value in [value for value in graph.inputs if value in joined]:
        assert value.dtype is not None, value.name
        tensor = CheckpointTensor(str(value.name), tensors, value.dtype)
        value.name, value.shape, value.const_value = tensor.name, tensor.shape, tensor
        graph.inputs.remove(value)
        graph.register_initializer(value)
    by_name = {value.name: value for value in graph.inputs}
    graph.inputs[:] = [by_name[name] for name in declared]
    by_name = {value.name: value for value in graph.outputs}
    graph.outputs[:] = [by_name[spec.name] for spec in component.outputs]
    return model
