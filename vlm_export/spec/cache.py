"""Names of what a decoder keeps from one run to the next: a part for each layer, of the kind that the layer keeps.

An attention layer keeps keys and values, `past_key_values.{layer}.key` and `.value`, which have an axis of positions.
Other layers keep a state of one size after any number of tokens, `past_conv.{layer}`: zeros before the first. What a
run gives is called `present.{layer}.key` and `present_conv.{layer}`. Source: transformers.js 4.3.1, `getCacheNames` in
`src/configs.js` and `getPastKeyValues` in `src/models/modeling_utils.js`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PAST, PRESENT = "past_key_values", "present"
_ENTRY = re.compile(r"(?P<stem>past_[a-z_]+|present(?:_[a-z_]+)?)\.(?P<layer>\d+)(?P<part>\..+)?")


def is_past(name: str) -> bool:
    """Whether an input is a part of the cache."""
    return name.startswith("past_") and _ENTRY.fullmatch(name) is not None


def is_present(name: str) -> bool:
    """Whether an output is a part of the cache."""
    return name.startswith(PRESENT) and _ENTRY.fullmatch(name) is not None


def has_positions(name: str) -> bool:
    """Whether a part of the cache, before or after a run, has an axis of positions."""
    return name.startswith((f"{PAST}.", f"{PRESENT}."))


def present_of(past: str) -> str:
    """The name of a part after a run: `present_conv.0` of `past_conv.0`."""
    return _renamed(past, PAST, PRESENT, "past_", "present_")


def past_of(present: str) -> str:
    """The name under which a part goes into the next run."""
    return _renamed(present, PRESENT, PAST, "present_", "past_")


def golden_of(past: str) -> str:
    """The name among goldens: `cache.0.key` of `past_key_values.0.key`, `cache_conv.0` of `past_conv.0`."""
    return _renamed(past, PAST, "cache", "past_", "cache_")


def _renamed(name: str, of_attention: str, wanted: str, of_others: str, wanted_of_others: str) -> str:
    if name.startswith(f"{of_attention}."):
        return wanted + name.removeprefix(of_attention)
    return wanted_of_others + name.removeprefix(of_others)


def layer_of(name: str) -> int | None:
    """The layer that a part of the cache is of, before or after a run; None of another input or output."""
    entry = _ENTRY.fullmatch(name)
    return None if entry is None else int(entry["layer"])


def at_layer(name: str, layer: int) -> str:
    """The same part of another layer's cache."""
    entry = _ENTRY.fullmatch(name)
    assert entry is not None, name
    return f"{entry['stem']}.{layer}{entry['part'] or ''}"


def first_with_positions(names: Iterable[str]) -> str | None:
    """The first part whose axis of positions says how long the past is, if any; not of cross-attention."""
    return next((name for name in names if has_positions(name) and ".encoder." not in name), None)
