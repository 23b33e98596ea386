"""captioner of an encoder-decoder: transformers.js's own class for it, loaded by the pipeline 'image-to-text'.

transformers.js takes nothing from the decoder's config but the names of its cache, and knows few decoders that can have
cross-attention. Every decoder is therefore called TrOCR there: the names are then `past_key_values.0.decoder.key`,
`past_key_values.0.encoder.key` and so on, and what the first run gives for `.encoder.` is kept for the runs after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from vlm_export.decoder import Geometry
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

_DECODER = "decoder_model_merged"
_CROSS = ".encoder."


class EncoderDecoder(Client):
    """`geometry` gives the decoder's sizes under a config, `start_token_id` the first id under it and a stored
    `generation_config.json`.
    """

    name = "pipeline('image-to-text')"
    task = "image-to-text"
    node: Literal["captioner"] = "captioner"

    def __init__(
        self,
        geometry: Callable[[Mapping[str, Any]], Geometry],
        start_token_id: Callable[[Mapping[str, Any], Mapping[str, Any]], int],
    ):
        self.geometry = geometry
        self.start_token_id = start_token_id

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        geometry = self.geometry(facts.config)
        decoder = {
            "model_type": "trocr",
            "architectures": facts.config["decoder"].get("architectures"),
            "d_model": geometry.hidden,
            "decoder_layers": geometry.layers,
            "decoder_attention_heads": geometry.kv_heads,
            "vocab_size": geometry.vocabulary,
        }
        config = {
            "model_type": "vision-encoder-decoder",
            "architectures": ["VisionEncoderDecoderModel"],
            "is_encoder_decoder": True,
            "encoder": dict(facts.config["encoder"]),
            "decoder": decoder,
        }
        start = self.start_token_id(facts.config, facts.stored_generation)
        generation = generation_config(facts, decoder_start_token_id=start)
        return {"config.json": config, "generation_config.json": generation}

    def driver(self, sessions: Sessions, files: Mapping[str, dict[str, Any]]) -> _Driver:
        return _Driver(sessions)

    def snippet(self, repo_id: str) -> str:
        return f"""```js
import {{ pipeline }} from '@huggingface/transformers';

const captioner = await pipeline('image-to-text', '{repo_id}');
const [{{ generated_text }}] = await captioner('photo.jpg');
```"""


class _Driver:
    def __init__(self, sessions: Sessions):
        self.sessions = sessions

    def encode(self, inputs: Inputs) -> list[Observed]:
        states = self.sessions.run("encoder_model", inputs)["last_hidden_state"]
        return [Observed("encoder_model", "last_hidden_state", "encoder_hidden_states", states)]

    def prefill(self, inputs: Inputs) -> DecoderRun:
        ids = inputs["input_ids"]
        return self._run(ids, self.sessions.empty_cache(_DECODER, len(ids)), inputs)

    def step(self, token_ids: np.ndarray, cache: Arrays, inputs: Inputs) -> DecoderRun:
        done = self._run(token_ids, cache, inputs)
        carried = {name: value for name, value in cache.items() if _CROSS in name}
        return DecoderRun(done.component, done.logits, {**done.cache, **carried})

    def seen(self, inputs: Inputs) -> list[int]:
        return list(inputs["input_ids"][0])

    def _run(self, token_ids: np.ndarray, cache: Arrays, inputs: Inputs) -> DecoderRun:
        feeds = {"input_ids": token_ids, "encoder_hidden_states": inputs["encoder_hidden_states"], **cache}
        return decoder_run(_DECODER, self.sessions.run(_DECODER, feeds))
