"""chat: `AutoProcessor` and `AutoModelForImageTextToText` of transformers.js, for the classes derived from its llava.

Such a class runs `embed_tokens` on the prompt, writes the images' features over the rows of image tokens, and feeds
embeddings, mask and positions to the decoder.
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
    Sessions,
    decoder_run,
)

_DECODER = "decoder_model_merged"
_NO_GRID = 1 << 16  # pixels: a patch larger than any image


class Chat(Client):
    """What such classes share: how they are loaded and driven. Their config files differ.

    `call` is how the processor takes an image and a text, `question` an example of one.
    """

    name = "AutoModelForImageTextToText"
    node: Literal["chat"] = "chat"
    call = "image, text"
    question = "What is in this image?"

    def driver(self, sessions: Sessions, files: Mapping[str, dict[str, Any]]) -> ChatDriver:
        return ChatDriver(sessions, files["config.json"]["image_token_id"])

    def snippet(self, repo_id: str) -> str:
        return f"""```js
import {{ AutoProcessor, AutoModelForImageTextToText, load_image }} from '@huggingface/transformers';

const processor = await AutoProcessor.from_pretrained('{repo_id}');
const model = await AutoModelForImageTextToText.from_pretrained('{repo_id}');
const content = [{{ type: 'image' }}, {{ type: 'text', text: '{self.question}' }}];
const text = processor.apply_chat_template([{{ role: 'user', content }}], {{ add_generation_prompt: true }});
const image = await load_image('photo.jpg');
const inputs = await processor({self.call});
const output = await model.generate(inputs);
const answer = output.slice(null, [inputs.input_ids.dims[1], null]);
const [said] = processor.batch_decode(answer, {{ skip_special_tokens: true }});
```"""


def llava_processor(image_token: str, image_tokens: int) -> dict[str, Any]:
    """`processor_config.json` of a `LlavaProcessor` that writes `image_tokens` of them for an image of any size.

    It writes floor(size / patch_size)² + num_additional_image_tokens. A patch larger than the image leaves the second
    term alone, which is right for towers and projections of any grid.
    """
    return {
        "processor_class": "LlavaProcessor",
        "image_token": image_token,
        "patch_size": _NO_GRID,
        "num_additional_image_tokens": image_tokens,
    }


class ChatDriver:
    """`vision_encoder`, `embed_tokens` and `decoder_model_merged`."""

    def __init__(self, sessions: Sessions, image_token_id: int):
        self.sessions = sessions
        self.image_token_id = image_token_id

    def encode(self, inputs: Inputs) -> list[Observed]:
        outputs = self.sessions.run("vision_encoder", inputs)
        return [Observed("vision_encoder", "image_features", "image_features", outputs["image_features"])]

    def prefill(self, inputs: Inputs) -> DecoderRun:
        ids = self.ids(inputs)
        embeds = self._embed(ids)
        embeds[ids == self.image_token_id] = inputs["image_features"].reshape(-1, embeds.shape[-1])
        return self._decode(embeds, self.sessions.empty_cache(_DECODER, len(ids)), inputs)

    def step(self, token_ids: np.ndarray, cache: Arrays, inputs: Inputs) -> DecoderRun:
        return self._decode(self._embed(token_ids), cache, inputs)

    def ids(self, inputs: Inputs) -> np.ndarray:
        """The prompt with as many image tokens as there are features."""
        return inputs["input_ids"]

    def seen(self, inputs: Inputs) -> list[int]:
        return self.ids(inputs)[0].tolist()

    def _embed(self, token_ids: np.ndarray) -> np.ndarray:
        return self.sessions.run("embed_tokens", {"input_ids": token_ids})["inputs_embeds"]

    def _decode(self, embeds: np.ndarray, cache: Arrays, inputs: Inputs) -> DecoderRun:
        batch, length = embeds.shape[:2]
        total = next(iter(cache.values())).shape[2] + length
        given = inputs.get("attention_mask", np.ones((batch, 0), dtype=np.int64))
        mask = np.concatenate([given, np.ones((batch, total - given.shape[1]), dtype=np.int64)], axis=1)
        positions = np.where(mask == 0, 1, mask.cumsum(axis=1) - 1)[:, -length:]
        feeds = {
            "inputs_embeds": embeds,
            "attention_mask": mask,
            "position_ids": positions,
            "num_logits_to_keep": np.array(1, dtype=np.int64),
            **cache,
        }
        return decoder_run(_DECODER, self.sessions.run(_DECODER, feeds))
