"""Lay out the repo: what transformers.js reads beside the graphs, and where it all came from."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from vlm_export.atomic import write_text
from vlm_export.dtypes import FP32, PREFERRED, preferred
from vlm_export.errors import InputError
from vlm_export.files import read_json, write_json
from vlm_export.forms.reading import needed_json_of
from vlm_export.manifest import MANIFEST, Manifest
from vlm_export.models.pixels import DONE_IN_GRAPH
from vlm_export.preprocessing import (
    begun_once,
    copy_tokenizer,
    image_processor_settings,
    load_tokenizer,
    processor_settings,
    stored_generation,
)
from vlm_export.preprocessing import chat_template as own_template
from vlm_export.publish.local_paths import forget_folders, published_recipe
from vlm_export.recipe import RecipeFile
from vlm_export.runtime.text import Text
from vlm_export.source.checkpoint import Checkpoint
from vlm_export.source.companions import check_tokenizer
from vlm_export.source.generation_rules import published
from vlm_export.spec.client import ChatTemplate, Client, RepoFacts
from vlm_export.verify.recording import eos_token_ids
from vlm_export.wanted import MIXED

_PREPROCESSOR = "preprocessor_config.json"
_CLIENT_CONFIG = "transformers.js_config"


def write_config_files(folder: Path, recipe: RecipeFile, merged: Checkpoint, manifest: Manifest) -> None:
    """Write config, generation, tokenizer, processor, recipe and manifest files into the repo folder.

    Raises:
        InputError: the tokenizer does not fit the model, or nothing would end a caption.
    """
    client = merged.family.layouts[manifest.layout].client
    copy_tokenizer(merged.path, folder)
    facts = _facts(recipe, merged, client)
    files = _settings(client, facts)
    if manifest.in_graph:
        files[_PREPROCESSOR] |= DONE_IN_GRAPH
    files["config.json"][_CLIENT_CONFIG] = _client_config(manifest)
    if "processor_config.json" in files:
        files[_PREPROCESSOR]["processor_class"] = files["processor_config.json"]["processor_class"]
    for name, values in files.items():
        write_json(folder / name, values)
    if client.own_token is not None:
        _add_token(folder, client.own_token, facts.first_unused_token_id)
    if client.surrounds_prompts:
        _surround(folder)
    if client.begins_prompts:
        _leave_bare(folder)
    _finish_tokenizer(folder, client.template(facts), client)
    write_json(folder / MANIFEST, asdict(manifest))
    write_text(folder / "recipe.yaml", published_recipe(recipe))
    forget_folders(folder)


def image_processor(recipe: RecipeFile, merged: Checkpoint, layout: str) -> dict[str, Any]:
    """`preprocessor_config.json` of a repo whose client prepares the pictures.

    Raises:
        InputError: as of `write_config_files`.
    """
    client = merged.family.layouts[layout].client
    return _settings(client, _facts(recipe, merged, client))[_PREPROCESSOR]


def _settings(client: Client, facts: RepoFacts) -> dict[str, dict[str, Any]]:
    """The JSON files that make a client load a repo, by name."""
    return {_PREPROCESSOR: dict(facts.image_processor), **client.config(facts)}


def _facts(recipe: RecipeFile, merged: Checkpoint, client: Client) -> RepoFacts:
    tokenizer = load_tokenizer(merged.path)
    text_config = merged.family.text_config(merged.config)
    eos = eos_token_ids(merged, tokenizer)
    check_tokenizer(merged.path, merged)
    padding = tokenizer.pad_token_id
    if client.own_token in tokenizer.get_vocab():
        raise InputError(f"{merged.path / 'tokenizer.json'}: has a token {client.own_token!r} of its own; rename it")
    text = text_config.to_dict()
    return RepoFacts(
        config={
            **{key: value for key, value in merged.config.items() if key != "auto_map"},
            "model_type": merged.family.model_type,  # that of a class of its own code means nothing to a client
        },
        # A null in it, `eos_token_id` above all, would win over generation_config.json in transformers.js.
        text_config={key: value for key, value in text.items() if value is not None} | {"eos_token_id": eos[0]},
        generation=published(recipe.recipe.generation, merged),
        search=recipe.recipe.generation.search,
        stored_generation=stored_generation(merged.path),
        processor=processor_settings(merged.path),
        image_processor=image_processor_settings(
            merged.path,
            merged.family.image_processor(merged.config),
            recipe.recipe.image_processor,
            f"{recipe.path}: image_processor",
        ),
        chat_template=begun_once(recipe.recipe.chat_template or own_template(merged.path), tokenizer),
        eos_token_ids=eos,
        pad_token_id=eos[0] if padding is None or padding >= text_config.vocab_size else padding,
        first_unused_token_id=len(tokenizer),
        token=lambda index: str(tokenizer.convert_ids_to_tokens(index)),
    )


def _client_config(manifest: Manifest) -> dict[str, Any]:
    """What transformers.js must be told: external data chunks, and the dtype to take on each device.

    Its own defaults are fp32, except on WASM, the browser's default device, where it is q8.
    """
    config: dict[str, Any] = {}
    chunks = {graph.file: graph.data_chunks for graph in manifest.graphs if graph.data_chunks}
    if chunks:
        config["use_external_data_format"] = chunks
    config["device_config"] = {device: {"dtype": taken(device, manifest)} for device in PREFERRED}
    return config


def taken(device: str, manifest: Manifest) -> str | dict[str, str]:
    """The dtype that a client takes on a device, or one for each component, if a user chose those and none failed."""
    if manifest.mixed and MIXED not in manifest.failed:
        return manifest.mixed
    return preferred(device, manifest.usable()) or FP32.name


def write_failed(folder: Path, manifest: Manifest, failed: list[str]) -> Manifest:
    """Say in a repo which dtypes failed, so that no client takes one of them by itself. Returns the new manifest."""
    manifest = replace(manifest, failed=failed)
    config = needed_json_of(folder, "config.json")
    write_json(folder / "config.json", config | {_CLIENT_CONFIG: _client_config(manifest)})
    write_json(folder / MANIFEST, asdict(manifest))
    return manifest


def _add_token(folder: Path, token: str, token_id: int) -> None:
    """Add a special token to the tokenizer."""
    tokenizer = read_json(folder / "tokenizer.json")
    tokenizer["added_tokens"].append(
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _surround(folder: Path) -> None:
    """Make the tokenizer put the tokens that begin and end a text around it, unless it does."""
    special = Text(folder).special_tokens
    begin, end = special["bos_token"], special["eos_token"]
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [(token, own.token_to_id(token)) for token in (begin, end)]
    if own.encode("a").ids == [ids[0][1], *own.encode("a", add_special_tokens=False).ids, ids[1][1]]:
        return
    own.post_processor = TemplateProcessing(single=[begin, "$A", end], special_tokens=ids)
    own.save(str(folder / "tokenizer.json"))


def _leave_bare(folder: Path) -> None:
    """Make the tokenizer put nothing around a text."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(read_json(path) | {"post_processor": None}, ensure_ascii=False), encoding="utf-8")


def _finish_tokenizer(folder: Path, chat_template: ChatTemplate | None, client: Client) -> None:
    """Put the chat template where transformers.js reads it, and say what it would otherwise guess.

    Raises:
        InputError: the tokenizer lacks a token that the client's processor writes.
    """
    template_file = folder / "chat_template.jinja"
    template_file.unlink(missing_ok=True)
    stored = read_json(folder / "tokenizer_config.json")
    extra = stored.get("extra_special_tokens")
    tokens = {**(extra if isinstance(extra, dict) else {}), **stored}
    missing = [name for name in client.tokenizer_tokens if not tokens.get(name)]
    if missing:
        raise InputError(f"tokenizer_config.json: {missing[0]}: not set, and the model's processor writes that token")
    config = {
        **stored,
        **{name: tokens[name] for name in client.tokenizer_tokens},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": client.padding_side,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    write_json(folder / "tokenizer_config.json", config)
    if client.template_file and isinstance(chat_template, str):
        write_text(template_file, chat_template)
