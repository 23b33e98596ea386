"""captioner of a prefix-conditioning model: a `vision-encoder-decoder` for the pipeline 'image-to-text'.

The class feeds `input_ids` and `encoder_hidden_states` at every step; the decoder graph itself puts the image prefix in
the place of the start token when the past is empty. The start token is the image token: never eos, which a repetition
penalty would then suppress, and special, so that decoding drops it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

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

_DECODER = "decoder_model_merged"


class PrefixCaptioner(Client):
    name = "pipeline('image-to-text')"
    task = "image-to-text"
    node: Literal["captioner"] = "captioner"
    own_token = IMAGE_TOKEN
    chat_template = CHAT_TEMPLATE

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        start = facts.free_token_id
        config = {
            "model_type": "vision-encoder-decoder",
            "architectures": ["VisionEncoderDecoderModel"],
            "is_encoder_decoder": True,
            "encoder": dict(facts.config["vision_config"]),
            "decoder": {**facts.text_config, "decoder_start_token_id": start},
            "decoder_start_token_id": start,
            "pad_token_id": facts.pad_token_id,
        }
        return {
            "config.json": config,
            "generation_config.json": generation_config(facts, decoder_start_token_id=start),
        }

    def driver(self, sessions: Sessions, files: Mapping[str, dict[str, Any]]) -> _Driver:
        return _Driver(sessions, files["generation_config.json"]["decoder_start_token_id"])

    def snippet(self, repo_id: str) -> str:
        return f"""```js
import {{ pipeline }} from '@huggingface/transformers';

const captioner = await pipeline('image-to-text', '{repo_id}');
const [{{ generated_text }}] = await captioner('photo.jpg');
```"""


class _Driver:
    def __init__(self, sessions: Sessions, start_token_id: int):
        self.sessions = sessions
        self.start_token_id = start_token_id

    def encode(self, inputs: Inputs) -> list[Observed]:
        outputs = self.sessions.run("encoder_model", inputs)
        return [Observed("encoder_model", "last_hidden_state", "image_features", outputs["last_hidden_state"])]

    def prefill(self, inputs: Inputs) -> DecoderRun:
        prompt = inputs["input_ids"]
        start = np.full((len(prompt), 1), self.start_token_id, dtype=np.int64)
        cache = self.sessions.empty_cache(_DECODER, len(prompt))
        return self.step(np.concatenate([start, prompt], axis=1), cache, inputs)

    def step(self, token_ids: np.ndarray, cache: Arrays, inputs: Inputs) -> DecoderRun:
        feeds = {"input_ids": token_ids, "encoder_hidden_states": inputs["image_features"], **cache}
        return decoder_run(_DECODER, self.sessions.run(_DECODER, feeds))

    def seen(self, inputs: Inputs) -> list[int]:
        return []
