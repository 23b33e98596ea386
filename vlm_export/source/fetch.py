"""A recipe's model and adapters as local folders: where they lie, or downloaded from the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from vlm_export import hub
from vlm_export.errors import InputError
from vlm_export.families._known import named_as_today
from vlm_export.forms.reading import json_of, needed_json_of
from vlm_export.recipe import OF_MODEL, RecipeFile
from vlm_export.source import companions, remote_code
from vlm_export.source.checkpoint import ADAPTER_FILES, COMPANIONS, MODEL_FILES
from vlm_export.tensors.weight_files import folder_of

Given = ParamSpec("Given")
Made = TypeVar("Made")
_COMPANIONS_BY_KEY = {
    "tokenizer": (companions.TOKENIZER, companions.TEMPLATE),
    "processor": (companions.PROCESSOR,),
}  # a recipe's keys and what they are about


@dataclass(frozen=True)
class Sources:
    """Local folders, or files of weights in them, of the model and its adapters; and of what lies beside them.

    Attributes:
        commits: by a key of the recipe, the repo of the Hub and its commit, as `org/model@…`; without local folders.
    """

    model: Path
    adapters: tuple[Path, ...]
    beside: companions.Choice
    commits: Mapping[str, str] = field(default_factory=dict)


def sources(recipe: RecipeFile) -> Sources:
    """Where the recipe's model and adapters lie: local folders or files of weights, else what is needed of Hub repos.

    Raises:
        InputError: neither a local path nor a repo of the Hub, the Hub cannot be reached, or the model is of another
            family than the recipe says.
    """

    commits: dict[str, str] = {}

    def find(reference: str, revision: str | None, key: str, files: tuple[str, ...]) -> Path:
        local = recipe.found(reference, key)
        if local is not None:
            return local
        folder = hub.download(reference, revision=revision, allow_patterns=files)
        commits[key] = f"{reference}@{folder.name}"
        return folder

    model = find(recipe.recipe.model, recipe.recipe.revision, "model", MODEL_FILES)
    _check_model_type(recipe, folder_of(model) / "config.json")
    adapters = tuple(
        find(adapter.path, adapter.revision, f"adapters.{index}.path", ADAPTER_FILES)
        for index, adapter in enumerate(recipe.recipe.adapters)
    )
    folders: dict[str, Path] = {}
    for key, kinds in _COMPANIONS_BY_KEY.items():
        named = getattr(recipe.recipe, key)
        if named is not None:
            place = model if named == OF_MODEL else find(named, None, key, COMPANIONS)
            folders |= dict.fromkeys(kinds, folder_of(place))
    return Sources(model, adapters, companions.Choice(folders, recipe.recipe.chat_template), commits)


@contextmanager
def trusted_code(recipe: RecipeFile) -> Iterator[None]:
    """Within, the model's `model_type` means the classes of its repo, if the recipe trusts them.

    Raises:
        InputError: they are not those of a commit of the Hub, or cannot be used.
    """
    model, revision = recipe.recipe.model, recipe.recipe.revision
    if not recipe.recipe.trust_remote_code:
        yield
        return
    if recipe.local(model) is not None:
        raise InputError(
            f"{recipe.path}: trust_remote_code: {model} is a local folder, whose code no commit pins: "
            "name a repo of the Hub"
        )
    folder = hub.download(model, revision=revision, allow_patterns=remote_code.FILES)
    if folder.name != revision:
        raise InputError(f"{recipe.path}: revision: the Hub answered with {folder.name} in place of {revision}")
    with remote_code.registered(folder, f"{model}@{revision}"):
        yield


def with_trusted_code(
    stage: Callable[Concatenate[RecipeFile, Given], Made],
) -> Callable[Concatenate[RecipeFile, Given], Made]:
    """Decorate a stage of a recipe, so that it runs within `trusted_code`."""

    @wraps(stage)
    def run(recipe: RecipeFile, *arguments: Given.args, **options: Given.kwargs) -> Made:
        with trusted_code(recipe):
            return stage(recipe, *arguments, **options)

    return run


def _check_model_type(recipe: RecipeFile, config: Path) -> None:
    wanted = recipe.recipe.model_type
    if wanted is None:
        json_of(config.parent, config.name)
    elif (found := named_as_today(needed_json_of(config.parent, config.name)).get("model_type")) != wanted:
        raise InputError(f"{recipe.path}: model_type: {wanted!r}, but {config} says {found!r}; correct or remove it")
