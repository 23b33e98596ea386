"""How many tokens a recipe asks for, and what becomes of the checkpoint's other rules of generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_export.contract import HEEDED, MAX_NEW_TOKENS, OF_SAMPLING, LayoutName
from vlm_export.runtime.repo import ASKED
from vlm_export.start.named import CONFIG, GENERATION, Named

_LONGEST = 512  # tokens of an answer; a larger `max_length` is the model's memory, prompt included
_LIBRARYS_LENGTH = 20  # transformers writes it where nobody set one
_CHAT_TOKENS = 128
_TEXT_CONFIGS = ("text_config", "decoder")
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
    """The rules of the first source that has a `generation_config.json`, else those in the last one's `config.json`.

    The last source is the model; more than half of the positions that its decoder has are not asked for.
    """
    source = next((each for each in sources if each.json(GENERATION)), None)
    file = GENERATION if source else CONFIG
    values = (source or sources[-1]).json(file)
    tokens, because = _tokens(values, file, layout)
    positions = _positions(sources[-1].config)
    if positions is not None and tokens > positions // 2:
        tokens, because = positions // 2, f"half of the decoder's {positions} positions"
    sampled = values.get("do_sample") is True
    left_out = {name: values[name] for name in (*_SHOWN, *sorted(OF_SAMPLING)) if _counts(values.get(name))}
    return Rules(
        tokens,
        because,
        {name: values[name] for name, idle in HEEDED.items() if values.get(name) not in (None, idle, [])},
        {name: value for name, value in left_out.items() if sampled or name not in OF_SAMPLING},
    )


def _tokens(values: Mapping[str, Any], file: str, layout: LayoutName) -> tuple[int, str]:
    for name in ("max_new_tokens", *(["max_length"] if layout not in ASKED else [])):
        found = values.get(name)
        if isinstance(found, int) and 0 < found <= _LONGEST and (name, found) != ("max_length", _LIBRARYS_LENGTH):
            return found, f"{name} of {file}"
    return (_CHAT_TOKENS if layout in ASKED else MAX_NEW_TOKENS), f"{file} names no number"


def _positions(config: Mapping[str, Any]) -> int | None:
    """How many positions a decoder has, if its config says so."""
    text: Mapping[str, Any] = next((config[key] for key in _TEXT_CONFIGS if isinstance(config.get(key), Mapping)), {})
    found = (text.get(name) for name in ("max_position_embeddings", "n_positions"))
    return next((value for value in found if isinstance(value, int)), None)


def _counts(value: Any) -> bool:
    """Whether a rule is set, and to another value than the one that all have."""
    return value not in (None, False, 1, 1.0, [])
