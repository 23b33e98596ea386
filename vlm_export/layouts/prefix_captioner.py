"""captioner of a prefix-conditioning model: a `vision-encoder-decoder` for the pipeline 'image-to-text'.

The class feeds `input_ids` and `encoder_hidden_states` at every step; the decoder graph itself puts the image prefix in
the place of the start token when the past is empty. The start token is the image token: never eos, which a repetition
penalty would then suppress, and special, so that decoding drops it.
"""

from __future__ import annotations

from typing import Any

from vlm_export.contract import PREFIX
from vlm_export.layouts.captioner import Captioner
from vlm_export.layouts.prefix_chat import CHAT_TEMPLATE, IMAGE_TOKEN
from vlm_export.layouts.text_models import known_text_config
from vlm_export.spec.client import RepoFacts, generation_config


class PrefixCaptioner(Captioner):
    """The client of `captioner`, with the image token as the start token."""

    own_token = IMAGE_TOKEN
    chat_template = CHAT_TEMPLATE

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """`config.json` of a `vision-encoder-decoder` made up around the model, and `generation_config.json`."""
        start = facts.first_unused_token_id
        config = {
            "model_type": "vision-encoder-decoder",
            "architectures": ["VisionEncoderDecoderModel"],
            "is_encoder_decoder": True,
            "encoder": dict(facts.config["vision_config"]),
            "decoder": {**known_text_config(facts.text_config), "decoder_start_token_id": start},
            "decoder_start_token_id": start,
            "pad_token_id": facts.pad_token_id,
            PREFIX: True,
        }
        return {
            "config.json": config,
            "generation_config.json": generation_config(facts, decoder_start_token_id=start),
        }
