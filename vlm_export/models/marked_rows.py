"""Rows that say which of them are of an image: embeddings with a column more than features have.

transformers.js feeds a decoder no kinds of tokens. But it writes a row of features over the *beginning* of a row of
embeddings (4.3.1, `default_merge_input_ids_with_features` in `src/models/modeling_utils.js`), so that what
`embed_tokens` writes behind the embedding stays: 1 for the image token, 0 for text.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlm_export.errors import InputError
from vlm_export.models.blocks import Blocks, runs
from vlm_export.models.chat import ChatDecoder, ChatEmbedding, load_config, text_config
from vlm_export.models.decoder import Geometry, chat_decoder, embed_tokens
from vlm_export.spec.family import Config
from vlm_export.spec.graph import Component


class MarkedEmbedding(ChatEmbedding):
    """Token ids `[B, S]` → `[B, S, H + 1]`: the embedding, and whether it is the image token."""

    def __init__(self, model: PreTrainedModel, path: str, image_token_id: int):
        super().__init__(model, path)
        self.image_token_id = image_token_id

    def forward(self, token_ids: Tensor) -> Tensor:
        """Look the ids up, and mark those of images."""
        embedding = super().forward(token_ids)
        marks = (token_ids == self.image_token_id).to(embedding.dtype)
        return torch.cat([embedding, marks[..., None]], dim=-1)


class MarkedDecoder(ChatDecoder):
    """A text model on rows `[B, S, H + 1]`, in which tokens of one image see one another."""

    def blocks(self, inputs_embeds: Tensor, past: int) -> tuple[Tensor, Blocks]:
        """The embeddings, and each image as a block."""
        return inputs_embeds[..., :-1], runs(inputs_embeds[..., -1] > 0.5)


def marked_text_components(config: Config, path: str) -> tuple[Component, Component]:
    """`embed_tokens` and `decoder_model_merged` of a class whose text model, at `path`, sees an image as a whole.

    Raises:
        InputError: the image token has no row in the table, so that it could not be told from another.
    """
    geometry, image_token_id = Geometry.of(text_config(config)), int(load_config(config).image_token_id)
    if image_token_id >= geometry.vocabulary:
        raise InputError(
            f"config.json: image_token_id: {image_token_id} has no row in the table of {geometry.vocabulary}"
        )
    marked = replace(geometry, hidden=geometry.hidden + 1)
    return (
        embed_tokens(marked, lambda model: MarkedEmbedding(model, path, image_token_id)),
        chat_decoder(marked, lambda model: MarkedDecoder(model, path)),
    )
