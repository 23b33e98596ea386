"""Write what transformers.js loads, as `vlm_export/contract.py` has it, where our JavaScript reads it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm_export import contract

PACKAGE = Path(contract.__file__).parent
_LINE = 80  # of a list that stands in one line
FILE = PACKAGE / "js" / "src" / "contract.js"
HEAD = (
    "/** What transformers.js 4.3.1 loads, and how. Written by scripts/contract.py: change vlm_export/contract.py. */\n"
)


def text() -> str:
    """The module, formatted as all of our JavaScript is."""
    constants = {
        "MODEL_TYPES": contract.MODEL_TYPES,
        "IMAGE_PROCESSORS": {
            name: {"cut": kind.cut, "text_first": kind.text_first} for name, kind in contract.IMAGE_PROCESSORS.items()
        },
        "GRID_TYPES": list(contract.GRID_TYPES),
        "NUMBERED_FROM_ONE": list(contract.NUMBERED_FROM_ONE),
        "PROCESSORS": {name: asdict(written) for name, written in contract.PROCESSORS.items()},
        "PREFIX": contract.PREFIX,
        "SUFFIXES": contract.SUFFIXES,
        "SINGLE_OPTIONS": list(contract.SINGLE_OPTIONS),
        "SEARCH_OPTIONS": list(contract.SEARCH_OPTIONS),
        "SAMPLING_OPTIONS": list(contract.SAMPLING_OPTIONS),
        "EARLY_STOPPING": list(contract.EARLY_STOPPING),
    }
    return "\n".join([HEAD, *(f"export const {name} = {literal(value)};" for name, value in constants.items()), ""])


def literal(value: Any, indent: str = "") -> str:
    """A value in JavaScript: objects of objects and of strings a line an entry, others in one line, short ones."""
    if isinstance(value, str):
        return "'" + value.replace("\n", "\\n") + "'"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        parts = [literal(part) for part in value]
        line = ", ".join(parts)
        return f"Object.freeze([{line}])" if len(line) < _LINE else _in_lines(parts)
    entries = [f"{_key(name)}: {literal(part, indent + '    ')}" for name, part in value.items()]
    if indent:
        return f"{{ {', '.join(entries)} }}"
    return "Object.freeze({\n" + "".join(f"    {entry},\n" for entry in entries) + "})"


def _in_lines(parts: list[str]) -> str:
    return "Object.freeze([\n" + "".join(f"    {part},\n" for part in parts) + "])"


def _key(name: str) -> str:
    return name if name.isidentifier() else f"'{name}'"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
