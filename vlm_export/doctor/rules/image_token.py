"""Contract §2.1, §14.5: image features replace one token, which has a row in the table and no other use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from vlm_export.doctor.findings import Finding, error, warning
from vlm_export.doctor.repo_view import (
    CONFIG,
    PROCESSOR,
    TOKENIZER,
    GraphFile,
    RepoView,
    dimensions,
    integer,
    mapping,
)

_LOOK_UPS = {"Gather": 0, "GatherBlockQuantized": 0}  # operator → the input that is the table
# Operators that leave ids as they are. Others, such as Min, can see to it that every id is a row.
_THROUGH = ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten")

# The token by model, where the processor has it written in its code.
_LITERALS = {
    **dict.fromkeys(("idefics3", "smolvlm", "paligemma", "lfm2_vl"), "<image>"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), "<|image_pad|>"),
    "glm_ocr": "<|image|>",
}


def check(repo: RepoView) -> Iterator[Finding]:
    """Find an id that is not said, is no row, ends texts, or is not what the tokenizer makes of the token."""
    if repo.client is None or not repo.client.image_token:
        return
    keys = repo.client.image_token
    ids = {key: number for key in keys if (number := integer(repo.config.get(key))) is not None}
    if not ids:
        yield error(CONFIG, f"has no {' or '.join(keys)}: no image can be put into a prompt", f"write {keys[0]}")
        return
    if len(set(ids.values())) > 1:
        yield error(CONFIG, f"names two image tokens: {ids}", "write the same id twice")
    token_id = next(iter(ids.values()))
    absent = [key for key in keys if key not in ids]
    if absent and "image_token_index" in absent:
        problem = "has no image_token_index, which is all that transformers.js 3.x reads"
        yield warning(CONFIG, problem, f'write "image_token_index": {token_id} beside it')
    yield from _uses(repo, token_id)
    for graph in repo.graphs:
        rows = _rows(graph) if graph.component == "embed_tokens" else None
        if rows is not None and not 0 <= token_id < rows:
            problem = f"its table has {rows} rows, and the image token's id is {token_id}"
            yield error(graph.file, problem, "append a row, or take an unused token of the table")


def _uses(repo: RepoView, token_id: int) -> Iterator[Finding]:
    for key in ("eos_token_id", "pad_token_id"):
        value = repo.generation.get(key)
        if token_id in (value if isinstance(value, list) else [value]):
            yield error(CONFIG, f"the image token's id {token_id} is also {key}", "give the image a token of its own")
    token = _LITERALS.get(repo.model_type) or repo.document(PROCESSOR).get("image_token")
    contents = repo.document(TOKENIZER)
    if not isinstance(token, str) or not contents:
        return
    found = _ids(contents.get("added_tokens"), token)
    if not found:
        problem = f"has no token {token!r} among added_tokens: it would become several ids"
        yield error(TOKENIZER, problem, f"add it with the id {token_id}, special and not normalized")
    elif found != [token_id]:
        problem = f"token {token!r} has the id {found[0]}, and config.json says {token_id}"
        yield error(TOKENIZER, problem, "write the same id in both")


def _ids(added_tokens: Any, token: str) -> list[Any]:
    """The ids that a list of added tokens has for one."""
    added = map(mapping, added_tokens if isinstance(added_tokens, list) else ())
    return [one.get("id") for one in added if one.get("content") == token]


def _rows(graph: GraphFile) -> int | None:
    """The rows of the table that ids are looked up in, if it can be found."""
    ids = graph.inputs.get("input_ids")
    pending = [ids] if ids is not None else []
    while pending:
        value = pending.pop()
        for node, place in value.uses():
            if node.op_type in _LOOK_UPS and place == 1:
                return _first_axis(node.inputs[_LOOK_UPS[node.op_type]])
            if node.op_type in _THROUGH and place == 0:
                pending.extend(node.outputs)
    return None


def _first_axis(table: ir.Value | None) -> int | None:
    axes = dimensions(table) if table is not None else None
    return integer(axes[0]) if axes else None
