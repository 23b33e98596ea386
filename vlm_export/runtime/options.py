"""How to generate: what the user asks for, over what the repo says, over transformers' defaults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vlm_export.errors import InputError

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class Options:
    """What a caller asks for; None is what `generation_config.json` says, else transformers' default.

    `stop` are texts that end an answer, and are no part of it. `seed` makes sampling repeatable here; the tokens are
    not those that torch draws with that seed.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    num_beams: int | None = None
    num_return_sequences: int | None = None
    length_penalty: float | None = None
    early_stopping: EarlyStopping | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """How one prompt is generated: every field of `Options` decided, and the rules that only a file can give.

    `plan` makes it: a caller's value wins over `generation_config.json`'s, and that over transformers' default, which
    is the one here (transformers 5.23, `_get_default_generation_params` in `generation/configuration_utils.py`).
    """

    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    max_new_tokens: int = 20
    min_new_tokens: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()


MOST_ROWS = 4096  # of one prompt: beams, or samples
# Scores are float32: what multiplies or divides them must leave them numbers. transformers is as silent about the rest
# as numpy is: of a temperature of 1e-320, the probabilities are NaN.
_LEAST, _MOST = 1e-20, 1e20
_SEEDS = 2**63  # torch takes no larger ones

# What else in a generation_config.json changes tokens, and the value with which it does not.
_UNSUPPORTED_SETTINGS: dict[str, Any] = {
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "renormalize_logits": False,
    "num_beam_groups": 1,
    "penalty_alpha": None,
}


def unknown_settings(config: Mapping[str, Any]) -> list[str]:
    """Keys of a `generation_config.json` that would change the tokens in transformers, and do not here."""
    return [key for key, idle in _UNSUPPORTED_SETTINGS.items() if config.get(key) not in (None, idle, [])]


def searches(generation: Mapping[str, Any]) -> bool:
    """Whether a graph under this `generation_config.json` searches with beams."""
    return int(generation.get("num_beams") or 1) > 1


def plan(options: Options, config: Mapping[str, Any], prompt_tokens: int, *, room: int | None = None) -> Plan:
    """Make the plan for a prompt of `prompt_tokens` ids, start token included, under a `generation_config.json`.

    `room` is how many new tokens the model has positions for, where that is known: nobody may ask for more.

    Raises:
        InputError: a value is out of its range, or two do not go together.
    """
    if room is not None and options.max_new_tokens is not None and options.max_new_tokens > room:
        raise InputError(
            f"max_new_tokens: {options.max_new_tokens}, but after the prompt the model has positions for {max(0, room)}"
        )
    eos_ids = _ids(config.get("eos_token_id"))
    pad = config.get("pad_token_id")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Options):
        asked = getattr(options, field.name)
        stored = None if field.name in ("seed", "stop") else config.get(field.name)
        if asked is not None or stored is not None:
            values[field.name] = stored if asked is None else asked
    if "max_new_tokens" not in values and config.get("max_length") is not None:
        values["max_new_tokens"] = config["max_length"] - prompt_tokens
    values |= _rules(config, prompt_tokens)
    if config.get("min_length"):
        longest = values.get("max_new_tokens", Plan.max_new_tokens)
        values["min_new_tokens"] = max(
            values.get("min_new_tokens", 0), min(config["min_length"] - prompt_tokens, longest)
        )
    made = Plan(eos_ids, pad if pad is not None else eos_ids[0] if eos_ids else 0, **values)
    for problem in _problems(made):
        key = problem.partition(":")[0]
        stored = getattr(options, key, None) is None and config.get(key) is not None
        raise InputError(f"generation_config.json: {problem}" if stored else problem)
    return made


def _rules(config: Mapping[str, Any], prompt_tokens: int) -> dict[str, Any]:
    """The tokens that a `generation_config.json` bans or forces, as fields of a plan.

    It forces the first new token only where the prompt is nothing but a start token.
    """
    return {
        "bad_words_ids": tuple(map(tuple, config.get("bad_words_ids") or ())),
        "suppress_tokens": _ids(config.get("suppress_tokens")),
        "begin_suppress_tokens": _ids(config.get("begin_suppress_tokens")),
        "forced_bos_token_id": config.get("forced_bos_token_id") if prompt_tokens == 1 else None,
        "forced_eos_token_ids": _ids(config.get("forced_eos_token_id")),
    }


def _ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _problems(plan: Plan) -> list[str]:
    found = []
    for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0), ("num_beams", 1), ("num_return_sequences", 1)):
        if getattr(plan, name) < least:
            found.append(f"{name}: {getattr(plan, name)}, but it must be at least {least}")
    for name in ("num_beams", "num_return_sequences"):  # each is a row of the cache
        if getattr(plan, name) > MOST_ROWS:
            found.append(f"{name}: {getattr(plan, name)}, but it must be at most {MOST_ROWS}")
    if plan.min_new_tokens > plan.max_new_tokens:
        found.append(f"min_new_tokens: {plan.min_new_tokens} is more than max_new_tokens, {plan.max_new_tokens}")
    for name, idle in (("temperature", "without sampling it is not used"), ("repetition_penalty", "1 is none")):
        if not _LEAST <= getattr(plan, name) <= _MOST:
            found.append(f"{name}: {getattr(plan, name)}, but it must be from {_LEAST:g} to {_MOST:g}; {idle}")
    if plan.top_k < 0:
        found.append(f"top_k: {plan.top_k}, but it must be at least 0, which is all")
    if not 0 < plan.top_p <= 1:
        found.append(f"top_p: {plan.top_p}, but it must be above 0 and up to 1")
    if plan.no_repeat_ngram_size < 0:
        found.append(f"no_repeat_ngram_size: {plan.no_repeat_ngram_size}, but it must be at least 0, which is none")
    if plan.num_beams > 1 and not _LEAST <= _largest_divisor(plan) <= _MOST:
        found.append(
            f"length_penalty: {plan.length_penalty}, but {plan.max_new_tokens} to the power of it (max_new_tokens) "
            f"must be from {_LEAST:g} to {_MOST:g}"
        )
    if plan.seed is not None and not 0 <= plan.seed < _SEEDS:
        found.append(f"seed: {plan.seed}, but it must be at least 0 and below 2**63")
    if plan.early_stopping not in (True, False, "never"):
        found.append(f"early_stopping: {plan.early_stopping!r}, but it must be true, false or 'never'")
    if plan.num_return_sequences > plan.num_beams and not plan.do_sample:
        found.append(
            f"num_return_sequences: {plan.num_return_sequences} without sampling needs as many num_beams, not "
            f"{plan.num_beams}"
        )
    if plan.num_beams > 1 and plan.num_return_sequences > plan.num_beams:
        found.append(f"num_return_sequences: {plan.num_return_sequences} is more than num_beams, {plan.num_beams}")
    return found


def _largest_divisor(plan: Plan) -> float:
    """What the score of a beam of full length is divided by."""
    try:
        return float(plan.max_new_tokens) ** plan.length_penalty
    except OverflowError:
        return math.inf
