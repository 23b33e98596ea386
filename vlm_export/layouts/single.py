"""single: a whole caption, or answer, in one run of one graph, in any language that ONNX Runtime has.

The graphs are those of another layout, joined by `graph/loop.py` when they are finished.
"""

from __future__ import annotations

from typing import Any, Literal

from vlm_export.contract import SINGLE_OF, SINGLE_TYPE
from vlm_export.spec.client import ChatTemplate, Client, RepoFacts


class Single(Client):
    """The client of `single`: ONNX Runtime alone. Its files are those of the client that takes the graphs apart."""

    name = "ONNX Runtime alone"
    node: Literal["single"] = "single"

    def __init__(self, apart: Client):
        self.apart = apart
        self.task = apart.task
        self.own_token = apart.own_token
        self.chat_template = apart.chat_template
        self.feeds_one_picture = apart.feeds_one_picture
        self.question = apart.question
        self.padding_side = apart.padding_side
        self.surrounds_prompts = apart.surrounds_prompts
        self.begins_prompts = apart.begins_prompts
        self.template_file = apart.template_file
        self.tokenizer_tokens = apart.tokenizer_tokens

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """Those of the graphs apart, under a `model_type` that transformers.js does not know, and a search."""
        files = self.apart.config(facts)
        apart = files["config.json"]["model_type"]
        files["config.json"] = {**files["config.json"], "model_type": SINGLE_TYPE, SINGLE_OF: apart}
        files["generation_config.json"] = {**files["generation_config.json"], **facts.search}
        return files

    def template(self, facts: RepoFacts) -> ChatTemplate | None:
        """That of the client that takes the graphs apart."""
        return self.apart.template(facts)

    def prompt(self, text: str) -> str:
        """As that client's processor takes it."""
        return self.apart.prompt(text)
