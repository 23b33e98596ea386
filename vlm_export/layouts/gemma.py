"""chat of PaliGemma and Gemma 3: transformers.js's own classes, whose processors write more than an image's tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vlm_export.layouts.chat import Chat
from vlm_export.layouts.prefix_chat import CHAT_TEMPLATE
from vlm_export.layouts.text_models import known_text_config
from vlm_export.models.chat import load_config
from vlm_export.spec.client import RepoFacts, generation_config

_PAN_AND_SCAN = "pan_and_scan"  # in the names of settings on which transformers.js does not act


def _config(facts: RepoFacts, architecture: str) -> dict[str, Any]:
    """The model's own config, with both names of the image token."""
    image_token_id = load_config(facts.config).image_token_id
    return {
        **facts.config,
        "architectures": [architecture],
        "image_token_index": image_token_id,  # what 3.x reads
        "image_token_id": image_token_id,
        "text_config": known_text_config(facts.text_config),
    }


class PaliGemmaChat(Chat):
    """The client of a PaliGemma, whose processor writes the token that begins a text behind the images.

    `image_tokens` gives the rows of `image_features` for one image, under a config.
    """

    begins_prompts = True
    chat_template = CHAT_TEMPLATE
    question = "caption en"

    def __init__(self, image_tokens: Callable[[Mapping[str, Any]], int]):
        self.image_tokens = image_tokens

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """The model's own config, and `preprocessor_config.json`, which alone `PaliGemmaProcessor` reads."""
        return {
            "config.json": _config(facts, "PaliGemmaForConditionalGeneration"),
            "generation_config.json": generation_config(facts),
            "preprocessor_config.json": {
                **facts.image_processor,
                "processor_class": "PaliGemmaProcessor",
                "image_seq_length": self.image_tokens(facts.config),
            },
        }


class Gemma3Chat(Chat):
    """The client of a Gemma 3, which reads its chat template from a file.

    `image_tokens` gives the rows of `image_features` for one image, under a config.
    """

    call = "text, image"
    template_file = True
    tokenizer_tokens = ("boi_token", "image_token", "eoi_token")

    def __init__(self, image_tokens: Callable[[Mapping[str, Any]], int]):
        self.image_tokens = image_tokens

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """The model's own config, and what `Gemma3Processor` reads."""
        return {
            "config.json": _config(facts, "Gemma3ForConditionalGeneration"),
            "generation_config.json": generation_config(facts),
            "processor_config.json": {
                "processor_class": "Gemma3Processor",
                "image_seq_length": self.image_tokens(facts.config),
            },
            "preprocessor_config.json": whole_pictures(facts.image_processor),
        }


def whole_pictures(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Image processor settings without crops."""
    return {name: value for name, value in settings.items() if _PAN_AND_SCAN not in name}
