"""chat of a class that transformers.js lacks: its llava, which is fed in the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vlm_export.layouts.llava import LlavaChat
from vlm_export.spec.client import ChatTemplate, RepoFacts

Template = Callable[[ChatTemplate | None, str], ChatTemplate | None]  # a checkpoint's, and the image token


class AsLlavaChat(LlavaChat):
    """A llava to the client.

    `token` stands for a row of features, where the checkpoint's `processor_config.json` names no other;
    `image_processor` makes settings that transformers.js acts on, and `template` the repo's chat template.
    """

    def __init__(
        self,
        image_tokens: Callable[[Mapping[str, Any]], int],
        token: str,
        image_processor: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        template: Template,
        question: str,
    ):
        super().__init__(image_tokens)
        self.token, self.image_processor, self.written, self.question = token, image_processor, template, question

    def image_token(self, processor: Mapping[str, Any]) -> str:
        """The token that features are written over; `processor` is the checkpoint's `processor_config.json`."""
        return str(processor.get("image_token", self.token))

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """A llava's files, and image processor settings of a class that transformers.js has."""
        files = super().config(facts)
        files["config.json"] |= {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
        files["processor_config.json"]["image_token"] = self.image_token(facts.processor)
        return {**files, "preprocessor_config.json": dict(self.image_processor(facts.image_processor))}

    def template(self, facts: RepoFacts) -> ChatTemplate | None:
        """The checkpoint's, with what its own processor writes and the client's does not."""
        return self.written(super().template(facts), self.image_token(facts.processor))
