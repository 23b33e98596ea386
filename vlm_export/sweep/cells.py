"""The cells of a sweep: a recipe with one adapter in its folder, once for each layout.

FOLDER/NAME/recipe.yaml            what the ordinary commands take, too
FOLDER/NAME/golden/NAME/           what PyTorch says
FOLDER/NAME/LAYOUT/                a work folder: merged/, repo/, report/
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from pydantic import TypeAdapter

from vlm_export import hub
from vlm_export.atomic import write_text
from vlm_export.contract import LayoutName
from vlm_export.errors import InputError, all_of
from vlm_export.files import Work
from vlm_export.paths import expanded, is_no_id, no_such_folder
from vlm_export.recipe import (
    OF_MODEL,
    PHOTOGRAPHS,
    AdapterSource,
    Recipe,
    RecipeFile,
    find_recipe,
    load_recipe,
)
from vlm_export.sweep.sweep_file import AdapterChoice, SweepFile

RECIPE = "recipe.yaml"
_ADAPTER = "adapter_config.json"
_NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Adapted:
    """A recipe with the adapter of a cell.

    Attributes:
        recipe: as it is written to its own folder.
        of: the name of the recipe that the sweep names.
        adapter: as the sweep's user knows it: a path, or an id of the Hub; nothing where the recipe has its own.
        layouts: those that it is exported in.
    """

    recipe: RecipeFile
    of: str
    adapter: str
    layouts: tuple[LayoutName, ...]

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.recipe.name

    def work(self, layout: LayoutName) -> Work:
        """The work folder of a layout."""
        return Work(self.recipe.path.parent / layout)

    def write(self) -> None:
        """Write the recipe, unless that is what is there."""
        text = yaml.safe_dump(
            TypeAdapter(Recipe).dump_python(self.recipe.recipe, mode="json", exclude_defaults=True), sort_keys=False
        )
        path = self.recipe.path
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def adapted(sweep: SweepFile, folder: Path) -> list[Adapted]:
    """Every recipe with every adapter, in the order of the file; nothing is written.

    Raises:
        InputError: there is no such recipe or adapter, two cells would have one name, or a recipe says itself what the
            sweep does.
    """
    recipes = [_recipe(sweep, *reference) for reference in enumerate(sweep.sweep.recipes)]
    adapters = _once([found for choice in enumerate(sweep.sweep.adapters) for found in _adapters(sweep, *choice)])
    names = _short_names([adapter.path for adapter in adapters])
    made = [
        each
        for recipe in recipes
        for each in (
            [
                _adapted(sweep, recipe, adapter, f"{recipe.name}-{name}", folder)
                for adapter, name in zip(adapters, names, strict=True)
            ]
            if adapters
            else [_adapted(sweep, recipe, None, recipe.name, folder)]
        )
    ]
    repeated = [name for name, count in Counter(each.name for each in made).items() if count > 1]
    if repeated:
        raise InputError(f"{sweep.path}: two cells are called {all_of(repeated)}: give recipes names of their own")
    return made


def _recipe(sweep: SweepFile, index: int, reference: str) -> RecipeFile:
    """A recipe that the sweep names.

    Raises:
        InputError: there is none, it is wrong, or it combines adapters where the sweep names others.
    """
    is_file = reference.endswith((".yaml", ".yml"))
    try:
        found = load_recipe(sweep.path.parent / expanded(reference)) if is_file else find_recipe(reference)
    except InputError as error:
        raise InputError(f"{sweep.path}: recipes.{index}: {error}") from error
    if sweep.sweep.adapters and found.recipe.combination is not None:
        raise InputError(f"{found.path}: combination: is of adapters that {sweep.path} replaces: remove it")
    return found


def _adapters(sweep: SweepFile, index: int, choice: AdapterChoice) -> list[AdapterSource]:
    """The adapters that a choice stands for; local ones by absolute paths.

    Raises:
        InputError: there are none.
    """
    where = f"{sweep.path}: adapters.{index}"
    if choice.author is not None:
        found = hub.find_models(choice.author, choice.search, choice.most)
        if not found:
            raise InputError(f"{where}: {choice.author} has no such repo on the Hub")
        return [AdapterSource(repo_id, revision) for repo_id, revision in found]
    assert choice.path is not None
    folders = list(_folders(sweep.path.parent.absolute(), choice.path))
    if folders:
        return [AdapterSource(str(folder)) for folder in folders]
    if is_no_id(choice.path):
        missing = no_such_folder(choice.path, sweep.path.parent)
        there = (sweep.path.parent / expanded(choice.path)).exists() or glob.has_magic(choice.path)
        raise InputError(f"{where}: {f'no {_ADAPTER} in {choice.path}, nor in a folder in it' if there else missing}")
    return [AdapterSource(choice.path, choice.revision)]


def _once(adapters: Sequence[AdapterSource]) -> list[AdapterSource]:
    """Each adapter once, as it was named first; one of two revisions is two, where both are named."""
    taken: list[AdapterSource] = []
    for each in adapters:
        if not any(_are_one(each, one) for one in taken):
            taken.append(each)
    return taken


def _are_one(one: AdapterSource, other: AdapterSource) -> bool:
    revisions = {one.revision, other.revision}
    return one.path == other.path and (len(revisions) == 1 or None in revisions)


def _folders(base: Path, pattern: str) -> Iterator[Path]:
    """The folders of adapters that a path or a pattern means: those themselves, or those in them."""
    named = str(base / expanded(pattern))
    places = sorted(Path(each) for each in glob.glob(named)) if glob.has_magic(pattern) else [Path(named)]
    for place in places:
        if (place / _ADAPTER).is_file():
            yield Path(os.path.normpath(place))
        elif place.is_dir():
            yield from sorted(each for each in place.iterdir() if (each / _ADAPTER).is_file())


def _short_names(paths: Sequence[str]) -> list[str]:
    """Of each path its last parts: as few as tell all of them apart."""
    parts = [Path(path).parts for path in paths]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = [_NO_NAME.sub("-", "-".join(each[-count:])).strip("-.") for each in parts]
        if len(set(names)) == len(names):
            return names
    return [_NO_NAME.sub("-", path).strip("-.") for path in paths]


def _adapted(sweep: SweepFile, recipe: RecipeFile, adapter: AdapterSource | None, name: str, folder: Path) -> Adapted:
    path = folder / name / RECIPE
    of, to = recipe.recipe, sweep.sweep

    def moved(reference: str) -> str:
        """A reference of the recipe's, from the new place."""
        local = recipe.local(reference)
        return reference if local is None else _relative(local, path.parent)

    adapters = of.adapters if adapter is None else (adapter,)
    layouts = tuple(dict.fromkeys(to.layouts or (of.layout,)))
    values = replace(
        of,
        name=name,
        model=moved(of.model),
        adapters=tuple(replace(each, path=moved(each.path)) for each in adapters),
        layout=layouts[0],
        dtypes=to.dtypes or of.dtypes,
        tokenizer=of.tokenizer if of.tokenizer in (None, OF_MODEL) else moved(str(of.tokenizer)),
        processor=of.processor if of.processor in (None, OF_MODEL) else moved(str(of.processor)),
        golden=replace(of.golden, images=tuple(_pattern(each, recipe, path.parent) for each in of.golden.images)),
        hub=replace(of.hub, repo_id=to.push.repo_of(name, layouts[0]) if to.push else None),
    )
    known = "" if adapter is None else _shown(adapter.path, sweep.path.parent)
    return Adapted(RecipeFile(values, path), recipe.name, known, layouts)


def _pattern(pattern: str, recipe: RecipeFile, folder: Path) -> str:
    if pattern == PHOTOGRAPHS or pattern.startswith("~"):
        return pattern
    return _relative((recipe.path.parent / pattern).absolute(), folder)


def _relative(path: Path, folder: Path) -> str:
    """The path as it is written in a folder's file, so that all of it can be moved together."""
    try:
        return os.path.relpath(path, folder.absolute())
    except ValueError:  # on another drive of Windows
        return str(path)


def _shown(path: str, base: Path) -> str:
    """An adapter's path as it is told: from the sweep's folder, if it is below it."""
    found = Path(path)
    return found.relative_to(base.absolute()).as_posix() if found.is_relative_to(base.absolute()) else path
