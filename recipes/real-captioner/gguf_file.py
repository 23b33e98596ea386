"""Read a GGUF file that is in memory: its metadata, and its tensors as float32.

The format (github.com/ggml-org/ggml, docs/gguf.md), all little-endian: magic, version, number of tensors and of
metadata; the metadata; name, sizes, kind and offset of each tensor; then, aligned, the data. Sizes begin with that of
the innermost axis. Only the kinds that SmolLM2's Q4_1 file has are known.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class _Kind:
    """How a tensor is stored: in blocks of `length` values, which `unpack` gives `[blocks, length] float32`."""

    length: int
    block: np.dtype
    unpack: Callable[[np.ndarray], np.ndarray]


def _unpack_q4_1(blocks: np.ndarray) -> np.ndarray:
    """16 bytes hold the first 16 values in their lower halves and the last 16 in their upper ones."""
    codes = np.concatenate([blocks["codes"] & 15, blocks["codes"] >> 4], axis=1).astype(np.float32)
    return codes * _column(blocks["scale"]) + _column(blocks["offset"])


def _unpack_q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks["codes"].astype(np.float32) * _column(blocks["scale"])


def _column(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)[:, None]


_KINDS = {
    0: _Kind(1, np.dtype("<f4"), lambda values: values),
    3: _Kind(32, np.dtype([("scale", "<f2"), ("offset", "<f2"), ("codes", "u1", 16)]), _unpack_q4_1),
    8: _Kind(32, np.dtype([("scale", "<f2"), ("codes", "i1", 32)]), _unpack_q8_0),
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in the file; `shape` begins with the outermost axis."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Gguf:
    """A file's metadata and tensors, by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    content: bytes

    def load(self, name: str) -> np.ndarray:
        """A tensor, `float32`."""
        stored = self.tensors[name]
        kind = _KINDS[stored.kind]
        count = math.prod(stored.shape) // kind.length
        return kind.unpack(np.frombuffer(self.content, kind.block, count, stored.offset)).reshape(stored.shape)


class _Cursor:
    """Reads one value after the other."""

    def __init__(self, content: bytes):
        self.content = content
        self.position = 0

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        values = struct.unpack_from(layout, self.content, self.position)
        self.position += struct.calcsize(layout)
        return values

    def number(self, code: str) -> Any:
        return self.numbers(code)[0]

    def take(self, count: int) -> bytes:
        self.position += count
        return self.content[self.position - count : self.position]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        inner, count = self.number("I"), self.number("Q")
        return [self.text() for _ in range(count)] if inner == _STRING else list(self.numbers(_NUMBERS[inner], count))

    def tensor(self, name: str) -> tuple[str, Stored]:
        sizes = self.numbers("Q", self.number("I"))
        return name, Stored(sizes[::-1], self.number("I"), self.number("Q"))


def read(content: bytes) -> Gguf:
    """What a file holds; tensors are unpacked when they are loaded.

    Raises:
        ValueError: it is no GGUF file of version 3.
    """
    cursor = _Cursor(content)
    magic, version = cursor.take(4), cursor.number("I")
    if (magic, version) != (b"GGUF", 3):
        raise ValueError(f"no GGUF file of version 3: begins with {magic!r}, {version}")
    tensor_count, metadata_count = cursor.numbers("Q", 2)
    metadata = {cursor.text(): cursor.value(cursor.number("I")) for _ in range(metadata_count)}
    found = dict(cursor.tensor(cursor.text()) for _ in range(tensor_count))
    alignment = metadata.get("general.alignment", 32)
    start = math.ceil(cursor.position / alignment) * alignment
    tensors = {name: Stored(at.shape, at.kind, start + at.offset) for name, at in found.items()}
    return Gguf(metadata, tensors, content)
