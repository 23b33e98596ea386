"""Contract §0.8, §5.1, §8, §9.1, §14.9: `generation_config.json` is there and says what greedy search needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm_export.contract import SINGLE_TYPE
from vlm_export.doctor.findings import Finding, error, warning
from vlm_export.doctor.repo_view import GENERATION, RepoView, integer

_IGNORED = {  # key → the value that means nothing, so that nothing is lost
    "top_p": 1.0,
    "typical_p": 1.0,
    "min_p": None,
    "length_penalty": 1.0,
    "early_stopping": False,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "penalty_alpha": None,
    "stop_strings": None,
    "exponential_decay_length_penalty": None,
}

_POSITIONS = ("max_position_embeddings", "n_positions")


def check(repo: RepoView) -> Iterator[Finding]:
    """Find a file that is missing, texts that do not end or begin, and settings that transformers.js ignores."""
    if repo.client is None or GENERATION in repo.damaged:
        return
    if not repo.has(GENERATION):
        fix = "write it with max_new_tokens, eos_token_id and pad_token_id"
        yield error(GENERATION, "is missing: a repo in a folder fails without it", fix)
    settings = repo.generation
    if not _ids(settings.get("eos_token_id")):
        problem = f"eos_token_id is {settings.get('eos_token_id')!r}: no text ends before its limit"
        yield error(GENERATION, problem, "write the ids that end a text as eos_token_id")
    if repo.model_type == "vision-encoder-decoder":
        start = settings.get("decoder_start_token_id", settings.get("bos_token_id"))
        if integer(start) is None:
            yield error(GENERATION, "has no decoder_start_token_id: no text begins", "write the id that begins a text")
    new_tokens = integer(settings.get("max_new_tokens"))
    positions = next((n for key in _POSITIONS if (n := integer(repo.text_config.get(key))) is not None), None)
    if new_tokens is not None and positions is not None and new_tokens > positions > 0:
        problem = f"max_new_tokens is {new_tokens}, and the model has {positions} positions, which nobody checks"
        yield warning(GENERATION, problem, "write a number that prompt and image leave room for")
    if new_tokens is None and integer(repo.document(GENERATION).get("max_length")) is None:
        problem = "has no max_new_tokens: a text has 20 tokens, those of the prompt and its images included"
        yield warning(GENERATION, problem, "write max_new_tokens")
    if repo.model_type != SINGLE_TYPE:
        yield from _unheeded(repo.document(GENERATION))


def _unheeded(settings: Any) -> Iterator[Finding]:
    beams = integer(settings.get("num_beams"))
    if beams is not None and beams > 1:
        problem = f"num_beams is {beams}, and transformers.js takes the best token all the same"
        yield warning(GENERATION, problem, 'write "num_beams": 1, and validate the captions of greedy search')
    ignored = [key for key, nothing in _IGNORED.items() if settings.get(key) not in (None, nothing)]
    if ignored:
        problem = f"{', '.join(ignored)}: transformers.js ignores this without a word"
        yield warning(GENERATION, problem, "drop it, and validate what the model says without")


def _ids(value: Any) -> list[int]:
    """One id or several, as a list."""
    return [number for number in (value if isinstance(value, list) else [value]) if integer(number) is not None]
