"""Rows of features that are wider than embeddings: an image's further features, which early layers of a decoder add.

transformers.js writes a row of features over the row of an embedding, whatever their widths are, as long as both have
the same (4.3.1, `default_merge_input_ids_with_features` in `src/models/modeling_utils.js`). So `embed_tokens` gives
rows as wide as those of the tower, zeros behind the embedding, and the decoder takes them apart: what a layer adds is
zero for a text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from vlm_export import patches
from vlm_export.models.chat import ChatDecoder, ChatEmbedding, text_config
from vlm_export.models.decoder import Geometry, chat_decoder, embed_tokens
from vlm_export.spec.family import Config
from vlm_export.spec.graph import Component

_ADD = "_deepstack_process"  # of transformers' text models: adds features to the rows of images


class WideEmbedding(ChatEmbedding):
    """Token ids `[B, S]` → `[B, S, parts · H]`, zeros behind the embedding."""

    def __init__(self, model: PreTrainedModel, path: str, parts: int):
        super().__init__(model, path)
        self.parts = parts

    def forward(self, token_ids: Tensor) -> Tensor:
        """Look the ids up, and make the rows wide."""
        embedding = super().forward(token_ids)
        return functional.pad(embedding, (0, (self.parts - 1) * embedding.shape[-1]))


class WideDecoder(ChatDecoder):
    """A text model on rows `[B, S, parts · H]`, whose first layers add one part each to what they give."""

    def __init__(self, model: PreTrainedModel, path: str, parts: int):
        super().__init__(model, path)
        self.parts = parts

    def logits(self, kept_positions: Tensor, **arguments: Any) -> Tensor:
        """Logits of the kept positions, `[B, kept, V]`."""
        embeds, *deep = arguments.pop("inputs_embeds").chunk(self.parts, dim=-1)
        arguments |= {"inputs_embeds": embeds, "deepstack_visual_embeds": deep}
        with patches.replaced(self.text_model, _ADD, lambda hidden, _, part: hidden + part):
            return super().logits(kept_positions, **arguments)


def wide_text_components(config: Config, path: str, axes: int, parts: int) -> tuple[Component, Component]:
    """`embed_tokens` and `decoder_model_merged` of a class whose text model, at `path`, takes rows of so many parts."""
    geometry = Geometry.of(text_config(config))
    wide = replace(geometry, hidden=parts * geometry.hidden)
    return (
        embed_tokens(wide, lambda model: WideEmbedding(model, path, parts)),
        chat_decoder(wide, lambda model: WideDecoder(model, path, parts), axes),
    )
