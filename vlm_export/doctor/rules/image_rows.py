"""Contract §0.6, §14.4: the processor writes as many image tokens as `image_features` has rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm_export.doctor.findings import Finding, error
from vlm_export.doctor.repo_view import PREPROCESSOR, PROCESSOR, GraphFile, RepoView, dimensions, integer, mapping


def check(repo: RepoView) -> Iterator[Finding]:
    """Find counts that differ, where graph and processor fix them."""
    name = repo.document(PREPROCESSOR).get("processor_class")
    settings = repo.document(PROCESSOR)
    for graph, _ in repo.loaded():
        rows = _rows(graph)
        if rows is None:
            continue
        if name == "LlavaProcessor":
            tokens, keys = _llava_tokens(repo, graph), "patch_size and num_additional_image_tokens"
        elif name in ("Idefics3Processor", "SmolVLMProcessor"):
            tokens, keys = integer(settings.get("image_seq_len")), "image_seq_len"
        else:
            continue
        if tokens is not None and tokens != rows:
            yield error(
                PROCESSOR,
                f"{name} writes {tokens} image tokens, and {graph.name} gives {rows} rows: no image goes in",
                f"set {keys} so that it writes {rows}",
            )


def _rows(graph: GraphFile) -> int | None:
    """The rows of one image or tile, where the graph fixes them."""
    axes = dimensions(graph.outputs["image_features"]) if "image_features" in graph.outputs else None
    return integer(axes[1]) if axes and len(axes) == 3 else None


def _llava_tokens(repo: RepoView, graph: GraphFile) -> int | None:
    """What a LlavaProcessor writes: floor(height / patch) · floor(width / patch) + additional."""
    settings = repo.document(PROCESSOR)
    patch, more = (integer(settings.get(key)) for key in ("patch_size", "num_additional_image_tokens"))
    edges = _edges(repo, graph)
    if not patch or patch < 0 or more is None or edges is None:
        return None
    return (edges[0] // patch) * (edges[1] // patch) + more


def _edges(repo: RepoView, graph: GraphFile) -> tuple[int, int] | None:
    """Height and width of the pixels, as the graph or the processor's settings have them."""
    axes = dimensions(graph.inputs["pixel_values"]) if "pixel_values" in graph.inputs else None
    found: list[Any] = list(axes[2:]) if axes and len(axes) == 4 else []
    if not all(map(integer, found)) or not found:
        settings = repo.document(PREPROCESSOR)
        size = mapping(settings.get("crop_size" if settings.get("do_center_crop") is True else "size"))
        found = [size.get("height"), size.get("width")]
    height, width = map(integer, found)
    return None if height is None or width is None else (height, width)
