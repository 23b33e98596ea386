"""What a model card's front matter says that a recipe repeats: licence, languages, base models, data sets, tags."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_export.documents import front_matter
from vlm_export.start.named import ADAPTER_CONFIG, CARD, CONFIG, Named

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BASE = "base_model_name_or_path"
# Tags that say how a model was trained and stored, which is another for the published one.
_OF_TRAINERS = re.compile(r"(generated_from_trainer|base_model:.*|trl|sft|lora|peft|transformers|safetensors)$")


@dataclass(frozen=True)
class Card:
    """Metadata for the published card; `license_from` is the folder or repo whose card names the licence."""

    license: str | None
    license_from: str
    language: tuple[str, ...]
    base_model: tuple[str, ...]
    datasets: tuple[str, ...]
    tags: tuple[str, ...]


def read_card(model: Named, adapters: Sequence[Named]) -> Card:
    """What the cards of the model and its adapters say; of two that say it, the one of the last adapter counts.

    A base model is a Hub id: what was named of the Hub, what an adapter was trained on, else what the cards name.
    """
    sources = [*reversed(adapters), model]
    matters = [(source, front_matter(source.text(CARD))) for source in sources]
    licensed = next(
        ((source, values["license"]) for source, values in matters if _is_text(values.get("license"))), None
    )
    return Card(
        str(licensed[1]) if licensed else None,
        licensed[0].reference if licensed else "",
        _first(values.get("language") for _, values in matters),
        _base_models(model, adapters)
        or tuple(filter(is_repo_id, _first(each.get("base_model") for _, each in matters))),
        _first(values.get("datasets") for _, values in matters),
        tuple(tag for tag in _first(values.get("tags") for _, values in matters) if not _OF_TRAINERS.match(tag)),
    )


def is_repo_id(value: Any) -> bool:
    """Whether a value looks like the id of a Hub repo, and is no path of this machine."""
    return isinstance(value, str) and bool(_REPO_ID.fullmatch(value)) and not Path(value).exists()


def _base_models(model: Named, adapters: Sequence[Named]) -> tuple[str, ...]:
    of_hub = [source.reference for source in (model, *adapters) if not source.is_local]
    trained_on = [adapter.json(ADAPTER_CONFIG).get(_BASE) for adapter in adapters]
    made_of = [model.json(CONFIG).get("_name_or_path")] if model.is_local else []
    return tuple(dict.fromkeys([*of_hub, *(str(each) for each in [*trained_on, *made_of] if is_repo_id(each))]))


def _first(values: Iterable[Any]) -> tuple[str, ...]:
    """The first value that is a text or a list of them."""
    for value in values:
        if found := [value] if _is_text(value) else [each for each in value or () if _is_text(each)]:
            return tuple(found)
    return ()


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
