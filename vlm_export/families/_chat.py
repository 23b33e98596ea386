"""What families have in common whose model is a vision-language class of transformers' own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from vlm_export.layouts.single import Single
from vlm_export.models.chat import load_config, text_config
from vlm_export.models.library import library_names, without_weights
from vlm_export.spec.family import (
    About,
    Config,
    Family,
    Layout,
    MakePreprocessor,
    MakeReference,
    Rename,
    SampleInputs,
    Trim,
)

_TEXT = {"input_ids", "attention_mask", "token_type_ids"}
_UNUSED = re.compile(r".*\.(position_ids|rotary_emb\.inv_freq|num_batches_tracked)$")
_PROJECTOR = re.compile(r".*\bmm_projector\.(?P<index>\d+)\.")  # an MLP, a GELU between two layers


def build(config: Config) -> PreTrainedModel:
    """The model of a config, uninitialised, by `AutoModelForImageTextToText`."""
    return AutoModelForImageTextToText.from_config(load_config(config))


def rename(key: str) -> str | None:
    """Drops what checkpoints of older transformers carry and inference never reads; names LLaVA's own projector."""
    return None if _UNUSED.match(key) else _PROJECTOR.sub(_of_transformers, key)


def _of_transformers(key: re.Match[str]) -> str:
    return f"multi_modal_projector.linear_{int(key['index']) // 2 + 1}."


def sample_ids(config: Config, image_tokens: int, generator: Generator) -> Tensor:
    """`[1, image_tokens + 8] int64`: image tokens, then random ids of others."""
    loaded = load_config(config)
    ids = torch.randint(loaded.get_text_config().vocab_size - 1, (1, 8), generator=generator)
    ids += ids >= loaded.image_token_id
    return torch.cat([torch.full((1, image_tokens), loaded.image_token_id), ids], dim=1)


@dataclass(frozen=True)
class ChatReference:
    """The class's own forward and `generate`; `image_tokens` are the rows that one image or tile becomes."""

    model: Any
    image_tokens: int

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`image_features` `[images or tiles, image_tokens, hidden] float32`, by the class's `get_image_features`."""
        images = {name: value for name, value in self.arguments(inputs).items() if name not in _TEXT}
        rows = torch.cat([*self.model.get_image_features(**images, return_dict=True).pooler_output])
        return {"image_features": rows.reshape(-1, self.image_tokens, rows.shape[-1])}

    def prefill(self, inputs: Mapping[str, Tensor]) -> Any:
        """The class's output for prompt and images: `logits` `[batch, tokens, vocabulary] float32`, and the cache."""
        return self.model(**self.arguments(inputs), use_cache=True)

    def step(self, token_ids: Tensor, past: Any, inputs: Mapping[str, Tensor]) -> Any:
        """The class's output for `[batch, 1] int64` after the cache `past`; the images are in the cache."""
        return self.model(input_ids=token_ids, past_key_values=past, use_cache=True)

    def generate(self, inputs: Mapping[str, Tensor], **options: Any) -> Any:
        """The class's own `generate` on `inputs`."""
        return self.model.generate(**self.arguments(inputs), **options)

    def arguments(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`inputs` as the keyword arguments that the class is called with."""
        return dict(inputs)


def chat_family(
    model_type: str,
    about: About,
    *,
    sample_inputs: SampleInputs,
    reference: MakeReference,
    preprocessor: MakePreprocessor,
    layout: Layout,
    build: Callable[[Config], PreTrainedModel] = build,
    trim: Trim = lambda model: None,
    joins: bool = False,
) -> Family:
    """A family whose model is a class of transformers' own; `layout` is its `chat`, and what `single` joins.

    It does not where a token's place has several axes: the loop counts along one.
    """
    layouts = {"chat": layout}
    if joins:
        layouts["single"] = Layout(layout.components, Single(layout.client), joins="chat")

    def rename_in(config: Config) -> Rename:
        """The library's own translation of tensor names, for the class of a config."""
        with without_weights():
            return library_names(build(config))

    return Family(
        model_type=model_type,
        about=about,
        build=build,
        rename=rename,
        rename_in=rename_in,
        embedded_lora=lambda config: None,
        merged_config=dict,
        text_config=text_config,
        sample_inputs=sample_inputs,
        reference=reference,
        preprocessor=preprocessor,
        layouts=layouts,
        trim=trim,
        remote_code=True,
    )
