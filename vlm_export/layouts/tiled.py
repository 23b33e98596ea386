"""chat of Idefics3 and SmolVLM: transformers.js's own classes, which split images into tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vlm_export.layouts.chat import Chat
from vlm_export.spec.client import RepoFacts, generation_config


class TiledChat(Chat):
    """The client of Idefics3 and SmolVLM.

    `processor_class` is the name of transformers.js's, `tile_tokens` gives the rows of `image_features` for one tile.
    """

    call = "text, image"

    def __init__(self, processor_class: str, tile_tokens: Callable[[Mapping[str, Any]], int]):
        self.processor_class = processor_class
        self.tile_tokens = tile_tokens

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """The model's own config, its text config complete, with `generation_config.json` and `processor_config.json`.

        transformers.js writes `image_seq_len` image tokens for each tile.
        """
        return {
            "config.json": {**facts.config, "text_config": dict(facts.text_config)},
            "generation_config.json": generation_config(facts),
            "processor_config.json": {
                "processor_class": self.processor_class,
                "image_seq_len": self.tile_tokens(facts.config),
            },
        }
