"""chat of a prefix-conditioning model: a `llava` made up around it, for prompts and turns in transformers.js.

The prefix becomes image tokens in front of the prompt; their id is the first after the tokenizer's, so that it is never
generated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlm_export.layouts.base import Inputs, RepoFacts, Sessions, generation_config
from vlm_export.layouts.chat import Chat, ChatDriver, llava_processor

IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


class PrefixChat(Chat):
    """`image_tokens`: rows of `image_features` for one image, under a config."""

    own_token = IMAGE_TOKEN
    question = ""  # it was trained on none
    chat_template = CHAT_TEMPLATE

    def __init__(self, image_tokens: Callable[[Mapping[str, Any]], int]):
        self.image_tokens = image_tokens

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        config = {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
            "image_token_index": facts.free_token_id,  # what 3.x reads
            "image_token_id": facts.free_token_id,
            "text_config": dict(facts.text_config),
            "vision_config": dict(facts.config["vision_config"]),
        }
        return {
            "config.json": config,
            "generation_config.json": generation_config(facts),
            "processor_config.json": llava_processor(IMAGE_TOKEN, self.image_tokens(facts.config)),
        }

    def driver(self, sessions: Sessions, files: Mapping[str, dict[str, Any]]) -> ChatDriver:
        return _Driver(sessions, files["config.json"]["image_token_id"])

    def prompt(self, text: str) -> str:
        return IMAGE_TOKEN + text


class _Driver(ChatDriver):
    """The image's tokens are in front of the ids that the golden was fed."""

    def ids(self, inputs: Inputs) -> np.ndarray:
        batch, rows = inputs["image_features"].shape[:2]
        image_ids = np.full((batch, rows), self.image_token_id, dtype=np.int64)
        return np.concatenate([image_ids, inputs["input_ids"]], axis=1)

    def seen(self, inputs: Inputs) -> list[int]:
        return []
