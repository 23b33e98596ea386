"""Which dtypes each component is to be written in, as `--quantize` and a recipe's `dtypes` say it.

q8                              every component in q8
all                             every component in every dtype
decoder=q4,vision=fp16          one file of a component; a client takes these by itself, on every device
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vlm_export.dtypes import DTYPES, FP32, REFUSED
from vlm_export.errors import InputError

ALL = "all"
MIXED = "mixed"  # how a report calls a repo that is run with another dtype for each component
# What users call a component, by layout its file's name.
_SHORT = {
    "decoder": ("decoder_model_merged", "language_model"),
    "vision": ("vision_encoder", "encoder_model"),
    "encoder": ("encoder_model", "vision_encoder"),
    "embed": ("embed_tokens",),
}


@dataclass(frozen=True)
class Wanted:
    """The dtypes of a repo.

    Attributes:
        where: the option or the key of the recipe that said so, for errors.
        everywhere: those of every component; float32 is the first.
        of_one: by component, as the user called it, the dtype that a client takes of it.
    """

    where: str
    everywhere: tuple[str, ...] = (FP32.name,)
    of_one: Mapping[str, str] = field(default_factory=dict)

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


def parse(values: Iterable[str], where: str) -> Wanted:
    """What was asked for; `where` is the option or the key of the recipe, for errors.

    Raises:
        InputError: a dtype that there is none of, or a component that is named twice.
    """
    everywhere, of_one = [FP32.name], dict[str, str]()
    for item in _items(values):
        component, equals, dtype = item.rpartition("=")
        if not equals:
            everywhere += DTYPES if dtype == ALL else [_checked(dtype, where)]
        elif component in of_one:
            raise InputError(f"{where}: {component}: named twice; keep one of {of_one[component]} and {dtype}")
        else:
            of_one[component] = _checked(dtype, where)
    return Wanted(where, tuple(dict.fromkeys(everywhere)), of_one)


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
