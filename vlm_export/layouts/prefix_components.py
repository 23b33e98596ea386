"""components of a prefix-conditioning model: graphs for hand-written runtimes, one a building block.

`vision_encoder` → `projection` → `prefix_init` (prefix and prompt ids → logits and cache) → `embed_tokens` and
`language_model` (embeddings and cache → logits and cache) for every further token.
"""

from __future__ import annotations

from typing import Any

from vlm_export.layouts.prefix_chat import CHAT_TEMPLATE, IMAGE_TOKEN
from vlm_export.spec.client import Client, RepoFacts, generation_config


class PrefixComponents(Client):
    """The client of `components`: a loop that the user writes, in any language."""

    name = "ONNX Runtime and a loop of your own"
    task = "image-to-text"
    own_token = IMAGE_TOKEN
    chat_template = CHAT_TEMPLATE
    graphs = """\
vision_encoder   pixel_values                       -> last_hidden_state
projection       last_hidden_state                  -> projected_prefix
prefix_init      prefix_embeddings, input_ids       -> logits, present.*          (once; input_ids may be empty)
embed_tokens     input_ids                          -> inputs_embeds              (each new token)
language_model   inputs_embeds, past_key_values.*   -> logits, present.*"""

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """The model's own config, its text config complete, and `generation_config.json`."""
        return {
            "config.json": {**facts.config, "text_config": dict(facts.text_config)},
            "generation_config.json": generation_config(facts),
        }
