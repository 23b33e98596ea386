"""What one command writes and another reads: JSON with a `schema`, which is checked when it is read; model cards."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from vlm_export.errors import InputError, one_line, shown
from vlm_export.files import read_json
from vlm_export.own_files import own_file

Document = TypeVar("Document")
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)


def front_matter(card: str) -> dict[str, Any]:
    """The mapping at the beginning of a model card; empty where there is none, or it is not YAML."""
    found = _FRONT_MATTER.match(card)
    try:
        values = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError):  # ValueError: something like a date, `2024-99-99`
        return {}
    return values if isinstance(values, dict) else {}


def load_document(path: Path, kind: type[Document], again: str) -> Document:
    """Read a document, which may hold NaN and Infinity as Python writes them.

    Args:
        path: its file, in the folder that is not left.
        kind: its dataclass, whose field `schema` has this version's number as its default.
        again: what the user can do to have it written anew.

    Raises:
        InputError: it is missing, is no file of its folder, is no JSON object, has another schema, or lacks something
            that `kind` holds.
    """
    own_file(path.parent, path.name)
    return check_document(read_json(path, all_numbers=True), kind, str(path), again)


def check_document(values: Any, kind: type[Document], path: str, again: str) -> Document:
    """A document of values that were read from a file, `path`.

    Raises:
        InputError: as of `load_document`.
    """
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a {type(values).__name__}, not a mapping: {again}")
    declared: Any = kind
    expected: Any = next(field.default for field in fields(declared) if field.name == "schema")
    found = values.get("schema")
    if isinstance(found, int) and not isinstance(found, bool) and found > expected:
        raise InputError(
            f"{path}: schema {shown(found)} is of a newer vlm-export; this one reads {expected}: update it"
        )
    if found != expected:
        raise InputError(f"{path}: schema {shown(found)} is of an older vlm-export; this one reads {expected}: {again}")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: is damaged: {one_line(key, 80)}: {first['msg'].lower()}: {again}") from error
