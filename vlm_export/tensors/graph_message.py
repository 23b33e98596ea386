"""Read the message of a graph file of anybody's, its weights left on disk: a file of gigabytes opens in megabytes.

The file is walked field by field (https://protobuf.dev/programming-guides/encoding), and where an initializer has bytes
of a kilobyte or more, the message that is parsed says instead where in the file they lie, as it does of external data.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto
from onnx.helper import tensor_dtype_to_np_dtype

from vlm_export.errors import InputError

SMALL_BYTES = 1024  # constants below this are inline in every case
_LFS_POINTER = b"version https://git-lfs"
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5  # wire types; no field of onnx.proto is a group
_FIXED_BYTES = {_FIXED_64: 8, _FIXED_32: 4}
# Of types of which several share a byte.
_BITS: dict[int, int] = {
    **dict.fromkeys((TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1), 4),
    **dict.fromkeys((TensorProto.INT2, TensorProto.UINT2), 2),
}

_Buffer = mmap.mmap | bytes


class _Damaged(Exception):
    """A field begins or ends where it cannot."""


def read_message(path: Path) -> onnx.ModelProto:
    """A file's model, of which only constants below a kilobyte are in memory.

    Raises:
        InputError: the file holds no ONNX model, or not all of one.
    """
    stored = stored_file(path)
    with path.open("rb") as file:
        head = file.read(len(_LFS_POINTER))
        if not head:
            raise InputError(f"{path}: is empty")
        if head == _LFS_POINTER:
            raise InputError(f"{path}: is a pointer of Git LFS in the file's place")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            try:
                message = _model(buffer, stored.name)
            except (_Damaged, DecodeError, IndexError, KeyError, ValueError, TypeError) as error:
                raise InputError(f"{path}: is damaged or cut off: holds no whole ONNX model") from error
    if not message.graph.output:
        raise InputError(f"{path}: holds no ONNX graph")
    if missing := _undefined(message.graph):
        raise InputError(f"{path}: is damaged: it reads {missing!r}, which nothing in it computes")
    return message


def stored_file(path: Path) -> Path:
    """The file that a path leads to: in the Hub's cache all are links to others, which onnx_ir does not follow."""
    return Path(os.path.realpath(path))


def _model(buffer: _Buffer, own: str) -> onnx.ModelProto:
    """The message of a file's model, each large initializer as external data in that file, whose name is `own`."""
    rest = bytearray()
    graph = onnx.GraphProto()
    for tag, start, begin, end in _fields(buffer, 0, len(buffer)):
        if tag >> 3 == onnx.ModelProto.GRAPH_FIELD_NUMBER:
            _merge_graph(graph, buffer, begin, end, own)
        else:
            rest += buffer[start:end]
    message = onnx.ModelProto.FromString(bytes(rest))
    message.graph.CopyFrom(graph)
    return message


def _undefined(graph: onnx.GraphProto) -> str | None:
    """A value that a node reads before anything gives it, if there is one."""
    known = {"", *(value.name for value in (*graph.input, *graph.initializer))}
    known.update(tensor.values.name for tensor in graph.sparse_initializer)
    for node in graph.node:
        if unknown := next((name for name in node.input if name not in known), None):
            return unknown
        known.update(node.output)
    return next((value.name for value in graph.output if value.name not in known), None)


def _merge_graph(graph: onnx.GraphProto, buffer: _Buffer, begin: int, end: int, own: str) -> None:
    rest = bytearray()
    initializers = []
    for tag, start, inner, stop in _fields(buffer, begin, end):
        if tag >> 3 == onnx.GraphProto.INITIALIZER_FIELD_NUMBER:
            initializers.append(_initializer(buffer, inner, stop, own))
        else:
            rest += buffer[start:stop]
    graph.MergeFromString(bytes(rest))
    graph.initializer.extend(initializers)


def _initializer(buffer: _Buffer, begin: int, end: int, own: str) -> onnx.TensorProto:
    rest = bytearray()
    places = []
    for tag, start, inner, stop in _fields(buffer, begin, end):
        if tag >> 3 == onnx.TensorProto.RAW_DATA_FIELD_NUMBER and stop - inner >= SMALL_BYTES:
            places.append((inner, stop - inner))
        else:
            rest += buffer[start:stop]
    tensor = onnx.TensorProto.FromString(bytes(rest))
    size_bytes = sum(length for _, length in places) or len(tensor.raw_data)
    if size_bytes and size_bytes != -(-math.prod(tensor.dims) * _bits(tensor.data_type) // 8):
        raise _Damaged
    for offset, length in places:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": own, "offset": str(offset), "length": str(length)}.items():
            tensor.external_data.add(key=key, value=value)
    return tensor


def _bits(data_type: int) -> int:
    """Raises KeyError for a number that is no type's."""
    return _BITS.get(data_type) or tensor_dtype_to_np_dtype(data_type).itemsize * 8


def _fields(buffer: _Buffer, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message: tag, where the tag begins, where the value does, and where it ends."""
    while position < end:
        start = position
        tag, position = _varint(buffer, position)
        begin = position
        kind = tag & 7
        if kind == _VARINT:
            _, position = _varint(buffer, position)
        elif kind == _BYTES:
            length, begin = _varint(buffer, position)
            position = begin + length
        elif kind in _FIXED_BYTES:
            position += _FIXED_BYTES[kind]
        else:
            raise _Damaged
        if position > end or not tag >> 3:
            raise _Damaged
        yield tag, start, begin, position


def _varint(buffer: _Buffer, position: int) -> tuple[int, int]:
    """Protobuf's unsigned number that begins there, and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        byte = buffer[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise _Damaged
