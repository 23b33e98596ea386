"""components: the graphs for hand-written runtimes, one a building block; no library loads them as they are.

`vision_encoder` → `projection` → `prefix_init` (prefix and prompt ids → logits and cache) → `embed_tokens` and
`language_model` (embeddings and cache → logits and cache) for every further token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_export.layouts.base import (
    Arrays,
    DecoderRun,
    Layout,
    Observed,
    RepoFacts,
    Sessions,
    decoder_run,
    generation_config,
)


class Components(Layout):
    name = "components"
    client = "ONNX Runtime and a loop of your own"
    in_transformers_js = False

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        return {"config.json": dict(facts.config), "generation_config.json": generation_config(facts)}

    def driver(self, sessions: Sessions, facts: Mapping[str, dict[str, Any]]) -> _Driver:
        return _Driver(sessions)

    def snippet(self, repo_id: str, image_token: str) -> str:
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

    def encode(self, pixel_values: np.ndarray) -> list[Observed]:
        features = self.sessions.run("vision_encoder", {"pixel_values": pixel_values})["last_hidden_state"]
        prefix = self.sessions.run("projection", {"last_hidden_state": features})["projected_prefix"]
        return [
            Observed("vision_encoder", "last_hidden_state", "vision_features", features),
            Observed("projection", "projected_prefix", "image_features", prefix),
        ]

    def prefill(self, image_features: np.ndarray, prompt_ids: np.ndarray) -> DecoderRun:
        feeds = {"prefix_embeddings": image_features, "input_ids": prompt_ids}
        return decoder_run("prefix_init", self.sessions.run("prefix_init", feeds))

    def step(self, token_ids: np.ndarray, cache: Arrays, image_features: np.ndarray) -> DecoderRun:
        embeds = self.sessions.run("embed_tokens", {"input_ids": token_ids})["inputs_embeds"]
        return decoder_run("language_model", self.sessions.run("language_model", {"inputs_embeds": embeds, **cache}))


LAYOUT = Components()
