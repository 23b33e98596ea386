"""Write a graph to the files that clients load, tensor by tensor: its weights are never in memory as a whole.

Up to 1 GB the weights are inside the file: a skeleton of the protobuf message is serialized without them, and they
follow as further `initializer` fields (https://protobuf.dev/programming-guides/encoding: fields come in any order).
Above it they are external data as transformers.js reads it: `<file>.onnx_data`, then `_data_1`, …; each chunk below
1 GB, so that a browser can fetch it into one ArrayBuffer. Small constants stay in the skeleton, where shape inference
needs them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from vlm_export.tensors.graph_message import SMALL_BYTES

INLINE_BYTES = 1_000_000_000  # a file above this keeps its weights beside it
CHUNK_BYTES = 1_000_000_000
# Tags of length-delimited fields in onnx.proto: number << 3 | 2.
_GRAPH = bytes([onnx.ModelProto.GRAPH_FIELD_NUMBER << 3 | 2])
_INITIALIZER = bytes([onnx.GraphProto.INITIALIZER_FIELD_NUMBER << 3 | 2])
_RAW_DATA = bytes([onnx.TensorProto.RAW_DATA_FIELD_NUMBER << 3 | 2])


def save_graph(model: ir.Model, path: Path, *, inline_bytes: int = INLINE_BYTES, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Write a graph, with external data where it would pass `inline_bytes`. Returns the number of data chunks."""
    graph, large = model.graph, _large(model)
    if sum(tensor.nbytes for tensor in large.values()) <= inline_bytes:
        _save_inline(model, large, path)
        return 0
    chunks = _chunks(large, chunk_bytes)
    for index, names in enumerate(chunks):
        file = f"{path.name}_data{f'_{index}' if index else ''}"
        external = ir.external_data.convert_tensors_to_external([large[name] for name in names], path.parent, file)
        for name, tensor in zip(names, external, strict=True):
            graph.initializers[name].const_value = tensor
    ir.save(model, path)
    return len(chunks)


def size_bytes(model: ir.Model) -> int:
    """The size of what `save_graph` writes: to within a few bytes, or with external data to within the files' names."""
    large = _large(model)
    heads = sum(len(_initializer(name, tensor)) for name, tensor in large.items())
    return _without(model, large).ByteSize() + heads + sum(tensor.nbytes for tensor in large.values())


def copy_graph(source: Path, target: Path) -> int:
    """Write a graph file again under another name, for clients know a dtype by it. Returns the number of data chunks.

    What lies beside it is copied too, and named in the new file.
    """
    chunks = sorted(source.parent.glob(f"{source.name}_data*"))
    if not chunks:
        shutil.copyfile(source, target)
        return 0
    model = onnx.load(source, load_external_data=False)
    for initializer in model.graph.initializer:
        for entry in initializer.external_data:
            if entry.key == "location":
                entry.value = entry.value.replace(source.name, target.name, 1)
    for chunk in chunks:
        shutil.copyfile(chunk, target.with_name(chunk.name.replace(source.name, target.name, 1)))
    target.write_bytes(model.SerializeToString())
    return len(chunks)


def _chunks(tensors: Mapping[str, ir.TensorProtocol], chunk_bytes: int) -> list[list[str]]:
    """The names in order, as many in each chunk as fit; a tensor that is larger than a chunk has one of its own."""
    chunks: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if chunks[-1] and filled + tensor.nbytes > chunk_bytes:
            chunks.append([])
            filled = 0
        chunks[-1].append(name)
        filled += tensor.nbytes
    return chunks


def _large(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """The initializers that are written one by one, by name."""
    found = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {
        name: tensor
        for name, tensor in found.items()
        if tensor is not None and tensor.dtype != ir.DataType.STRING and tensor.nbytes >= SMALL_BYTES
    }


def _without(model: ir.Model, tensors: Mapping[str, ir.TensorProtocol]) -> onnx.ModelProto:
    """The message of the model without these initializers, which it has again afterwards."""
    values = [model.graph.initializers.pop(name) for name in tensors]
    message = ir.to_proto(model)
    for value in values:
        model.graph.register_initializer(value)
    return message


def _save_inline(model: ir.Model, tensors: Mapping[str, ir.TensorProtocol], path: Path) -> None:
    """The message of the model, with `tensors` written one by one at the end of its graph."""
    message = _without(model, tensors)
    graph = message.graph.SerializeToString()
    message.ClearField("graph")
    heads = [_initializer(name, tensor) for name, tensor in tensors.items()]
    length = len(graph) + sum(map(len, heads)) + sum(tensor.nbytes for tensor in tensors.values())
    with path.open("wb") as file:
        file.write(message.SerializeToString() + _GRAPH + _varint(length) + graph)
        for head, tensor in zip(heads, tensors.values(), strict=True):
            file.write(head)
            before = file.tell()
            tensor.tofile(file)  # type: ignore[attr-defined]
            assert file.tell() - before == tensor.nbytes, tensor.name


def _initializer(name: str, tensor: ir.TensorProtocol) -> bytes:
    """An initializer up to the first byte of its raw data."""
    proto = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())
    head = proto.SerializeToString() + _RAW_DATA + _varint(tensor.nbytes)
    return _INITIALIZER + _varint(len(head) + tensor.nbytes) + head


def _varint(number: int) -> bytes:
    """Protobuf's encoding of an unsigned number: seven bits a byte, the lowest first."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])
