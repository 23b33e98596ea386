"""Rules of generation: what a checkpoint says, what of it a greedy client heeds, and what a recipe says instead.

The client is transformers.js 4.3, which generates greedily; what it heeds is in its `src/generation`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import GenerationConfig

from vlm_export.contract import HEEDED, MAX_NEW_TOKENS, OF_SAMPLING, SEARCH_OPTIONS
from vlm_export.errors import blamed_on
from vlm_export.own_files import own_file
from vlm_export.preprocessing import stored_generation
from vlm_export.recipe import FROM_CHECKPOINT, Generation
from vlm_export.source.checkpoint import Checkpoint
from vlm_export.source.companions import CONFIG, GENERATION_FILE

_NO_RULES = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "max_length",
    "max_new_tokens",
    "use_cache",
    "cache_implementation",
    "return_dict_in_generate",
    "transformers_version",
    "_from_model_config",
}
_COUNT_PROMPT = {"min_length", "forced_bos_token_id"}


def loaded_rules(checkpoint: Checkpoint) -> GenerationConfig:
    """The rules of the model that transformers loads: of `generation_config.json`, else of `config.json`.

    Raises:
        InputError: transformers refuses them.
    """
    file = own_file(checkpoint.path, GENERATION_FILE)
    with blamed_on(f"{file or checkpoint.path / CONFIG}: rules of generation"):
        if file:
            return GenerationConfig.from_dict(stored_generation(checkpoint.path))
        return GenerationConfig.from_model_config(dict(checkpoint.config))


def published(wanted: Generation, checkpoint: Checkpoint) -> dict[str, Any]:
    """What `generation_config.json` says beside ids: the checkpoint's rules that are heeded, under the recipe's."""
    rules = loaded_rules(checkpoint)
    found = {"max_new_tokens": MAX_NEW_TOKENS} | {name: getattr(rules, name, None) for name in _heeded(checkpoint)}
    if wanted.from_checkpoint:
        found["max_new_tokens"] = rules.max_new_tokens or rules.max_length or MAX_NEW_TOKENS
    asked = {name: value for name, value in asdict(wanted).items() if name not in (FROM_CHECKPOINT, *SEARCH_OPTIONS)}
    found |= {name: value for name, value in asked.items() if value is not None}
    return {name: value for name, value in found.items() if name not in HEEDED or value not in (None, HEEDED[name], [])}


def unheeded(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's rules that no greedy client heeds, by name; of sampling's, none where it does not sample."""
    changed = loaded_rules(checkpoint).to_diff_dict()
    sampled = bool(changed.get("do_sample"))
    return {
        name: value
        for name, value in changed.items()
        if name not in _NO_RULES and name not in _heeded(checkpoint) and not name.startswith("output_")
        if value not in (None, False, []) and (sampled or name not in OF_SAMPLING)
    }


def _heeded(checkpoint: Checkpoint) -> set[str]:
    """Without those that count ids of the prompt where PyTorch is given none, and clients are."""
    return HEEDED.keys() - (set() if checkpoint.family.begins_with_ids else _COUNT_PROMPT)
