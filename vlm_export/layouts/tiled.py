"""chat of Idefics3 and SmolVLM: transformers.js's own classes, which split images into tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vlm_export.layouts.chat import Chat
from vlm_export.spec.client import RepoFacts, generation_config


class TiledChat(Chat):
    """`tile_tokens`: rows of `image_features` for one tile, under a config."""

    call = "text, image"

    def __init__(self, processor_class: str, tile_tokens: Callable[[Mapping[str, Any]], int]):
        self.processor_class = processor_class
        self.tile_tokens = tile_tokens

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        return {
            "config.json": {**facts.config, "text_config": dict(facts.text_config)},
            "generation_config.json": generation_config(facts),
            "processor_config.json": {
                "processor_class": self.processor_class,
                "image_seq_len": self.tile_tokens(facts.config),
            },
        }
