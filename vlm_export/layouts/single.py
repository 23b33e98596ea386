"""single: a whole caption in one run of one graph, in any language that ONNX Runtime has.

The graphs are those of another layout, joined by `graph/loop.py` when they are finished.
"""

from __future__ import annotations

from typing import Any, Literal

from vlm_export.contract import SINGLE_TYPE
from vlm_export.spec.client import Client, RepoFacts


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

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """The files of the graphs apart, under a `model_type` that transformers.js does not know."""
        files = self.apart.config(facts)
        files["config.json"] = {**files["config.json"], "model_type": SINGLE_TYPE}
        return files
