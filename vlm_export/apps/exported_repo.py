"""The exported repo that a user named: a recipe whose work folder has one, a folder, or a repo of the Hub."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from vlm_export import bundled
from vlm_export.apps.download import download, is_repo_id
from vlm_export.apps.load import load
from vlm_export.commands import Commands
from vlm_export.errors import InputError
from vlm_export.files import Work
from vlm_export.own_files import own_file
from vlm_export.paths import expanded
from vlm_export.recipe import RecipeFile, find_recipe
from vlm_export.runtime.model import Backend, Engine, Model
from vlm_export.runtime.repo import CONFIG, ONNX

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")
STDIN = Path("-")  # as an image


def find_repo(reference: str | None, work: Path | None = None, *, dtype: str | None = None) -> Path:
    """The folder of an exported repo: a folder, a recipe's (by default as `find_recipe` has it), or one of the Hub's.

    Of the Hub's, the graphs of one dtype are fetched: `dtype`, or what the runtime would choose.

    Raises:
        InputError: there is no such thing, or the recipe was not exported yet.
    """
    recipe = recipe_of(reference)
    if recipe is not None:
        own = work_of(recipe, work)
        if own_file(own.repo, CONFIG) is None:
            raise InputError(f"{own.repo}: nothing exported yet: run {_export_commands(recipe, own)}")
        return own.repo
    folder = expanded(str(reference))
    return _within(folder) if folder.is_dir() else download(str(reference), dtype)


def open_model(
    reference: str | None,
    work: Path | None = None,
    *,
    dtype: str | None = None,
    backend: Backend | Literal["auto"] = "auto",
    threads: int = 0,
    notify: Callable[[str], None] = warnings.warn,
    fall_back_later: bool = True,
) -> Model:
    """Load the model that a user named, a recipe's with PyTorch where it is not exported and `backend` allows it.

    The options are those of `load`.

    Raises:
        InputError: as of `find_repo` and `load`.
    """
    recipe = recipe_of(reference)
    if recipe is None:
        folder = find_repo(reference, work, dtype=dtype)
        return load(
            folder, dtype=dtype, backend=backend, threads=threads, notify=notify, fall_back_later=fall_back_later
        )

    def fallback() -> Engine:
        from vlm_export.apps.pytorch_engine import from_recipe

        if recipe.trusted_code:
            notify(f"warning: trust_remote_code: runs code of {recipe.trusted_code}")
        return from_recipe(recipe)

    own = work_of(recipe, work)
    if backend == "torch":
        return Model(fallback())
    if backend == "auto" and own_file(own.repo, CONFIG) is None:
        model = Model(fallback())
        commands = _export_commands(recipe, own)
        notify(f"{recipe.name} is not exported yet: captioning with PyTorch; to export it, {commands}")
        return model
    folder = find_repo(reference, work)
    return load(
        folder,
        dtype=dtype,
        backend=backend,
        threads=threads,
        notify=notify,
        fallback=fallback,
        fall_back_later=fall_back_later,
    )


def recipe_of(reference: str | None) -> RecipeFile | None:
    """The recipe that a reference names, or None where it is a folder or an id of the Hub.

    Raises:
        InputError: it is none of these.
    """
    if reference is None or reference in bundled.recipe_names() or reference.endswith((".yaml", ".yml")):
        return find_recipe(reference)
    if expanded(reference).is_dir() or is_repo_id(reference):
        return None
    try:
        return find_recipe(reference)
    except InputError as error:
        raise InputError(f"{error}; nor is it a folder, or an id of the Hub (org/name)") from None


def split_arguments(arguments: Sequence[str], *, needs_images: bool = True) -> tuple[str | None, list[Path]]:
    """`[RECIPE|DIR|REPO_ID] IMAGE…` → the reference, if there is one, and image files; a folder is the images in it.

    What exists as a file is an image, and what has an image's suffix is meant as one; `-` is `STDIN`.

    Raises:
        InputError: an image is missing, or there is none where one is needed.
    """
    reference = None if not arguments or _is_image(arguments[0]) else arguments[0]
    images = [image for argument in arguments[1 if reference else 0 :] for image in _images(argument)]
    if needs_images and not images:
        known = reference is not None and (reference in bundled.recipe_names() or Path(reference).exists())
        unknown = "" if known else f"{reference}: no such image; "
        raise InputError(f"{unknown}give an image: `vlm-export run {reference} photo.jpg`")
    return reference, images


def _is_image(argument: str) -> bool:
    """Whether the first argument is an image or a folder of them, there or not."""
    path = expanded(argument)
    if path.suffix in (".yaml", ".yml"):
        return False
    if path == STDIN or path.is_file():
        return True
    if argument in bundled.recipe_names() or any(_repos(path)):
        return False
    return path.is_dir() or path.suffix.lower() in _IMAGES


def _images(argument: str) -> list[Path]:
    path = expanded(argument)
    if path == STDIN:
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in _IMAGES)
        if not found:
            raise InputError(f"{path}: no images in this folder, and no {CONFIG} and {ONNX}/ of an exported repo")
        return found
    if not path.is_file():
        raise InputError(f"{path}: no such image")
    return [path]


def work_of(recipe: RecipeFile, work: Path | None) -> Work:
    """The work folder of a recipe: the one that a user named, else its own below `build/`."""
    return Work(work or Path("build") / recipe.name)


def _export_commands(recipe: RecipeFile, work: Work) -> str:
    """What a user runs to export a recipe."""
    commands = Commands.of(recipe, work)
    return f"`{commands.merge()}`, then `{commands.onnx()}`"


def _repos(folder: Path) -> list[Path]:
    """The repo that a folder is, or that it holds where it is a work folder."""
    candidates = (folder, Work(folder).repo)
    return [one for one in candidates if (one / CONFIG).is_file() and (one / ONNX).is_dir()]


def _within(folder: Path) -> Path:
    found = _repos(folder)
    if not found:
        raise InputError(f"{folder}: no exported repo: it has no {CONFIG} and {ONNX}/")
    return found[0]
