"""chat of a llava: transformers.js's own class of that name, under the model's own config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vlm_export.layouts.chat import Chat, llava_processor
from vlm_export.layouts.text_models import known_text_config
from vlm_export.models.chat import load_config
from vlm_export.spec.client import RepoFacts, generation_config


class LlavaChat(Chat):
    """The client of a llava; `image_tokens` gives the rows of `image_features` for one image, under a config."""

    def __init__(self, image_tokens: Callable[[Mapping[str, Any]], int]):
        self.image_tokens = image_tokens

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """The model's own config, with a text config that transformers.js knows and both names of the image token.

        With it go `generation_config.json`, and a `processor_config.json` that makes the processor write as many image
        tokens as there are rows.
        """
        image_token_id = load_config(facts.config).image_token_id
        config = {
            **facts.config,
            "image_token_index": image_token_id,  # what 3.x reads
            "image_token_id": image_token_id,
            "text_config": known_text_config(facts.text_config),
        }
        return {
            "config.json": config,
            "generation_config.json": generation_config(facts),
            "processor_config.json": llava_processor(
                facts.processor.get("image_token", "<image>"), self.image_tokens(facts.config)
            ),
        }
