"""Read a graph file of anybody's as onnx_ir has it, its weights left on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from vlm_export.errors import InputError
from vlm_export.tensors.graph_message import read_message, stored_file


def open_graph(path: Path) -> ir.Model:
    """A graph of which only constants below a kilobyte are in memory; others are read when they are asked for.

    Raises:
        InputError: the file holds no ONNX model, or not all of one.
    """
    message, stored = read_message(path), stored_file(path)
    try:
        model = ir.from_proto(message)
    except (ir.serde.SerdeError, ValueError, TypeError) as error:
        raise InputError(f"{path}: is damaged: onnx_ir does not read it") from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor) and value.const_value.location == stored.name:
            value.const_value.base_dir = stored.parent
    return model


def external_files(model: ir.Model, path: Path) -> dict[str, int]:
    """The other files that a graph's weights lie in, by name, and where the last byte of them ends."""
    ends: dict[str, int] = {}
    for tensor in external_tensors(model, path):
        location = str(tensor.location)
        ends[location] = max(ends.get(location, 0), (tensor.offset or 0) + (tensor.length or tensor.nbytes))
    return ends


def external_tensors(model: ir.Model, path: Path) -> Iterator[ir.ExternalTensor]:
    """The weights that lie in other files than the graph's own, `path`."""
    own = stored_file(path).name
    for tensor in _tensors(model.graph):
        if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) != own:
            yield tensor


def _tensors(main: ir.Graph) -> Iterator[ir.TensorProtocol | None]:
    """The constants of a graph and of those within it: initializers, and tensors that are attributes."""
    for graph in (main, *main.subgraphs()):
        yield from (value.const_value for value in graph.initializers.values())
    for node in main.all_nodes():
        yield from (one.as_tensor() for one in node.attributes.values() if one.type == ir.AttributeType.TENSOR)
