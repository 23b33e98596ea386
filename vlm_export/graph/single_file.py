"""The graphs of a repo, written, as one file in each dtype."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from vlm_export.contract import NUMBERED_FROM_ONE, SINGLE_GRAPH
from vlm_export.dtypes import DTYPES
from vlm_export.graph.graph_file import save_graph
from vlm_export.graph.graph_on_disk import open_graph
from vlm_export.graph.loop import join
from vlm_export.graph.loop_prompt import Prompted
from vlm_export.graph.loop_start import Start
from vlm_export.graph.next_token import Rules
from vlm_export.graph.pieces import pieces_of
from vlm_export.manifest import ONNX, GraphFile
from vlm_export.runtime.drivers import choose_driver, image_token_id, start_token_id
from vlm_export.runtime.repo import Repo, open_repo

_POSITIONS = 4096  # of a model that does not say how many it has


def write(folder: Path, dtype: str, search: Mapping[str, Any] = MappingProxyType({})) -> GraphFile:
    """Write `model` in a dtype beside the graphs of a repo, a captioner's or a chat's, that it is made of.

    `search` is how a recipe searches with beams.

    Raises:
        InputError: the repo has a rule of generation that is not made as a graph, or a decoder with another cache than
            attention's.
    """
    repo, suffix = open_repo(folder), DTYPES[dtype].suffix
    names = choose_driver(repo.files).components
    parts = [open_graph(folder / ONNX / f"{name}{suffix}.onnx") for name in names]
    generation = {**repo.generation, **search}
    rules = Rules.of(generation, _vocabulary(parts[-1]), begun=None if repo.takes_prompt else 1)
    known = pieces_of(folder / "tokenizer.json", max(rules.vocabulary, rules.pad + 1))
    start = _prompted(repo, rules.vocabulary) if repo.takes_prompt else _start(repo)
    model = join(parts, start, rules, takes_picture=bool(repo.in_graph), pieces=known)
    path = folder / ONNX / f"{SINGLE_GRAPH}{suffix}.onnx"
    chunks = save_graph(model, path)
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    return GraphFile(SINGLE_GRAPH, dtype, path.name, size, chunks)


def remove_parts(folder: Path) -> None:
    """Remove the graphs that are in the one file."""
    for name in choose_driver(open_repo(folder).files).components:
        for path in (folder / ONNX).glob(f"{name}*"):
            path.unlink()


def _start(repo: Repo) -> Start:
    return Start(
        token=start_token_id(repo.generation),
        is_history=not repo.has_prefix,
        positions=repo.positions or _POSITIONS,
        has_prefix=repo.has_prefix,
    )


def _prompted(repo: Repo, vocabulary: int) -> Prompted:
    return Prompted(
        image_token=image_token_id(repo.config),
        first=int(repo.config["model_type"] in NUMBERED_FROM_ONE),
        positions=repo.positions or _POSITIONS,
        vocabulary=vocabulary,
    )


def _vocabulary(decoder: ir.Model) -> int:
    [logits] = [value for value in decoder.graph.outputs if value.name == "logits"]
    assert logits.shape is not None
    size = logits.shape[-1]
    assert isinstance(size, int), size
    return size
