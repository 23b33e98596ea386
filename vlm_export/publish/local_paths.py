"""No path of this machine is published: those of the recipe become names, and config files forget where they lay."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml
from pydantic import TypeAdapter

from vlm_export.files import read_json, write_json
from vlm_export.paths import home
from vlm_export.recipe import OF_MODEL, Recipe, RecipeFile

_CACHED = re.compile(r"models--(.+?)--(.+)")  # a repo's folder in the Hub's cache
_PATH = re.compile(r"[/~\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]")  # how a path begins that is no name in the folder
_NAMES_A_PLACE = re.compile(r"(name_or_path|_file|_path|_dir|_folder)$")
# Whose words may be anything; they are copied from the checkpoint as they are.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines as a reader would."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def published_recipe(recipe: RecipeFile) -> str:
    """The recipe as it is published: its keys, without comments, and a name in place of each path.

    A folder in the Hub's cache becomes the id of its repo, another folder or file its own name.
    """
    values = TypeAdapter(Recipe).dump_python(recipe.recipe, mode="json", exclude_defaults=True)
    for key in ("model", "tokenizer", "processor"):
        if values.get(key, OF_MODEL) != OF_MODEL or key == "model":
            values[key] = _name(recipe, values[key])
    for adapter in values.get("adapters", ()):
        adapter["path"] = _name(recipe, adapter["path"])
    if patterns := values.get("golden", {}).get("images"):
        values["golden"]["images"] = [_pattern(pattern) for pattern in patterns]
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _name(recipe: RecipeFile, reference: str) -> str:
    found = recipe.local(reference)
    if found is None:
        return PurePath(reference).name if _PATH.match(reference) else reference
    cached = next(filter(None, (_CACHED.fullmatch(part) for part in found.parts)), None)
    return f"{cached[1]}/{cached[2]}" if cached else found.name


def _pattern(pattern: str) -> str:
    """A pattern below the recipe's folder as it is, of another only its last part."""
    elsewhere = _PATH.match(pattern) or ".." in PurePath(pattern).parts
    return PurePath(pattern).name if elsewhere else pattern


def forget_folders(repo: Path) -> None:
    """Take out of a repo's config files the folders that their model and tokenizer were loaded from.

    Raises:
        InputError: a config file cannot be read.
    """
    for path in sorted(repo.glob("*.json")):
        if path.name in _VOCABULARIES:
            continue
        values = read_json(path)
        if (without := _without_places(values)) != values:
            write_json(path, without)


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(each) for key, each in value.items() if not _is_place(key, each)}
    return [_without_places(each) for each in value] if isinstance(value, list) else value


def _is_place(key: str, value: Any) -> bool:
    return isinstance(value, str) and bool(_NAMES_A_PLACE.search(key)) and bool(_PATH.match(value))


def leaks(repo: Path, recipe: RecipeFile, work: Path) -> Iterator[tuple[str, str]]:
    """The files of a repo that name a folder of this machine, each with that: the recipe's, `work`, home, temporary.

    Graphs are left out, which hold nothing but names of tensors, and vocabularies.
    """
    places = _places([work, recipe.path.parent, Path(tempfile.gettempdir()), *filter(None, [home()])])
    for path in sorted(repo.rglob("*")):
        if path.suffix in (".json", ".yaml", ".md", ".jinja", ".svg", ".txt") and path.name not in _VOCABULARIES:
            text = path.read_text(encoding="utf-8", errors="replace")
            if found := places.search(text):
                yield path.relative_to(repo).as_posix(), found[0]


def _places(folders: Sequence[Path]) -> re.Pattern[str]:
    names = {str(each) for folder in folders for each in (folder.absolute(), folder.resolve()) if len(each.parts) > 1}
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(rf"(?<![\w.~-])(?:{'|'.join(map(re.escape, longest_first))})(?=[/\\]|$)", re.MULTILINE)
