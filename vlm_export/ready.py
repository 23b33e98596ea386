"""What a stage needs, looked for before torch is imported: what is missing is told at once."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from vlm_export import bundled
from vlm_export.commands import Commands
from vlm_export.errors import InputError
from vlm_export.files import Work
from vlm_export.manifest import load_manifest
from vlm_export.own_files import own_file
from vlm_export.recipe import OF_MODEL, PHOTOGRAPHS, RecipeFile
from vlm_export.verify.golden import check_recorded


def for_golden(recipe: RecipeFile) -> None:
    """Raises InputError where a model, an adapter or a golden image is not there."""
    for_merge(recipe)
    images(recipe)


def for_merge(recipe: RecipeFile) -> None:
    """Raises InputError where a model or an adapter is named by a path that is not there."""
    of = recipe.recipe
    recipe.found(of.model, "model")
    for index, adapter in enumerate(of.adapters):
        recipe.found(adapter.path, f"adapters.{index}.path")
    for key in ("tokenizer", "processor"):
        named = getattr(of, key)
        if named not in (None, OF_MODEL):
            recipe.found(named, key)


def for_onnx(recipe: RecipeFile, work: Work) -> None:
    """Raises InputError where nothing was merged."""
    if own_file(work.merged, work.merge_report.name) is None:
        raise InputError(f"{work.merged}: nothing merged yet: run `{Commands.of(recipe, work).merge()}`")


def for_verify(recipe: RecipeFile, work: Work) -> None:
    """Raises InputError where nothing was exported, or no golden was recorded."""
    load_manifest(work.repo)
    check_recorded(recipe.golden_dir)


def images(recipe: RecipeFile) -> list[Path]:
    """The recipe's golden images, or those that come with the package.

    Raises:
        InputError: two of one name, or as of `golden_images`.
    """
    patterns = recipe.recipe.golden.images
    base = recipe.path.parent
    if not patterns:
        base, patterns = bundled.GOLDEN / bundled.DEFAULT_RECIPE / "images", ("*.png",)
    own = [pattern for pattern in patterns if pattern != PHOTOGRAPHS]
    photographs = [path for path in bundled.photographs() if path.suffix == ".jpg"] if PHOTOGRAPHS in patterns else []
    try:
        found = [*golden_images(base, own), *photographs]
    except InputError as error:
        raise InputError(f"{recipe.path}: golden.images: {error}") from error
    if len({path.name for path in found}) < len(found):
        raise InputError(f"{recipe.path}: golden.images: two files of one name; rename one")
    return found


def golden_images(base: Path, patterns: Sequence[str]) -> list[Path]:
    """The files that a shell in the folder `base` would make of these patterns, each once, by name.

    `..` may be anywhere in them, `~` in front, and `**` stands for any number of folders; names that begin with a dot
    are found only where the pattern says so.

    Raises:
        InputError: a file is none, or is a link that leads out of the folder in front of the first wildcard.
    """
    found = set()
    for pattern in map(os.path.expanduser, patterns):
        named = list(takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts[:-1]))
        folder = base.joinpath(*named)
        for name in glob.iglob(pattern, root_dir=base, recursive=True):
            path = base / name
            if path.is_symlink() or not path.is_dir():
                own_file(folder, path.relative_to(folder).as_posix())
                found.add(path.resolve())
    return sorted(found)
