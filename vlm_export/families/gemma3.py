"""Gemma 3 of 4B and more: SigLIP, pooling, Gemma 3, tokens of one image seeing one another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from vlm_export.errors import InputError
from vlm_export.families import _square
from vlm_export.families._chat import chat_family
from vlm_export.layouts.gemma import Gemma3Chat, whole_pictures
from vlm_export.models.chat import load_config
from vlm_export.models.marked_rows import marked_text_components
from vlm_export.preprocessing import ChatProcessor, check_image_size
from vlm_export.spec.family import About, Config, Layout
from vlm_export.spec.graph import Component


def image_size(config: Config) -> int:
    """Pixels of an image's side."""
    return int(load_config(config).vision_config.image_size)


def image_tokens(config: Config) -> int:
    """Rows of features of an image, of which a square is made."""
    return int(load_config(config).mm_tokens_per_image ** 0.5) ** 2


class Reference(_square.WholeCacheReference):
    """A reference whose class is told which tokens are an image's: their kind is 1.

    Tokens are numbered from 1, as transformers.js does: what attention computes depends on differences alone, but the
    rotated keys in the cache do not. `generate` numbers them from 0.
    """

    def arguments(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`inputs`, and what its own processor makes beside them."""
        return {**inputs, "token_type_ids": (inputs["input_ids"] == self.model.config.image_token_id).long()}

    def prefill(self, inputs: Mapping[str, Tensor]) -> Any:
        """As of `ChatReference`."""
        return super().prefill({**inputs, "position_ids": numbered(0, inputs["input_ids"])})

    def step(self, token_ids: Tensor, past: Any, inputs: Mapping[str, Tensor]) -> Any:
        """As of `ChatReference`."""
        places = numbered(past.get_seq_length(), token_ids)
        return self.model(input_ids=token_ids, position_ids=places, past_key_values=past, use_cache=True)


def numbered(before: int, token_ids: Tensor) -> Tensor:
    """`[batch, tokens] int64`: the numbers of tokens behind so many others, the first of all 1."""
    return torch.arange(before + 1, before + 1 + token_ids.shape[1]).expand_as(token_ids)


def preprocessor(folder: Path, config: Config, settings: Mapping[str, Any]) -> ChatProcessor:
    """The model's own processor, without crops.

    Raises:
        InputError: the settings make images of another size than the tower's.
    """
    check_image_size(settings, image_size(config))
    return ChatProcessor(
        folder,
        whole_pictures(settings),
        _square.INPUT_DTYPES,
        processor_class="Gemma3Processor",
        image_seq_length=image_tokens(config),
    )


def components(config: Config) -> tuple[Component, ...]:
    """The graphs. Of a cap for logits the class knows nothing.

    Raises:
        InputError: a text model that sees later tokens of texts too.
    """
    if load_config(config).get_text_config().use_bidirectional_attention:
        raise InputError("config.json: text_config.use_bidirectional_attention: true: no such model writes texts")
    encoded = _square.vision_encoder(config, image_size(config), image_tokens(config))
    return encoded, *marked_text_components(config, "model.language_model")


def sample_inputs(config: Config, generator: Generator) -> dict[str, Tensor]:
    """`pixel_values` `[1, 3, size, size]` and `input_ids` `[1, rows + 8]`."""
    return _square.sample_inputs(config, generator, image_size(config), image_tokens(config))


FAMILY = chat_family(
    "gemma3",
    About(
        summary="Gemma 3 of 4B and more: SigLIP, pooling, Gemma 3",
        since="0.1.0",
        towers=("siglip_vision_model",),
        decoders=("gemma3_text",),
        notes=(
            "Tokens of an image see one another, as the model was trained: `embed_tokens` writes a column more, which "
            "says what is an image's, since transformers.js feeds no kinds of tokens. A repo whose attention is causal "
            "throughout gives other answers: `verify` tells.",
            "One square an image, as transformers makes it by default; no crops (`do_pan_and_scan`).",
            "The 1B has no tower, and is none of these.",
        ),
    ),
    sample_inputs=sample_inputs,
    reference=lambda model: Reference(model, image_tokens(model.config.to_dict())),
    preprocessor=preprocessor,
    layout=Layout(components, Gemma3Chat(image_tokens)),
)
