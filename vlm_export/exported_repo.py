"""The exported repo that a user named: a recipe whose work folder has one, a folder, or a repo of the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from vlm_export import bundled
from vlm_export.errors import InputError
from vlm_export.recipe import RecipeFile, find_recipe
from vlm_export.runtime.repo import CONFIG, ONNX

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_repo(reference: str | None, work: Path | None = None) -> Path:
    """The folder of an exported repo: of a folder, a recipe (by default as `find_recipe` has it), or an id of the Hub.

    Raises:
        InputError: there is no such thing, or the recipe was not exported yet.
    """
    recipe = recipe_of(reference)
    if recipe is not None:
        folder = work_folder(recipe, work) / "repo"
        if not (folder / CONFIG).is_file():
            raise InputError(f"{folder}: nothing exported yet: run {export_commands(recipe)}")
        return folder
    folder = Path(str(reference)).expanduser()
    if folder.is_dir():
        return _within(folder)
    from vlm_export import hub

    return hub.download(str(reference), allow_patterns=("*.json", "*.jinja", f"{ONNX}/*"))


def recipe_of(reference: str | None) -> RecipeFile | None:
    """The recipe that a reference names, or None where it is a folder or an id of the Hub.

    Raises:
        InputError: it is none of these.
    """
    if reference is None or reference in bundled.recipe_names() or reference.endswith((".yaml", ".yml")):
        return find_recipe(reference)
    if Path(reference).expanduser().is_dir() or is_repo_id(reference):
        return None
    try:
        return find_recipe(reference)
    except InputError as error:
        raise InputError(f"{error}; nor is it a folder, or an id of the Hub (org/name)") from None


def is_repo_id(reference: str) -> bool:
    """Whether it can be an id of the Hub: `org/name`, and no path."""
    return _REPO_ID.fullmatch(reference) is not None


def work_folder(recipe: RecipeFile, work: Path | None) -> Path:
    return work or Path("build") / recipe.name


def export_commands(recipe: RecipeFile) -> str:
    """What a user runs to export a recipe."""
    name = "" if recipe.is_bundled and recipe.name == bundled.DEFAULT_RECIPE else f" {_reference(recipe)}"
    return f"`vlm-export merge{name}`, then `vlm-export onnx{name}`"


def _reference(recipe: RecipeFile) -> str:
    return recipe.name if recipe.is_bundled else str(recipe.path)


def _within(folder: Path) -> Path:
    """The repo that a folder is, or that it holds where it is a work folder."""
    for candidate in (folder, folder / "repo"):
        if (candidate / CONFIG).is_file() and (candidate / ONNX).is_dir():
            return candidate
    raise InputError(f"{folder}: no exported repo: it has no {CONFIG} and {ONNX}/")
