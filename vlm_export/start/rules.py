"""How many tokens a recipe asks for, and what becomes of the checkpoint's other rules of generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_export.contract import HEEDED, MAX_NEW_TOKENS, OF_SAMPLING, LayoutName
from vlm_export.start.named import CONFIG, GENERATION, Named

_LONGEST = 512  # tokens of an answer; a larger `max_length` is the model's memory, prompt included
_LIBRARYS_LENGTH = 20  # transformers writes it where nobody set one
_CHAT_TOKENS = 128
_SHOWN = ("num_beams", "do_sample", "length_penalty", "early_stopping", "num_return_sequences")


@dataclass(frozen=True)
class Rules:
    """Rules of generation.

    Attributes:
        max_new_tokens: what the recipe asks for, and `because` where the number is from.
        taken_over: the checkpoint's rules that the published repo has without being asked.
        left_out: those that a greedy client has no use for.
    """

    max_new_tokens: int
    because: str
    taken_over: Mapping[str, Any]
    left_out: Mapping[str, Any]


def read_rules(sources: Sequence[Named], layout: LayoutName) -> Rules:
    """The rules of the first source that has a `generation_config.json`, else those in the last one's `config.json`."""
    source = next((each for each in sources if each.json(GENERATION)), None)
    file = GENERATION if source else CONFIG
    values = (source or sources[-1]).json(file)
    tokens, because = _tokens(values, file, layout)
    sampled = values.get("do_sample") is True
    left_out = {name: values[name] for name in (*_SHOWN, *sorted(OF_SAMPLING)) if _counts(values.get(name))}
    return Rules(
        tokens,
        because,
        {name: values[name] for name, idle in HEEDED.items() if values.get(name) not in (None, idle, [])},
        {name: value for name, value in left_out.items() if sampled or name not in OF_SAMPLING},
    )


def _tokens(values: Mapping[str, Any], file: str, layout: LayoutName) -> tuple[int, str]:
    for name in ("max_new_tokens", *(["max_length"] if layout != "chat" else [])):
        found = values.get(name)
        if isinstance(found, int) and 0 < found <= _LONGEST and (name, found) != ("max_length", _LIBRARYS_LENGTH):
            return found, f"{name} of {file}"
    return (_CHAT_TOKENS if layout == "chat" else MAX_NEW_TOKENS), f"{file} names no number"


def _counts(value: Any) -> bool:
    """Whether a rule is set, and to another value than the one that all have."""
    return value not in (None, False, 1, 1.0, [])
