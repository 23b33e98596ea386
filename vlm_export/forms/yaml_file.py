"""A file that a user writes in YAML, such as a recipe: read, and told what is wrong with it in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vlm_export.errors import InputError, blamed_on
from vlm_export.files import text_of
from vlm_export.forms.conversation import TAGS

_SHOWN = 5  # of what is wrong with a file
_LARGEST_BYTES = 1_000_000
_MERGE = "tag:yaml.org,2002:merge"
_MOST_VALUES = 10_000  # of a file, with each alias as often as it stands for something


def read_yaml(path: Path, missing: str) -> Any:
    """What a file holds, as YAML's safe types.

    Args:
        path: the file.
        missing: what is said where there is none.

    Raises:
        InputError: it is missing or no YAML, a mapping has a key twice, of which YAML keeps the last, or aliases stand
            for far too much.
    """
    try:
        text = text_of(path, _LARGEST_BYTES)
    except FileNotFoundError:
        raise InputError(f"{path}: {missing}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    with blamed_on(f"{path}: not valid YAML"):  # what `!!bool x` or a date like 2024-99-99 raises is anything
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        repeated = list(islice(_repeated_keys(loader, node), _SHOWN))
        if repeated:
            raise InputError(f"{path}: {'; '.join(repeated)}")
        if node is None:
            return None
        _check_aliases(node, str(path))
        return loader.construct_document(node)


def _check_aliases(root: yaml.Node, path: str) -> None:
    """Raises InputError where an alias stands for what holds it, or aliases of aliases for far too much."""
    values: dict[int, int] = {}
    above: set[int] = set()

    def count(node: yaml.Node, key: str) -> int:
        if id(node) in above:
            raise InputError(f"{path}: {key}: an alias of itself: write it out")
        if id(node) not in values:
            above.add(id(node))
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            inner = [value for _, value in pairs] if pairs else node.value if isinstance(node.value, list) else []
            names = [str(name.value) for name, _ in pairs] if pairs else map(str, range(len(inner)))
            found = (count(each, f"{key}.{name}".strip(".")) for each, name in zip(inner, names, strict=True))
            values[id(node)] = 1 + sum(found)
            above.discard(id(node))
        if values[id(node)] > _MOST_VALUES:
            raise InputError(f"{path}: {key}: stands for more than {_MOST_VALUES:,} values: leave aliases out")
        return values[id(node)]

    count(root, "")


def _repeated_keys(loader: yaml.SafeLoader, root: yaml.Node | None) -> Iterator[str]:
    """What is wrong with the keys of a document, mappings that are merged into others with `<<` included.

    A key of a mapping that is also in one that it merges is no repetition: that is how YAML overrides.
    """
    waiting, seen = [("", root)], set()
    while waiting:
        place, node = waiting.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(f"{place}{index}.", item) for index, item in reversed(list(enumerate(node.value)))]
        if isinstance(node, yaml.MappingNode):
            lines: dict[Any, int] = {}
            for key, _ in node.value:
                name, line = _key(loader, key), key.start_mark.line + 1
                if name in lines:
                    where = f"line {line}" if lines[name] == line else f"lines {lines[name]} and {line}"
                    yield f"{place}{key.value}: is there twice, in {where}: keep one of them"
                lines[name] = line
            waiting += [(f"{place}{key.value}.", value) for key, value in reversed(node.value)]


def _key(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    """The value of a key, for comparing it with others; a node that is no scalar stands for itself."""
    if node.tag == _MERGE:
        return _MERGE
    return loader.construct_object(node) if isinstance(node, yaml.ScalarNode) else node


def described(error: ValidationError, kind: type, sections: Mapping[str, type]) -> str:
    """Everything that is wrong with a file, in one line.

    Args:
        error: what pydantic says of it.
        kind: the dataclass that the file holds.
        sections: by key of it, the dataclass that is below, alone or in a list.
    """
    messages = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"] if part not in TAGS)
        if problem["type"] == "unexpected_keyword_argument":
            messages.append(f"{key}: unknown key{_hint(problem['loc'], kind, sections)}")
        else:
            said = problem["msg"].removeprefix("Value error, ")
            messages.append(f"{key}: {said[0].lower()}{said[1:]}")
    return " ".join("; ".join(messages).split())


def _hint(location: tuple[int | str, ...], kind: type, sections: Mapping[str, type]) -> str:
    key = str(location[-1])
    section = sections[str(location[0])] if len(location) > 1 else kind
    close = difflib.get_close_matches(key, _fields(section), n=1)
    elsewhere = [name for name, other in sections.items() if key in _fields(other)]
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (it belongs under {elsewhere[0]!r})" if elsewhere else ""


def _fields(kind: type) -> list[str]:
    return list(kind.__dataclass_fields__)  # type: ignore[attr-defined]
