"""chat of a prefix-conditioning model: a `llava` made up around it, for prompts and turns in transformers.js.

The prefix becomes image tokens in front of the prompt; their id is the first after the tokenizer's, so that it is never
generated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vlm_export.contract import PREFIX
from vlm_export.layouts.chat import Chat, llava_processor
from vlm_export.layouts.text_models import known_text_config
from vlm_export.spec.client import RepoFacts, generation_config

IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


class PrefixChat(Chat):
    """The client of `chat`; `image_tokens` gives the rows of `image_features` for one image, under a config."""

    own_token = IMAGE_TOKEN
    question = ""  # it was trained on none
    chat_template = CHAT_TEMPLATE

    def __init__(self, image_tokens: Callable[[Mapping[str, Any]], int]):
        self.image_tokens = image_tokens

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """`config.json` of a llava made up around the model, `generation_config.json` and `processor_config.json`."""
        config = {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
            "image_token_index": facts.first_unused_token_id,  # what 3.x reads
            "image_token_id": facts.first_unused_token_id,
            "text_config": known_text_config(facts.text_config),
            "vision_config": dict(facts.config["vision_config"]),
            PREFIX: True,
        }
        return {
            "config.json": config,
            "generation_config.json": generation_config(facts),
            "processor_config.json": llava_processor(IMAGE_TOKEN, self.image_tokens(facts.config)),
        }

    def prompt(self, text: str) -> str:
        """The text behind an image token, which the golden's text does not have."""
        return IMAGE_TOKEN + text
