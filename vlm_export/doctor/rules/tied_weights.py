"""Contract §12 (#1051): a head that is the token table, or any other matrix, is stored once in a file."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from vlm_export.doctor.findings import Finding, warning
from vlm_export.doctor.repo_view import GraphFile, RepoView

_LEAST_BYTES = 16_384
_SAMPLES = 64  # numbers by which matrices that may be equal are told from those that are not


def check(repo: RepoView) -> Iterator[Finding]:
    """Find matrices that a file has twice, as they are or transposed."""
    for graph in repo.graphs:
        if graph.has_weights:
            yield from _twice(graph)


def _twice(graph: GraphFile) -> Iterator[Finding]:
    seen: dict[bytes, list[tuple[str, ir.TensorProtocol]]] = {}
    for name, value in graph.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _LEAST_BYTES or len(tensor.shape) != 2:
            continue
        matrix = tensor.numpy()
        prints = dict.fromkeys((_print(matrix), _print(matrix.T)))
        alike = [pair for one in prints for pair in seen.get(one, ())]
        twin = next((other for other, stored in alike if _equal(stored.numpy(), matrix)), None)
        if twin is not None:
            yield warning(
                graph.file,
                f"{name} is {twin} over again, {tensor.nbytes / 1e6:.1f} MB",
                "store it once, and let both places read it (a head through MatMul on the transposed table)",
            )
        seen.setdefault(_print(matrix), []).append((name, tensor))


def _print(matrix: np.ndarray) -> bytes:
    """Some of a matrix's numbers, with its form: equal for equal matrices."""
    rows, columns = matrix.shape
    places = np.arange(_SAMPLES) * 7919
    return repr((matrix.shape, str(matrix.dtype))).encode() + matrix[places % rows, places % columns].tobytes()


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    same = one.shape == other.shape and np.array_equal(one, other)
    return bool(same or (one.shape == other.shape[::-1] and np.array_equal(one, other.T)))
