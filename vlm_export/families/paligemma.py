"""PaliGemma 1 and 2: SigLIP, a linear layer, Gemma or Gemma 2, each token of a prompt seeing all of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from vlm_export.families import _square
from vlm_export.families._chat import chat_family
from vlm_export.layouts.gemma import PaliGemmaChat
from vlm_export.models.chat import WholePromptDecoder, load_config, text_components
from vlm_export.preprocessing import ChatProcessor, check_image_size
from vlm_export.spec.family import About, Config, Layout
from vlm_export.spec.graph import Component


def image_size(config: Config) -> int:
    """Pixels of an image's side."""
    return int(load_config(config).vision_config.image_size)


def image_tokens(config: Config) -> int:
    """Rows of features of an image."""
    return int((image_size(config) // load_config(config).vision_config.patch_size) ** 2)


class Reference(_square.WholeCacheReference):
    """A reference whose class is told that all of a prompt is prefix: its kinds of tokens are 0."""

    def arguments(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`inputs`, and what its own processor makes beside them."""
        return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


class Processor(ChatProcessor):
    """Conversations by a template that checkpoints lack."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.processor.chat_template = self.processor.chat_template or PaliGemmaChat.chat_template


def preprocessor(folder: Path, config: Config, settings: Mapping[str, Any]) -> Processor:
    """The model's own processor.

    Raises:
        InputError: the settings make images of another size than the tower's.
    """
    check_image_size(settings, image_size(config))
    settings = {**settings, "image_seq_length": image_tokens(config)}
    return Processor(folder, settings, _square.INPUT_DTYPES, processor_class="PaliGemmaProcessor")


def components(config: Config) -> tuple[Component, ...]:
    """The graphs. The class caps logits, where the text model's config has a cap."""
    cap = getattr(load_config(config).get_text_config(), "final_logit_softcapping", None)

    def decoder(model: Any, path: str) -> WholePromptDecoder:
        return WholePromptDecoder(model, path, cap)

    encoded = _square.vision_encoder(config, image_size(config), image_tokens(config))
    return encoded, *text_components(config, "model.language_model", decoder=decoder)


def sample_inputs(config: Config, generator: Generator) -> dict[str, Tensor]:
    """`pixel_values` `[1, 3, size, size]` and `input_ids` `[1, rows + 8]`."""
    return _square.sample_inputs(config, generator, image_size(config), image_tokens(config))


FAMILY = chat_family(
    "paligemma",
    About(
        summary="PaliGemma and PaliGemma 2: SigLIP, a linear layer, Gemma or Gemma 2",
        since="0.1.0",
        towers=("siglip_vision_model",),
        decoders=("gemma", "gemma2"),
        notes=(
            "Each token of a prompt sees all of it, image and text, as the model was trained; tokens of the answer see "
            "what is before them. A repo whose attention is causal throughout, such as one made with "
            "GroupQueryAttention, gives other answers: `verify` tells.",
            "One prompt, one answer: what a further turn adds, the tokens in a cache have not seen. `run`, `chat` and "
            "`serve` run a conversation anew for each turn; stock transformers.js does so unless it is given a cache.",
            "The published tokenizer adds no token that begins a text: the processor writes it behind the images.",
        ),
    ),
    sample_inputs=sample_inputs,
    reference=lambda model: Reference(model, image_tokens(model.config.to_dict())),
    preprocessor=preprocessor,
    layout=Layout(components, PaliGemmaChat(image_tokens)),
)
