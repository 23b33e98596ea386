"""Contract §6.3, §14.9: a square is written as `{height, width}`; a whole number keeps the picture's proportions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from vlm_export.contract import IMAGE_PROCESSORS
from vlm_export.doctor.findings import Finding, error, warning
from vlm_export.doctor.repo_view import PREPROCESSOR, RepoView, dimensions, integer, mapping

_ANY_SIZE = 4  # axes of pixel_values: those of other models hold tiles or patches, which their processors cut


def check(repo: RepoView) -> Iterator[Finding]:
    """Find sizes that give pictures of several shapes to a graph that takes one, or of another shape than it takes."""
    settings = repo.document(PREPROCESSOR)
    if not settings:
        return
    name = str(settings.get("image_processor_type", "")).removesuffix("Fast").removesuffix("Pil")
    kind = IMAGE_PROCESSORS.get(name)
    if kind is not None and kind.fills and settings.get("do_pad", True) is True:
        key, size = "image_size", settings.get("image_size")
        size = {"height": size, "width": size} if integer(size) is not None else size
    elif settings.get("do_center_crop") is True:
        key, size = "crop_size", settings.get("crop_size")
        size = {"height": size, "width": size} if integer(size) is not None else size
    else:
        key = "size" if "size" in settings else "image_size"
        size = settings.get(key)
    for file, taken in _taken_sizes(repo).items():
        square = json.dumps({"height": taken[0], "width": taken[1]})
        if size is None or (settings.get("do_resize") is False and key != "crop_size"):
            yield warning(PREPROCESSOR, f"resizes nothing, and {file} takes {taken} alone", f'write "size": {square}')
        elif _pixels(size) is None:
            problem = f"{key} is {size!r}, which keeps proportions, and {file} takes {taken} alone"
            yield error(PREPROCESSOR, problem, f'write "{key}": {square}')
        elif _pixels(size) != taken:
            yield error(PREPROCESSOR, f"{key} is {size}, and {file} takes {taken}", f'write "{key}": {square}')
    if isinstance(size, int) and (kind is None or kind.cut == "whole"):
        yield warning(
            PREPROCESSOR, f"{key} is the number {size}, by which transformers.js keeps proportions", "write both edges"
        )


def _taken_sizes(repo: RepoView) -> dict[str, tuple[int, int]]:
    """By graph, the height and width of the pixels that it takes, where those are fixed."""
    found: dict[tuple[int, int], str] = {}
    for graph, _ in repo.loaded():
        axes = dimensions(graph.inputs["pixel_values"]) if "pixel_values" in graph.inputs else None
        if axes and len(axes) == _ANY_SIZE and isinstance(axes[2], int) and isinstance(axes[3], int):
            found.setdefault((axes[2], axes[3]), graph.name)
    return {file: size for size, file in found.items()}


def _pixels(size: Any) -> tuple[int, int] | None:
    """The height and width that all pictures have after it, if they have the same."""
    height, width = (integer(mapping(size).get(edge)) for edge in ("height", "width"))
    return None if height is None or width is None else (height, width)
