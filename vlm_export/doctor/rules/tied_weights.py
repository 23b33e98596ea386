"""Contract §12 (#1051): a head that is the token table, or any other matrix, is stored once in a file."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from vlm_export.doctor.findings import Finding, warning
from vlm_export.doctor.repo_view import GraphFile, RepoView

_LEAST_BYTES = 16_384
_SAMPLES = 16  # numbers by which matrices that may be equal are told from those that are not


def check(repo: RepoView) -> Iterator[Finding]:
    """Find matrices that a file has twice, as they are or transposed."""
    for graph in repo.graphs:
        if graph.has_weights:
            yield from _twice(graph)


def _twice(graph: GraphFile) -> Iterator[Finding]:
    seen: dict[bytes, list[tuple[str, ir.TensorProtocol]]] = {}
    for name, value in graph.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _LEAST_BYTES or len(tensor.shape) != 2 or tensor.dtype.bitwidth < 8:
            continue
        own, turned = _print(_matrix(tensor)), _print(_matrix(tensor).T)
        alike = [pair for one in {own, turned} for pair in seen.get(one, ())]
        twin = next((other for other, stored in alike if _equal(stored, tensor)), None)
        if twin is not None:
            yield warning(
                graph.file,
                f"{name} is {twin} over again, {tensor.nbytes / 1e6:.1f} MB",
                "store it once, and let both places read it (a head through MatMul on the transposed table)",
            )
        seen.setdefault(own, []).append((name, tensor))


def _matrix(tensor: ir.TensorProtocol) -> np.ndarray:
    """A matrix's numbers. onnx_ir would keep what it has read of a file for as long as there is the tensor."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    shape = tuple(tensor.shape.numpy())
    return np.memmap(tensor.path, tensor.dtype.numpy(), mode="r", offset=tensor.offset or 0, shape=shape)


def _print(matrix: np.ndarray) -> bytes:
    """Some of a matrix's numbers, with its form: equal for equal matrices."""
    rows, columns = matrix.shape
    places = np.arange(_SAMPLES) * 7919
    return repr((matrix.shape, str(matrix.dtype))).encode() + matrix[places % rows, places % columns].tobytes()


def _equal(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    first, second = _matrix(one), _matrix(other)
    if first.shape == second.shape and np.array_equal(first, second):
        return True
    return first.shape == second.shape[::-1] and np.array_equal(first, second.T)
