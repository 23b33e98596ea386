"""A recipe's facts, out of what a checkpoint and its adapters say of themselves."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from vlm_export import hub
from vlm_export.contract import LayoutName
from vlm_export.errors import InputError
from vlm_export.paths import expanded
from vlm_export.recipe import LOCAL_RECIPE
from vlm_export.start.card import Card, is_repo_id, read_card
from vlm_export.start.inspection import Adapter, Checkpoint, Repo, inspect
from vlm_export.start.named import Named
from vlm_export.start.pictures import Pictures, pictures
from vlm_export.start.pixels import Pixels, read_pixels
from vlm_export.start.prompts import QUESTION, Prompt, prompt_for
from vlm_export.start.rules import Rules, read_rules
from vlm_export.start.uses import USUAL, Use, dtypes_for
from vlm_export.tensors.other_folders import no_adapter
from vlm_export.wanted import Wanted, parse

_ON_HUB = ("tokenizer.json",)  # of a chat model: to see what its template writes
# Folders that say nothing of the model in them.
_NAMELESS = re.compile(
    r"(checkpoint|final|best|last|model|adapter|merged|out|output|weights|lora|run)s?([-_]?\d+)?", re.IGNORECASE
)
_NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Wishes:
    """What a user says of the recipe; what is None or empty is found.

    Attributes:
        path: the recipe's file.
        uses: what the export is for; `dtypes` in place of those that serve it.
        images: files and folders of pictures.
    """

    path: Path = Path(LOCAL_RECIPE)
    name: str | None = None
    layout: LayoutName | None = None
    uses: tuple[Use, ...] = ()
    dtypes: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()
    question: str = QUESTION
    license: str | None = None
    repo_id: str | None = None

    def options(self) -> list[str]:
        """The options that a user gave to say something of the recipe; its file and `--quantize` are none."""
        named = {"uses": "--for", "dtypes": "", "path": ""}
        given = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
        return [option for name in given if (option := named.get(name, f"--{name.replace('_', '-')}"))]


@dataclass(frozen=True)
class Draft:
    """What a recipe is written of."""

    wishes: Wishes
    name: str
    model: Checkpoint
    adapters: tuple[Adapter, ...]
    layout: LayoutName
    dtypes: tuple[str, ...]
    rules: Rules
    prompt: Prompt | None
    pictures: Pictures
    pixels: Pixels | None
    card: Card

    @property
    def sources(self) -> list[Named]:
        """The model and its adapters, in the order in which they are merged."""
        return [self.model.named, *(adapter.named for adapter in self.adapters)]

    @property
    def wanted(self) -> Wanted:
        """Its dtypes, read."""
        return parse(self.dtypes, "--quantize" if self.wishes.dtypes else "dtypes")

    @property
    def license(self) -> str | None:
        """The user's, else the one of a card."""
        return self.wishes.license or self.card.license


def draft(model: str, adapters: Sequence[str], wishes: Wishes, notify: Callable[[str], None]) -> Draft:
    """The facts of a recipe for a model and its adapters, folders or Hub repos; `notify` hears what is fetched.

    An adapter in the place of the model brings what it was trained on.

    Raises:
        InputError: one of them is missing, something else, or of no family; or a wish cannot be granted.
    """
    found, taken = _sources(model, adapters, notify)
    layout = wishes.layout or found.layouts[0]
    if layout not in found.layouts:
        raise InputError(f"--layout {layout}: a {found.model_type} has {', '.join(found.layouts)}")
    sources = [*(adapter.named for adapter in reversed(taken)), found.named]
    if layout == "chat":
        _fetch_tokenizers(sources)
    return Draft(
        wishes,
        wishes.name or _name([found.named, *(adapter.named for adapter in taken)]),
        found,
        taken,
        layout,
        wishes.dtypes or dtypes_for(wishes.uses or USUAL),
        read_rules(sources, layout),
        prompt_for(sources, found.named.config, layout, wishes.question),
        pictures(wishes.images, wishes.path.parent),
        read_pixels(found.named),
        read_card(found.named, [adapter.named for adapter in taken]),
    )


def _sources(
    model: str, adapters: Sequence[str], notify: Callable[[str], None]
) -> tuple[Checkpoint, tuple[Adapter, ...]]:
    first = inspect(model, notify)
    if isinstance(first, Adapter):
        if first.base_model is None:
            raise InputError(f"{model}: is an adapter and does not say of what: name the model before it")
        notify(f"{model} is an adapter: the model is {first.base_model}, which it was trained on")
        first, adapters = inspect(first.base_model, notify), [model, *adapters]
    if not isinstance(first, Checkpoint):
        raise InputError(f"{model}: is no model: {_what_it_is(first)}")
    return first, tuple(_adapter(reference, notify) for reference in adapters)


def _what_it_is(found: Adapter | Repo) -> str:
    reference = found.named.reference
    if isinstance(found, Repo):
        return f"it is exported already; `vlm-export doctor {reference}` says whether it is well"
    return f"it is an adapter again, trained on {found.base_model}: name the model first"


def _adapter(reference: str, notify: Callable[[str], None]) -> Adapter:
    found = inspect(reference, notify)
    if not isinstance(found, Adapter):
        raise InputError(no_adapter(found.named.path) or f"{reference}: no adapter (adapter_config.json)")
    if found.refused:
        raise InputError(f"{found.named.path / 'adapter_config.json'}: {found.refused}")
    return found


def _fetch_tokenizers(sources: Sequence[Named]) -> None:
    """Put `tokenizer.json` of Hub repos beside what was fetched of them."""
    for source in sources:
        if not source.is_local and any(name in source.sizes_bytes for name in _ON_HUB):
            hub.download(source.reference, revision=source.commit, allow_patterns=_ON_HUB)


def _name(sources: Sequence[Named]) -> str:
    """What to call the result: as the last source that has a name of its own, or the folder that it lies in."""
    for source in reversed(sources):
        path = source.path.resolve() if source.is_local else Path(source.reference)
        for part in (path.name, path.parent.name):
            if part and not _NAMELESS.fullmatch(part) and (name := _NO_NAME.sub("-", part).strip("-._")):
                return name
    return "my-model"


def reference_for(source: Named, recipe: Path) -> str:
    """A source as the recipe in that file names it: a Hub id, or a path relative to the recipe if it was given so."""
    if not source.is_local:
        return source.reference
    given = expanded(source.reference)
    if given.is_absolute():
        return str(given)
    relative = Path(os.path.relpath(given, recipe.parent)).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"


def called(reference: str) -> str:
    """What to call a source in what is published: a Hub id as it is, of a path the last part alone."""
    return reference if is_repo_id(reference) else Path(reference).name
