"""Where an exported repo lies that a user names by its folder or by the recipe it was made from."""

from __future__ import annotations

from pathlib import Path

from vlm_export.artifacts import Work
from vlm_export.errors import InputError
from vlm_export.recipe import find_recipe


def find_repo(reference: str | None, work: Path | None) -> Path:
    """The repo's folder: `reference` itself, or in the work folder of the recipe of that name.

    Raises:
        InputError: no such recipe, or nothing was exported there.
    """
    if reference is not None and Path(reference).is_dir():
        folder, next_step = Path(reference), "give a folder that `vlm-export onnx` made, or a recipe"
    else:
        recipe = find_recipe(reference)
        folder = Work(work or Path("build") / recipe.name).repo
        named = f" {reference}" if reference else ""
        next_step = f"run `vlm-export merge{named}`, then `vlm-export onnx{named}`"
    if not (folder / "config.json").is_file() or not (folder / "onnx").is_dir():
        raise InputError(f"{folder}: nothing exported here: {next_step}")
    return folder
