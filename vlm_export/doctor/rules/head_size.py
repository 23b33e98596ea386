"""Contract §11, §12: `GroupQueryAttention` refuses some head sizes, and only when the graph runs."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from vlm_export.contract import HEAD_MULTIPLE, ROTATED_MULTIPLE
from vlm_export.doctor.findings import Finding, error
from vlm_export.doctor.repo_view import RepoView, dimensions

_PAST_KEY, _COSINES = 3, 7  # inputs of the operator


def check(repo: RepoView) -> Iterator[Finding]:
    """Find heads that are no multiple of what the operator takes."""
    for graph in repo.graphs:
        for node in graph.nodes("GroupQueryAttention"):
            size, rotated = _last(node, _PAST_KEY), _last(node, _COSINES)
            rotates = node.attributes.get_int("do_rotary", 0) == 1
            multiple = ROTATED_MULTIPLE if rotates else HEAD_MULTIPLE
            sizes = {"heads": size, "rotated parts": 2 * rotated if rotates and rotated else None}
            for what, found in sizes.items():
                if found is not None and found % multiple:
                    yield error(
                        graph.file,
                        f"GroupQueryAttention has {what} of {found}, and takes multiples of {multiple} alone",
                        "keep attention in plain operators, or rotate before the operator",
                    )


def _last(node: ir.Node, place: int) -> int | None:
    """The size of an input's last axis, if it is there and fixed."""
    value = node.inputs[place] if len(node.inputs) > place else None
    axes = None if value is None else dimensions(value)
    return axes[-1] if axes and isinstance(axes[-1], int) else None
