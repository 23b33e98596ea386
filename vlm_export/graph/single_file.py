"""The graphs of a repo, written, as one file in each dtype."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from vlm_export.contract import SINGLE_GRAPH
from vlm_export.dtypes import DTYPES
from vlm_export.errors import InputError
from vlm_export.files import read_json
from vlm_export.graph.graph_file import save_graph
from vlm_export.graph.graph_on_disk import open_graph
from vlm_export.graph.loop import join
from vlm_export.graph.loop_start import Start
from vlm_export.graph.next_token import Rules
from vlm_export.graph.pieces import pieces
from vlm_export.manifest import ONNX, GraphFile
from vlm_export.runtime.drivers import start_token_id
from vlm_export.runtime.repo import Repo, open_repo
from vlm_export.spec import cache

_ENCODER, _DECODER = "encoder_model", "decoder_model_merged"
_POSITIONS = 4096  # of a model that does not say how many it has


def write(folder: Path, dtype: str) -> GraphFile:
    """Write `model` in a dtype beside the graphs of a captioner's repo that it is made of.

    Raises:
        InputError: the repo has a rule of generation that is not made as a graph, or a decoder with another cache than
            attention's.
    """
    repo, suffix = open_repo(folder), DTYPES[dtype].suffix
    encoder, decoder = (open_graph(folder / ONNX / f"{name}{suffix}.onnx") for name in (_ENCODER, _DECODER))
    names = [str(value.name) for value in decoder.graph.inputs]
    if other := next((name for name in names if cache.is_past(name) and not cache.has_positions(name)), None):
        raise InputError(f"{folder}: layout single: its loop carries no state like {other}: take another layout")
    rules = Rules.of(repo.generation, _vocabulary(decoder), begun=1)
    known = pieces(read_json(folder / "tokenizer.json"), max(rules.vocabulary, rules.pad + 1))
    model = join([encoder, decoder], _start(repo), rules, takes_picture=bool(repo.in_graph), pieces=known)
    path = folder / ONNX / f"{SINGLE_GRAPH}{suffix}.onnx"
    chunks = save_graph(model, path)
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    return GraphFile(SINGLE_GRAPH, dtype, path.name, size, chunks)


def remove_parts(folder: Path) -> None:
    """Remove the graphs that are in the one file."""
    for name in (_ENCODER, _DECODER):
        for path in (folder / ONNX).glob(f"{name}*"):
            path.unlink()


def _start(repo: Repo) -> Start:
    return Start(
        token=start_token_id(repo.generation),
        is_history=not repo.has_prefix,
        positions=repo.positions or _POSITIONS,
        has_prefix=repo.has_prefix,
    )


def _vocabulary(decoder: ir.Model) -> int:
    [logits] = [value for value in decoder.graph.outputs if value.name == "logits"]
    assert logits.shape is not None
    size = logits.shape[-1]
    assert isinstance(size, int), size
    return size
