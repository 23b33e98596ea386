"""captioner: a `vision-encoder-decoder` for transformers.js, so that `pipeline('image-to-text')` loads it.

The class feeds `input_ids` and `encoder_hidden_states` at every step; the decoder graph itself puts the image prefix in
the place of the start token when the past is empty. The start token is the image token: never eos, which a repetition
penalty would then suppress, and special, so that decoding drops it.
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
from vlm_export.layouts.text_models import known_text_config

_DECODER = "decoder_model_merged"


class Captioner(Layout):
    name = "captioner"
    client = "pipeline('image-to-text')"

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        start = facts.image_token_id
        config = {
            "model_type": "vision-encoder-decoder",
            "architectures": ["VisionEncoderDecoderModel"],
            "is_encoder_decoder": True,
            "encoder": dict(facts.config["vision_config"]),
            "decoder": {**known_text_config(facts.config["text_config"]), "decoder_start_token_id": start},
            "decoder_start_token_id": start,
            "pad_token_id": facts.pad_token_id,
        }
        return {
            "config.json": config,
            "generation_config.json": generation_config(facts, decoder_start_token_id=start),
        }

    def driver(self, sessions: Sessions, facts: Mapping[str, dict[str, Any]]) -> _Driver:
        return _Driver(sessions, facts["generation_config.json"]["decoder_start_token_id"])

    def snippet(self, repo_id: str, image_token: str) -> str:
        return f"""```js
import {{ pipeline }} from '@huggingface/transformers';

const captioner = await pipeline('image-to-text', '{repo_id}');
const [{{ generated_text }}] = await captioner('photo.jpg');
```"""


class _Driver:
    def __init__(self, sessions: Sessions, start_token_id: int):
        self.sessions = sessions
        self.start_token_id = start_token_id

    def encode(self, pixel_values: np.ndarray) -> list[Observed]:
        outputs = self.sessions.run("encoder_model", {"pixel_values": pixel_values})
        return [Observed("encoder_model", "last_hidden_state", "image_features", outputs["last_hidden_state"])]

    def prefill(self, image_features: np.ndarray, prompt_ids: np.ndarray) -> DecoderRun:
        batch = len(prompt_ids)
        start = np.full((batch, 1), self.start_token_id, dtype=np.int64)
        ids = np.concatenate([start, prompt_ids], axis=1)
        return self.step(ids, self.sessions.empty_cache(_DECODER, batch), image_features)

    def step(self, token_ids: np.ndarray, cache: Arrays, image_features: np.ndarray) -> DecoderRun:
        feeds = {"input_ids": token_ids, "encoder_hidden_states": image_features, **cache}
        return decoder_run(_DECODER, self.sessions.run(_DECODER, feeds))


LAYOUT = Captioner()
