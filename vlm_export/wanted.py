"""Which dtypes each component is to be written in, as `--quantize` and a recipe's `dtypes` say it.

q8                              every component in q8
all                             every component in every dtype
decoder=q4,vision=fp16          one file of a component; a client takes these by itself, on every device
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vlm_export.dtypes import DTYPES, FP32, REFUSED
from vlm_export.errors import InputError, shown

ALL, AUTO = "all", "auto"
PLANNED = "q4"  # the dtype whose file a decoder of `auto` is
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
MIXED = "mixed"  # how a report calls a repo that is run with another dtype for each component
# What users call a component, by layout its file's name.
_SHORT = {
    "decoder": ("decoder_model_merged", "language_model"),
    "vision": ("vision_encoder", "encoder_model"),
    "encoder": ("encoder_model", "vision_encoder"),
    "embed": ("embed_tokens",),
}


@dataclass(frozen=True)
class Goal:
    """What `auto` is to reach: a decoder of at most so many bytes, or a divergence of at most so many nats a token."""

    bytes: int | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Wanted:
    """The dtypes of a repo.

    Attributes:
        where: the option or the key of the recipe that said so, for errors.
        everywhere: those of every component; float32 is the first.
        of_one: by component, as the user called it, the dtype that a client takes of it.
        goal: of `auto`, if that is among them.
    """

    where: str
    everywhere: tuple[str, ...] = (FP32.name,)
    of_one: Mapping[str, str] = field(default_factory=dict)
    goal: Goal | None = None

    def of(self, component: str, mixed: Mapping[str, str]) -> list[str]:
        """The dtypes to write a component in; `mixed` is what the method of that name returned."""
        return list(dict.fromkeys([*self.everywhere, *([mixed[component]] if component in mixed else [])]))

    def mixed(self, components: Sequence[str]) -> dict[str, str]:
        """By component, the dtype that a client takes, or nothing if none was named for a component.

        A component that was not named is taken in the last dtype that every component has.

        Raises:
            InputError: a component is none of these.
        """
        named = {_component(name, components, self.where): dtype for name, dtype in self.of_one.items()}
        return {name: named.get(name, self.everywhere[-1]) for name in components} if named else {}


def parse(values: Iterable[str], where: str, goal: Goal | None = None) -> Wanted:
    """What was asked for; `where` is the option or the key of the recipe, for errors.

    Raises:
        InputError: a dtype that there is none of, a component that is named twice, or `auto` without a goal.
    """
    everywhere, of_one = [FP32.name], dict[str, str]()
    items = list(_items(values))
    if (AUTO in items) != (goal is not None):
        raise InputError(f"{where}: {AUTO} goes with --budget or --max-kl; give both or neither")
    if AUTO in items and PLANNED in items:
        raise InputError(f"{where}: {AUTO} and {PLANNED} have one file name; keep one of them")
    for item in items:
        component, equals, dtype = item.rpartition("=")
        if not equals:
            everywhere += DTYPES if dtype == ALL else [PLANNED if dtype == AUTO else _checked(dtype, where)]
        elif component in of_one:
            raise InputError(f"{where}: {component}: named twice; keep one of {of_one[component]} and {dtype}")
        else:
            of_one[component] = _checked(dtype, where)
    return Wanted(where, tuple(dict.fromkeys(everywhere)), of_one, goal)


def parse_size(text: str, where: str) -> int:
    """Bytes of `115MB`, `0.1 GB` or `110MiB`.

    Raises:
        InputError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*([KMG]I?B)\s*", text.upper())
    if found is None or not float(found[1]):
        raise InputError(f"{where}: {shown(text)} is no size: write it like 115MB")
    return int(float(found[1]) * _UNITS[found[2]])


def _items(values: Iterable[str]) -> Iterator[str]:
    for value in values:
        yield from (item.strip() for item in value.split(","))


def _checked(dtype: str, where: str) -> str:
    if dtype in REFUSED:
        raise InputError(f"{where}: {dtype}: {REFUSED[dtype]}")
    if dtype not in DTYPES:
        close = difflib.get_close_matches(dtype, DTYPES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there is {', '.join(DTYPES)}, or {ALL}"
        raise InputError(f"{where}: no dtype {dtype!r}: {hint}")
    return dtype


def _component(name: str, components: Sequence[str], where: str) -> str:
    found = next((known for known in (name, *_SHORT.get(name, ())) if known in components), None)
    if found is None:
        raise InputError(f"{where}: no component {name!r}; there is {', '.join(components)}")
    return found
