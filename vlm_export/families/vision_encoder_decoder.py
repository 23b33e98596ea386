"""Vision encoder-decoders: any tower of transformers, and a text decoder that looks at it through cross-attention.

Checkpoints are what `VisionEncoderDecoderModel.save_pretrained` writes: `encoder.…`, `decoder.…`, and `enc_to_dec_proj`
where the two differ in width and the decoder's cross-attention does not take the encoder's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel

from vlm_export.errors import InputError
from vlm_export.layouts.encoder_decoder import EncoderDecoder
from vlm_export.layouts.single import Single
from vlm_export.models.cross_decoder import cross_decoder
from vlm_export.models.decoder import Geometry
from vlm_export.models.library import library_names
from vlm_export.preprocessing import PixelsAndPrompt, stored_generation
from vlm_export.spec.family import About, Config, Family, Layout, Rename
from vlm_export.spec.graph import Component, TensorSpec

# What a checkpoint may carry and inference never reads: poolers, and buffers of older transformers.
_UNUSED = re.compile(
    r"encoder\.(vision_model\.)?(pooler|head)\.|encoder\..*relative_position_index$|.*\.(position_ids|token_type_ids)$"
    r"|decoder\..*\.h\.\d+\.(attn|crossattention)\.(bias|masked_bias)$|decoder\..*\.(_float_tensor|version)$"
)


def rename(key: str) -> str | None:
    """The key, or None when inference does not use the tensor."""
    return None if _UNUSED.match(key) else key


def rename_in(config: Config) -> Rename:
    """Translates to today's the names that tower and decoder had before transformers 5, which still saves those."""
    with torch.device("meta"):
        return library_names(build(dict(config)))


def model_config(config: Config) -> VisionEncoderDecoderConfig:
    """The config of the model; a SigLIP tower loses its pooling head, since a decoder looks at the patches."""
    values = deepcopy(dict(config))
    if str(values["encoder"].get("model_type")).startswith("siglip"):
        values["encoder"]["vision_use_head"] = False
    values["decoder"] |= {"is_decoder": True, "add_cross_attention": True}
    return VisionEncoderDecoderConfig(**values)


def build(config: dict[str, Any]) -> VisionEncoderDecoderModel:
    """The `VisionEncoderDecoderModel` of a config, without the tower's pooler, which no decoder reads."""
    model = VisionEncoderDecoderModel(model_config(config))
    model.encoder.pooler = None
    return model


def text_config(config: Config) -> PretrainedConfig:
    """The decoder's config, with the special tokens that the whole model's config gives."""
    decoder: Any = model_config(config).decoder
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if config.get(name) is not None:
            setattr(decoder, name, config[name])
    return decoder


def start_token_id(config: Config, generation: Mapping[str, Any]) -> int:
    """The id that every text begins with, which transformers looks for in all these places.

    Raises:
        InputError: it is in none of them.
    """
    sources = (generation, config, config["decoder"])
    for name in ("decoder_start_token_id", "bos_token_id"):
        for source in sources:
            if source.get(name) is not None:
                return int(source[name])
    raise InputError("config.json: decoder_start_token_id: not set, so no text could begin; set it as in training")


def sample_inputs(config: Config, generator: Generator) -> dict[str, Tensor]:
    """`pixel_values` `[1, 3, height, width]` and `input_ids` `[1, 8]`."""
    pixel_values = torch.rand(1, 3, *_image_size(config), generator=generator) * 2 - 1
    input_ids = torch.randint(text_config(config).vocab_size, (1, 8), generator=generator)
    return {"pixel_values": pixel_values, "input_ids": input_ids}


class Reference:
    """The model of transformers; `input_ids` begin with the start token."""

    def __init__(self, model: Any):
        self.model = model
        model.generation_config = GenerationConfig()  # older configs hold rules of generation, which the recipe gives

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`encoder_hidden_states` `[batch, rows, width] float32`: what transformers' forward hands to the decoder."""
        stages: dict[str, Tensor] = {}

        def keep(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            stages["encoder_hidden_states"] = keywords["encoder_hidden_states"]

        with self.model.decoder.register_forward_pre_hook(keep, with_kwargs=True):
            self.prefill(inputs)
        return stages

    def prefill(self, inputs: Mapping[str, Tensor]) -> Any:
        """The model's output for `input_ids`: `logits` `[batch, tokens, vocabulary] float32`, and the cache."""
        return self._run(inputs["input_ids"], None, inputs)

    def step(self, token_ids: Tensor, past: Any, inputs: Mapping[str, Tensor]) -> Any:
        """The model's output for `[batch, 1] int64` after the cache `past`; the tower runs again."""
        return self._run(token_ids, past, inputs)

    def generate(self, inputs: Mapping[str, Tensor], **options: Any) -> Any:
        """The model's `generate`, told that `input_ids` are decoder ids and that their first one starts a text."""
        ids = inputs["input_ids"]
        start = int(ids[0, 0])
        return self.model.generate(
            inputs["pixel_values"], decoder_input_ids=ids, decoder_start_token_id=start, **options
        )

    def _run(self, ids: Tensor, past: Any, inputs: Mapping[str, Tensor]) -> Any:
        return self.model(
            pixel_values=inputs["pixel_values"], decoder_input_ids=ids, past_key_values=past, use_cache=True
        )


class PixelsAndStart(PixelsAndPrompt):
    """Puts the start token before a text."""

    def __init__(self, folder: Path, config: Config, settings: Mapping[str, Any]):
        super().__init__(folder, settings)
        self.start = start_token_id(config, stored_generation(folder))

    def model_inputs(self, image: Path, text: str) -> dict[str, np.ndarray]:
        """`pixel_values` `[1, 3, H, W] float32`, and `input_ids` `[1, 1 + tokens] int64`, the start token first."""
        inputs = super().model_inputs(image, text)
        start = np.array([[self.start]], dtype=np.int64)
        return inputs | {"input_ids": np.concatenate([start, inputs["input_ids"]], axis=1)}


class Encoder(nn.Module):
    """Tower and, if there is one, the projection to the decoder's width, with the model's own attribute names."""

    def __init__(self, model: Any):
        super().__init__()
        self.encoder = model.encoder
        self.enc_to_dec_proj = getattr(model, "enc_to_dec_proj", None)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[batch, 3, H, W]` → the states that the decoder looks at, `[batch, rows, width]`."""
        states = self.encoder(pixel_values).last_hidden_state
        return states if self.enc_to_dec_proj is None else self.enc_to_dec_proj(states)


def _geometry(config: Config) -> Geometry:
    """The decoder's sizes. Bart's kin have two of most, their own and an encoder's that is not there."""
    decoder = text_config(config)
    heads = getattr(decoder, "decoder_attention_heads", None) or decoder.num_attention_heads
    return Geometry.alike(
        getattr(decoder, "decoder_layers", None) or decoder.num_hidden_layers,
        kv_heads=heads,
        head_dim=decoder.hidden_size // heads,
        hidden=decoder.hidden_size,
        vocabulary=decoder.vocab_size,
    )


def _image_size(config: Config) -> tuple[int, int]:
    size = config["encoder"]["image_size"]
    return (size, size) if isinstance(size, int) else tuple(size)


@cache
def _states_shape(config_json: str) -> tuple[int, int]:
    """Rows and width of what the encoder gives for one image: found by running it without weights."""
    config = json.loads(config_json)
    with torch.device("meta"):
        states = Encoder(build(config).eval())(torch.empty(1, 3, *_image_size(config)))
    return states.shape[1], states.shape[2]


def captioner(config: Config) -> tuple[Component, ...]:
    """The graphs of `captioner`: `encoder_model`, and `decoder_model_merged` with cross-attention."""
    rows, width = _states_shape(json.dumps(config, sort_keys=True))
    encoder = Component(
        name="encoder_model",
        module=Encoder,
        inputs=(TensorSpec("pixel_values", "float32", ("batch_size", 3, *_image_size(config))),),
        outputs=(TensorSpec("last_hidden_state", "float32", ("batch_size", rows, width)),),
    )
    return encoder, cross_decoder(_geometry(config), width)


ABOUT = About(
    summary="any tower of transformers, and a text decoder that looks at it through cross-attention: ViT-GPT2, TrOCR",
    since="0.1.0",
    towers=("vit", "deit", "siglip_vision_model", "swin"),
    decoders=("gpt2", "bert", "roberta", "trocr", "mbart"),
)
_CLIENT = EncoderDecoder(_geometry, start_token_id)
FAMILY = Family(
    model_type="vision-encoder-decoder",
    about=ABOUT,
    build=build,
    rename=rename,
    rename_in=rename_in,
    embedded_lora=lambda config: None,
    merged_config=dict,
    text_config=text_config,
    sample_inputs=sample_inputs,
    reference=Reference,
    preprocessor=PixelsAndStart,
    layouts={
        "captioner": Layout(captioner, _CLIENT),
        "single": Layout(captioner, Single(_CLIENT), joins="captioner"),
    },
)
