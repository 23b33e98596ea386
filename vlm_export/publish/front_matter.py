"""The model card's front matter: what the Hub lists, filters and shows of a repo.

Keys and values are those of the Hub's documentation (hub-docs, `modelcard.md` and `docs/hub/model-cards.md`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from vlm_export.publish.addresses import address
from vlm_export.publish.examples import Example
from vlm_export.recipe import Recipe
from vlm_export.spec.client import Client
from vlm_export.verify.report import DtypeRow

_TASKS = {"image-to-text": "Image to text", "image-text-to-text": "Image and text to text"}
_SHARE = re.compile(r"(\d+) of (\d+)")


def front_matter(
    recipe: Recipe, client: Client, repo_id: str, rows: Sequence[DtypeRow], examples: Sequence[Example]
) -> dict[str, Any]:
    """The front matter of a repo's card. What is not known is left out.

    `rows` are the dtypes with what was measured of them, `examples` pictures in the repo.
    """
    hub = recipe.hub
    values = {
        "library_name": "transformers.js" if client.node else "onnx",
        "pipeline_tag": client.task,
        "license": hub.license,
        "license_name": hub.license_name,
        "license_link": hub.license_link,
        "language": list(hub.language),
        "base_model": list(hub.base_model),
        "base_model_relation": relation(recipe) if hub.base_model else None,
        "datasets": list(hub.datasets),
        "tags": list(dict.fromkeys(["onnx", "vlm-export", *hub.tags])),
        "thumbnail": address(repo_id, examples[0].file) if examples else None,
        "widget": [_widget(client, repo_id, example) for example in examples],
        "model-index": _model_index(recipe.name, client.task, rows),
    }
    return {key: value for key, value in values.items() if value}


def relation(recipe: Recipe) -> str:
    """What the repo is to its base models, in the Hub's words: what the recipe says, else what follows from it.

    A model that is published by itself is `quantized`, as conversions are called there; with adapters, or of parts that
    were trained together, it is a `finetune`.
    """
    if recipe.hub.base_model_relation:
        return recipe.hub.base_model_relation
    is_itself = not recipe.adapters and list(recipe.hub.base_model) == [recipe.model]
    return "quantized" if is_itself else "finetune"


def _widget(client: Client, repo_id: str, example: Example) -> dict[str, Any]:
    asked = {"text": client.question} if client.question else {}
    return {
        "src": address(repo_id, example.file),
        "example_title": example.caption or example.file,
        **asked,
        "output": {"text": example.caption},
    }


def _model_index(name: str, task: str, rows: Sequence[DtypeRow]) -> list[dict[str, Any]]:
    metrics = [metric for row in rows for metric in _metrics(row)]
    if not metrics:
        return []
    result = {
        "task": {"type": task, "name": _TASKS[task]},
        "dataset": {"type": "golden-images", "name": "Pictures that the PyTorch model captioned"},
        "metrics": metrics,
    }
    return [{"name": name, "results": [result]}]


def _metrics(row: DtypeRow) -> Iterator[dict[str, Any]]:
    """What a dtype's captions have in common with PyTorch's."""
    share = _SHARE.match(row.captions_exact or "")
    if share and int(share[2]):
        value = round(int(share[1]) / int(share[2]), 4)
        yield {"type": "exact_match", "value": value, "name": f"Captions equal to PyTorch's, {row.dtype}"}
    if row.rouge_l is not None and row.rouge_l == row.rouge_l:
        yield {"type": "rouge", "value": round(row.rouge_l, 4), "name": f"ROUGE-L to PyTorch's captions, {row.dtype}"}
