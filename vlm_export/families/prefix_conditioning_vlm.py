"""Prefix-conditioning captioners (distilvit2): a frozen tower, a projection, and a decoder with LoRA after them.

Checkpoints hold one `config.json` and one state dict in which PEFT's wrapping of the language model shows:
`language_model.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight`, `….lora_A.default.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache

from vlm_export.layouts.prefix_captioner import PrefixCaptioner
from vlm_export.layouts.prefix_chat import PrefixChat
from vlm_export.layouts.prefix_components import PrefixComponents
from vlm_export.layouts.single import Single
from vlm_export.models import decoder, towers
from vlm_export.models.prefix import PrefixConditioningVLM, nested_config
from vlm_export.preprocessing import PixelsAndPrompt, check_image_size
from vlm_export.spec.family import About, Config, EmbeddedLora, Family, Layout, Rename
from vlm_export.spec.graph import Component, TensorSpec

# What a checkpoint may carry and inference never reads: buffers of older transformers.
_UNUSED = re.compile(
    r".*\.(position_ids|rotary_emb\.inv_freq|attn\.masked_bias)$|language_model\..*\.h\.\d+\.attn\.bias$"
)
_TOWER = "vision_encoder."
_LORA_KEYS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")


def rename(key: str) -> str | None:
    """A checkpoint's key → the key in transformers 5's module tree, or None when inference does not use the tensor."""
    if _UNUSED.match(key):
        return None
    key = key.replace("vision_encoder.vision_model.", "vision_encoder.", 1)
    key = key.replace("language_model.base_model.model.", "language_model.", 1)
    return key.replace(".base_layer.", ".")


def rename_in(config: Config) -> Rename:
    """The tower's part of the translation, which depends on its kind: poolers and heads are not used."""
    names = towers.tower_names(config["vision_config"])

    def name(key: str) -> str | None:
        if not key.startswith(_TOWER):
            return key
        inner = names(key.removeprefix(_TOWER))
        return None if inner is None else _TOWER + inner

    return name


def embedded_lora(config: Config) -> EmbeddedLora | None:
    """The rank and alpha in a checkpoint's `config.json`, by distilvit2's names; None for one without LoRA."""
    if not {"lora_r", "lora_alpha"} <= config.keys():
        return None
    return EmbeddedLora(r=config["lora_r"], alpha=config["lora_alpha"])


def merged_config(config: Config) -> dict[str, Any]:
    """The checkpoint's config without its LoRA settings."""
    return {key: value for key, value in config.items() if key not in _LORA_KEYS}


def text_config(config: Config) -> PretrainedConfig:
    """The transformers config of `text_config`, the language model's."""
    return nested_config(config["text_config"])


def sample_inputs(config: Config, generator: Generator) -> dict[str, Tensor]:
    """`pixel_values` `[1, 3, size, size]` and `input_ids` `[1, 8]`."""
    size = config["vision_config"]["image_size"]
    pixel_values = torch.rand(1, 3, size, size, generator=generator) * 2 - 1
    input_ids = torch.randint(config["text_config"]["vocab_size"], (1, 8), generator=generator)
    return {"pixel_values": pixel_values, "input_ids": input_ids}


class Reference:
    """The tower, the projection and the decoder of our own module: transformers has no class for these models.

    The decoder continues the projected patches and the prompt.
    """

    def __init__(self, model: PrefixConditioningVLM):
        self.model = model
        self.language_model: Any = model.language_model

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`vision_features` `[batch, rows, vision hidden]` and `image_features` `[batch, rows, text hidden]`, float32.

        They are the outputs of the tower and of the projection.
        """
        vision_features = self.model.vision_encoder(inputs["pixel_values"]).last_hidden_state
        return {"vision_features": vision_features, "image_features": self.model.projection(vision_features)}

    def prefill(self, inputs: Mapping[str, Tensor]) -> Any:
        """The decoder's output for the prefix and the prompt behind it.

        Its `logits` are `[batch, rows + tokens, vocabulary] float32`; no position of its cache is ever dropped.
        """
        cache = DynamicCache()  # the model's own would forget what is outside a layer's window
        return self.language_model(inputs_embeds=self._embeds(inputs), past_key_values=cache, use_cache=True)

    def step(self, token_ids: Tensor, past: Any, inputs: Mapping[str, Tensor]) -> Any:
        """The decoder's output for `[batch, 1] int64` after the cache `past`."""
        return self.language_model(input_ids=token_ids, past_key_values=past, use_cache=True)

    def generate(self, inputs: Mapping[str, Tensor], **options: Any) -> Any:
        """The decoder's `generate` from embeddings: its `sequences` hold the new tokens alone."""
        embeds = self._embeds(inputs)
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **options)

    def _embeds(self, inputs: Mapping[str, Tensor]) -> Tensor:
        prompt = self.language_model.get_input_embeddings()(inputs["input_ids"])
        return torch.cat([self.encode(inputs)["image_features"], prompt], dim=1)


def preprocessor(folder: Path, config: Config, settings: Mapping[str, Any]) -> PixelsAndPrompt:
    """Feeds the tower's square images, and the prompt's ids without special tokens."""
    check_image_size(settings, config["vision_config"]["image_size"])
    return PixelsAndPrompt(folder, settings)


def image_tokens(config: Config) -> int:
    """Rows of `image_features` for one image: all of the tower's last hidden state."""
    return towers.image_tokens(config["vision_config"])


def image_processor(config: Config) -> dict[str, Any]:
    """`preprocessor_config.json` for a checkpoint without one: that of the tower's published model."""
    return towers.image_processor(config["vision_config"])


class Encoder(nn.Module):
    """Tower and projection, with the model's own attribute names; either may be left out."""

    def __init__(self, vision_encoder: nn.Module | None, projection: nn.Module | None):
        super().__init__()
        self.vision_encoder = vision_encoder
        self.projection = projection

    def forward(self, features: Tensor) -> Tensor:
        """`[batch, 3, H, W]` → `[batch, rows, hidden]`.

        Without the tower it takes what the tower gives, `[batch, rows, vision hidden]`.
        """
        if self.vision_encoder is not None:
            features = self.vision_encoder(features).last_hidden_state
        return features if self.projection is None else self.projection(features)


def _geometry(config: Config) -> decoder.Geometry:
    return decoder.Geometry.of(text_config(config))


def _pixels(config: Config) -> TensorSpec:
    size = config["vision_config"]["image_size"]
    return TensorSpec("pixel_values", "float32", ("batch_size", 3, size, size))


def _features(name: str, config: Config, hidden: int) -> TensorSpec:
    return TensorSpec(name, "float32", ("batch_size", image_tokens(config), hidden))


def _image_encoder(name: str, output: str, config: Config) -> Component:
    return Component(
        name=name,
        module=lambda model: Encoder(model.vision_encoder, model.projection),
        inputs=(_pixels(config),),
        outputs=(_features(output, config, _geometry(config).hidden),),
    )


def captioner(config: Config) -> tuple[Component, ...]:
    """The graphs of `captioner`: `encoder_model`, and a decoder that puts the prefix in the start token's place."""
    geometry = _geometry(config)
    return _image_encoder("encoder_model", "last_hidden_state", config), decoder.captioner_decoder(geometry)


def chat(config: Config) -> tuple[Component, ...]:
    """The graphs of `chat`: `vision_encoder`, `embed_tokens` and `decoder_model_merged`, as of a llava."""
    geometry = _geometry(config)
    encoder = _image_encoder("vision_encoder", "image_features", config)
    return encoder, decoder.embed_tokens(geometry), decoder.chat_decoder(geometry)


def components(config: Config) -> tuple[Component, ...]:
    """The graphs of `components`, one a building block: those that `layouts/prefix_components.py` describes."""
    geometry = _geometry(config)
    features = _features("last_hidden_state", config, towers.tower_config(config["vision_config"]).hidden_size)
    prefix = _features("projected_prefix", config, geometry.hidden)
    return (
        Component("vision_encoder", lambda model: Encoder(model.vision_encoder, None), (_pixels(config),), (features,)),
        Component("projection", lambda model: Encoder(None, model.projection), (features,), (prefix,)),
        decoder.prefix_init(geometry),
        decoder.embed_tokens(geometry),
        decoder.plain_decoder(geometry),
    )


ABOUT = About(
    summary="captioners in the format of distilvit2: a tower, a linear or MLP projection, and a causal decoder that "
    "continues the projected features",
    since="0.1.0",
    towers=("siglip_vision_model", "clip_vision_model", "vit", "dinov2", "dinov2_with_registers"),
    decoders=(
        "llama",
        "gpt2",
        "smollm3",
        "opt",
        "qwen2",
        "qwen3",
        "phi3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "seed_oss",
    ),
    notes=(
        "All of the tower's last hidden state is the prefix, class and register tokens included.",
        "Of other causal decoders, those that transformers calls through its attention interface are fused; those that "
        "transformers.js does not know by name are published as a Llama of as many layers.",
        "No SigLIP 2 that takes any number of patches (`siglip2_vision_model`); one of a fixed resolution is a "
        "`siglip_vision_model`.",
    ),
)
FAMILY = Family(
    model_type="prefix_conditioning_vlm",
    about=ABOUT,
    build=PrefixConditioningVLM,
    rename=rename,
    rename_in=rename_in,
    embedded_lora=embedded_lora,
    merged_config=merged_config,
    text_config=text_config,
    sample_inputs=sample_inputs,
    reference=Reference,
    preprocessor=preprocessor,
    layouts={
        "captioner": Layout(captioner, PrefixCaptioner()),
        "chat": Layout(chat, PrefixChat(image_tokens)),
        "components": Layout(components, PrefixComponents()),
        "single": Layout(captioner, Single(PrefixCaptioner()), joins="captioner"),
    },
    image_processor=image_processor,
    adapter_roots=("", "language_model."),
    begins_with_ids=False,
)
