"""A sweep: which recipes, adapters, layouts and dtypes. One YAML file, checked as a recipe is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from vlm_export.contract import LayoutName
from vlm_export.errors import InputError, shown
from vlm_export.forms.yaml_file import described, read_yaml
from vlm_export.paths import REPO_ID, expanded
from vlm_export.recipe import Reference
from vlm_export.targets import BenchTarget, Target
from vlm_export.wanted import parse

_NAME, _LAYOUT = "{name}", "{layout}"  # in `push.repo_id`, what stands for those of a cell
_STRICT = ConfigDict(extra="forbid")
_MOST_ADAPTERS = 10_000
_NAMES_A_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, config=_STRICT)
class AdapterChoice:
    """Adapters: a `path` alone, or those of an `author` of the Hub.

    `path` is an adapter's folder, a folder of such folders, a pattern of either, or a Hub id, with the `revision` to
    pin. Of an author those whose id has `search` in it are taken, by id, and no more than `most`; each is pinned to the
    commit that it has when the sweep is read.
    """

    path: Reference | None = None
    revision: str | None = None
    author: str | None = None
    search: str | None = None
    most: int = Field(default=100, ge=1, le=_MOST_ADAPTERS, strict=True)


@dataclass(frozen=True, config=_STRICT)
class BenchChoice:
    """How repos are measured, as of `bench`; each stage has its cores for itself meanwhile."""

    runtimes: tuple[BenchTarget, ...] = Field(default=("ort",), min_length=1)
    rounds: int = Field(default=3, ge=1, le=100, strict=True)
    new_tokens: int = Field(default=32, ge=2, le=4096, strict=True)


@dataclass(frozen=True, config=_STRICT)
class PushChoice:
    """Where repos go that pass every check: `repo_id` holds `{name}`, which is the cell's, and may hold `{layout}`."""

    repo_id: str
    private: bool = Field(default=True, strict=True)

    def repo_of(self, cell: str, layout: str) -> str:
        """The id of a cell's repo."""
        return self.repo_id.replace(_NAME, cell).replace(_LAYOUT, layout)


@dataclass(frozen=True, config=_STRICT)
class Sweep:
    """A checked sweep: each of the recipes with each of the adapters, in each of the layouts and in all of the dtypes.

    `recipes` are paths relative to the sweep's file, or names of bundled ones. Without `adapters` each recipe has its
    own; without `layouts` and `dtypes` they are the recipe's. `runtimes` are those of `verify`. Without `bench` nothing
    is measured, without `push` nothing is pushed, without `output` nothing is copied: it is a folder, from the sweep's
    file, or a URL that fsspec writes to.
    """

    name: Annotated[str, Field(max_length=100)]
    recipes: tuple[Reference, ...] = Field(min_length=1, max_length=1000)
    adapters: tuple[AdapterChoice, ...] = ()
    layouts: tuple[LayoutName, ...] = ()
    dtypes: tuple[str, ...] = ()
    runtimes: tuple[Target, ...] = ()
    bench: BenchChoice | None = None
    push: PushChoice | None = None
    output: Reference | None = None


@dataclass(frozen=True)
class SweepFile:
    """A sweep and the file that it was read from, which its relative paths start at."""

    sweep: Sweep
    path: Path

    @property
    def output(self) -> str | None:
        """Where finished repos are copied: a URL, or an absolute path."""
        output = self.sweep.output
        if output is None or "://" in output:
            return output
        return str(self.path.parent.absolute() / expanded(output))


_SECTIONS = {"adapters": AdapterChoice, "bench": BenchChoice, "push": PushChoice}


def load_sweep(path: Path) -> SweepFile:
    """Read and check one YAML file.

    Raises:
        InputError: the file is missing, is not YAML, or a key is unknown, missing, there twice or of the wrong kind.
    """
    values = read_yaml(path, "no such sweep file; docs/sweeps.md has one to begin with")
    if not isinstance(values, dict):
        raise InputError(f"{path}: a sweep is a mapping with at least `name` and `recipes`")
    try:
        sweep = TypeAdapter(Sweep).validate_python(_written_out(values))
    except ValidationError as error:
        raise InputError(f"{path}: {described(error, Sweep, _SECTIONS)}") from error
    if not _NAMES_A_FOLDER.fullmatch(sweep.name):
        raise InputError(f"{path}: name: {shown(sweep.name)} names a folder: use letters, digits, '.', '_' and '-'")
    if sweep.dtypes:
        parse(sweep.dtypes, f"{path}: dtypes")
    for index, choice in enumerate(sweep.adapters):
        _check_adapters(choice, f"{path}: adapters.{index}")
    if sweep.push is not None:
        _check_push(sweep.push, len(set(sweep.layouts)), f"{path}: push.repo_id")
    if sweep.output is not None:
        _check_output(sweep.output, f"{path}: output")
    return SweepFile(sweep, path)


def _written_out(values: dict[str, Any]) -> dict[str, Any]:
    """The values, an adapter that is a path alone as a mapping."""
    adapters = values.get("adapters")
    if not isinstance(adapters, list):
        return values
    return values | {"adapters": [{"path": each} if isinstance(each, str) else each for each in adapters]}


def _check_adapters(choice: AdapterChoice, where: str) -> None:
    """Raises InputError for a choice that is neither a path nor an author's, or that is both."""
    if (choice.path is None) == (choice.author is None):
        raise InputError(f"{where}: write either a path or an author of the Hub")
    if choice.author is None and choice.search is not None:
        raise InputError(f"{where}.search: goes with author; a path may hold a pattern instead")
    if choice.author is not None and choice.revision is not None:
        raise InputError(f"{where}.revision: goes with a path; an author's adapters are pinned as they are found")


def _check_push(push: PushChoice, layouts: int, where: str) -> None:
    """Raises InputError for an id that is none, or that is one for several repos."""
    needed = (_NAME, _LAYOUT) if layouts > 1 else (_NAME,)
    if any(each not in push.repo_id for each in needed) or not REPO_ID.fullmatch(push.repo_of("name", "layout")):
        raise InputError(f"{where}: {shown(push.repo_id)}: write it like org/{'-'.join(needed)}-onnx")


def _check_output(output: str, where: str) -> None:
    """Raises InputError for a URL that holds a password, or that is of the Hub, where `push` is meant."""
    parts = urlsplit(output)
    if parts.password is not None:
        raise InputError(f"{where}: holds a password: keep it in the environment, or in fsspec's settings")
    if parts.scheme == "hf":
        raise InputError(f"{where}: the Hub has repos, not folders of them: write push: in its place")
