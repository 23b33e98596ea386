"""captioner of an encoder-decoder: transformers.js's own class for it, loaded by the pipeline 'image-to-text'.

transformers.js takes nothing from the decoder's config but the names of its cache, and knows few decoders that can have
cross-attention. Every decoder is therefore called TrOCR there: the names are then `past_key_values.0.decoder.key`,
`past_key_values.0.encoder.key` and so on, and what the first run gives for `.encoder.` is kept for the runs after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vlm_export.layouts.captioner import Captioner
from vlm_export.models.decoder import Geometry
from vlm_export.spec.client import RepoFacts, generation_config


class EncoderDecoder(Captioner):
    """A client whose decoder goes by TrOCR's name.

    `geometry` gives the decoder's sizes under a config, `start_token_id` the first id under it and a stored
    `generation_config.json`.
    """

    def __init__(
        self,
        geometry: Callable[[Mapping[str, Any]], Geometry],
        start_token_id: Callable[[Mapping[str, Any], Mapping[str, Any]], int],
    ):
        self.geometry = geometry
        self.start_token_id = start_token_id

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """`config.json` with a `trocr` of the decoder's sizes, and `generation_config.json` with the start token."""
        geometry = self.geometry(facts.config)
        decoder = {
            "model_type": "trocr",
            "architectures": facts.config["decoder"].get("architectures"),
            "d_model": geometry.hidden,
            "decoder_layers": geometry.layers,
            "decoder_attention_heads": geometry.pairs.kv_heads,
            "vocab_size": geometry.vocabulary,
            **_positions(facts.text_config),
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


def _positions(decoder: Mapping[str, Any]) -> dict[str, int]:
    """How many tokens the decoder has positions for, as `max_position_embeddings`, if its config says so.

    RoBERTa counts from behind the id that pads: its table has as many rows more.
    """
    found = next((decoder[name] for name in ("max_position_embeddings", "n_positions") if decoder.get(name)), None)
    if not isinstance(found, int):
        return {}
    before = decoder.get("pad_token_id", 1) + 1 if decoder.get("model_type") == "roberta" else 0
    return {"max_position_embeddings": found - before}
