"""chat: a `llava` for transformers.js (`AutoProcessor` + `AutoModelForImageTextToText`), for prompts and turns.

The class runs `embed_tokens` on the prompt, writes the image's features over the rows of image tokens, and feeds
embeddings, mask and positions to the decoder.
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


class Chat(Layout):
    name = "chat"
    client = "AutoModelForImageTextToText"

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        config = {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
            "image_token_index": facts.image_token_id,  # what 3.x reads
            "image_token_id": facts.image_token_id,
            "text_config": known_text_config(facts.config["text_config"]),
            "vision_config": dict(facts.config["vision_config"]),
        }
        # The processor writes floor(size / patch_size)² + num_additional_image_tokens image tokens. A patch larger than
        # the image leaves the second term alone, which is right for towers and projections of any grid.
        processor = {
            "processor_class": "LlavaProcessor",
            "image_token": facts.image_token,
            "patch_size": facts.image_size + 1,
            "num_additional_image_tokens": facts.image_tokens,
        }
        return {
            "config.json": config,
            "generation_config.json": generation_config(facts),
            "processor_config.json": processor,
        }

    def driver(self, sessions: Sessions, facts: Mapping[str, dict[str, Any]]) -> _Driver:
        return _Driver(sessions, facts["config.json"]["image_token_id"])

    def snippet(self, repo_id: str, image_token: str) -> str:
        return f"""```js
import {{ AutoProcessor, AutoModelForImageTextToText, load_image }} from '@huggingface/transformers';

const processor = await AutoProcessor.from_pretrained('{repo_id}');
const model = await AutoModelForImageTextToText.from_pretrained('{repo_id}');
const inputs = await processor(await load_image('photo.jpg'), '{image_token}');
const output = await model.generate(inputs);
const answer = output.slice(null, [inputs.input_ids.dims[1], null]);
const [text] = processor.batch_decode(answer, {{ skip_special_tokens: true }});
```"""


class _Driver:
    def __init__(self, sessions: Sessions, image_token_id: int):
        self.sessions = sessions
        self.image_token_id = image_token_id

    def encode(self, pixel_values: np.ndarray) -> list[Observed]:
        outputs = self.sessions.run("vision_encoder", {"pixel_values": pixel_values})
        return [Observed("vision_encoder", "image_features", "image_features", outputs["image_features"])]

    def prefill(self, image_features: np.ndarray, prompt_ids: np.ndarray) -> DecoderRun:
        batch, rows = image_features.shape[:2]
        image_ids = np.full((batch, rows), self.image_token_id, dtype=np.int64)
        embeds = self._embed(np.concatenate([image_ids, prompt_ids], axis=1))
        embeds[:, :rows] = image_features
        return self._decode(embeds, self.sessions.empty_cache(_DECODER, batch))

    def step(self, token_ids: np.ndarray, cache: Arrays, image_features: np.ndarray) -> DecoderRun:
        return self._decode(self._embed(token_ids), cache)

    def _embed(self, token_ids: np.ndarray) -> np.ndarray:
        return self.sessions.run("embed_tokens", {"input_ids": token_ids})["inputs_embeds"]

    def _decode(self, embeds: np.ndarray, cache: Arrays) -> DecoderRun:
        batch, length = embeds.shape[:2]
        past = next(iter(cache.values())).shape[2]
        mask = np.ones((batch, past + length), dtype=np.int64)
        positions = np.broadcast_to(np.arange(past, past + length, dtype=np.int64), (batch, length))
        feeds = {
            "inputs_embeds": embeds,
            "attention_mask": mask,
            "position_ids": positions,
            "num_logits_to_keep": np.array(1, dtype=np.int64),
            **cache,
        }
        return decoder_run(_DECODER, self.sessions.run(_DECODER, feeds))


LAYOUT = Chat()
