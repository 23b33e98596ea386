"""Classes that a Hub repo brings as code, for a recipe with `trust_remote_code`.

Code is run from one commit that the recipe names, and only to build the model: its config class and its model class,
by transformers' own loader, under `model_type`. Such a class counts as the family's whose config class its own derives
from. Graphs hold what its modules compute, and `verify` compares them with what its forward says. Code of tokenizers
and processors is never run, since transformers.js has none of it; adapters have no such key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModelForImageTextToText
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from vlm_export.errors import InputError
from vlm_export.families.registry import family_of
from vlm_export.forms.reading import needed_json_of

FILES = ("config.json", "*.py")  # of the repo
_MAPPINGS: tuple[Any, ...] = (CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
_CONFIG = "AutoConfig"
_MODELS = ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForCausalLM", "AutoModel")
_REFERENCE = re.compile(r"\w+(\.\w+)*\.\w+")  # `module.Class`; `org/repo--module.Class` is in a repo that nothing pins


@contextmanager
def registered(folder: Path, source: str) -> Iterator[None]:
    """Import the classes that the `auto_map` of a repo's `config.json` names; within, its `model_type` means them.

    Args:
        folder: the repo's `config.json` and code, downloaded.
        source: the repo and its commit, for messages.

    Raises:
        InputError: there are none, they are in another repo, cannot be imported, or build on no family.
    """
    config = needed_json_of(folder, "config.json")
    config_class = _load(folder, config, (_CONFIG,), source)
    model_class = _load(folder, config, _MODELS, source)
    family = family_of(config_class)
    if family is None or not family.remote_code:
        reason = "derives from no family's" if family is None else f"is that of a {family.model_type}, built by our own"
        raise InputError(f"{source}: auto_map: {config_class.__name__} {reason}; remove trust_remote_code")
    before = [dict(mapping._extra_content) for mapping in _MAPPINGS]
    try:
        AutoConfig.register(config["model_type"], config_class, exist_ok=True)
        AutoModelForImageTextToText.register(config_class, model_class, exist_ok=True)
    except (ValueError, KeyError) as error:
        raise InputError(f"{source}: auto_map: {' '.join(str(error).split())}") from error
    try:
        yield
    finally:
        for mapping, content in zip(_MAPPINGS, before, strict=True):
            mapping._extra_content.clear()  # where `register` puts what is not the library's own; it has no inverse
            mapping._extra_content.update(content)


def _load(folder: Path, config: dict[str, Any], names: tuple[str, ...], source: str) -> type:
    auto_map = config.get("auto_map") or {}
    reference = next((auto_map[name] for name in names if name in auto_map), None)
    if reference is None:
        raise InputError(f"{source}: config.json: auto_map names no {names[0]}; remove trust_remote_code")
    if not isinstance(reference, str) or not _REFERENCE.fullmatch(reference):
        raise InputError(f"{source}: config.json: auto_map: {reference!r} is not code of this repo; no commit pins it")
    try:
        return get_class_from_dynamic_module(reference, folder)
    except Exception as error:  # whatever the repo's code raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{source}: {reference} cannot be imported: {reason[:300]}") from error
