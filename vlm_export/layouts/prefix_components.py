"""components of a prefix-conditioning model: graphs for hand-written runtimes, one a building block.

`vision_encoder` → `projection` → `prefix_init` (prefix and prompt ids → logits and cache) → `embed_tokens` and
`language_model` (embeddings and cache → logits and cache) for every further token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_export.layouts.base import (
    Arrays,
    Client,
    DecoderRun,
    Inputs,
    Observed,
    RepoFacts,
    Sessions,
    decoder_run,
    generation_config,
)
from vlm_export.layouts.prefix_chat import CHAT_TEMPLATE, IMAGE_TOKEN


class PrefixComponents(Client):
    name = "ONNX Runtime and a loop of your own"
    task = "image-to-text"
    own_token = IMAGE_TOKEN
    chat_template = CHAT_TEMPLATE

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        return {
            "config.json": {**facts.config, "text_config": dict(facts.text_config)},
            "generation_config.json": generation_config(facts),
        }

    def driver(self, sessions: Sessions, files: Mapping[str, dict[str, Any]]) -> _Driver:
        return _Driver(sessions)

    def snippet(self, repo_id: str) -> str:
        return """```text
vision_encoder   pixel_values                       -> last_hidden_state
projection       last_hidden_state                  -> projected_prefix
prefix_init      prefix_embeddings, input_ids       -> logits, present.*          (once; input_ids may be empty)
embed_tokens     input_ids                          -> inputs_embeds              (each new token)
language_model   inputs_embeds, past_key_values.*   -> logits, present.*
```"""


class _Driver:
    def __init__(self, sessions: Sessions):
        self.sessions = sessions

    def encode(self, inputs: Inputs) -> list[Observed]:
        features = self.sessions.run("vision_encoder", inputs)["last_hidden_state"]
        prefix = self.sessions.run("projection", {"last_hidden_state": features})["projected_prefix"]
        return [
            Observed("vision_encoder", "last_hidden_state", "vision_features", features),
            Observed("projection", "projected_prefix", "image_features", prefix),
        ]

    def prefill(self, inputs: Inputs) -> DecoderRun:
        feeds = {"prefix_embeddings": inputs["image_features"], "input_ids": inputs["input_ids"]}
        return decoder_run("prefix_init", self.sessions.run("prefix_init", feeds))

    def step(self, token_ids: np.ndarray, cache: Arrays, inputs: Inputs) -> DecoderRun:
        embeds = self.sessions.run("embed_tokens", {"input_ids": token_ids})["inputs_embeds"]
        return decoder_run("language_model", self.sessions.run("language_model", {"inputs_embeds": embeds, **cache}))

    def seen(self, inputs: Inputs) -> list[int]:
        return []
