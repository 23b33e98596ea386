"""FastVLM: a tower of convolutions (FastViT, of timm), a projector, Qwen2. transformers.js knows it as `llava_qwen2`.

The tower takes images of any size; how many rows of features one becomes is left to the numbers in the checkpoint's
`processor_config.json`, which transformers and transformers.js count by in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from transformers import AutoModel, PreTrainedModel

from vlm_export.errors import InputError
from vlm_export.families import _chat
from vlm_export.families._chat import ChatReference, sample_ids
from vlm_export.layouts.chat import Chat
from vlm_export.layouts.text_models import known_text_config
from vlm_export.models.chat import Parts, load_config, text_components
from vlm_export.preprocessing import ChatProcessor
from vlm_export.spec.client import RepoFacts, generation_config
from vlm_export.spec.family import About, Config, Layout
from vlm_export.spec.graph import Component, TensorSpec

_TOWER = "model.vision_tower"
_PROJECTOR = "model.multi_modal_projector"
_STATISTICS = ("running_mean", "running_var")
_SAMPLE_SIZE = 128  # pixels
_INPUT_DTYPES: dict[str, type[np.generic]] = {
    "pixel_values": np.float32,
    "input_ids": np.int64,
    "attention_mask": np.int64,
}


def build(config: Config) -> PreTrainedModel:
    """The class of transformers, with the statistics of batch norms as parameters: they are weights of the checkpoint.

    Raises:
        InputError: timm is missing.
    """
    try:
        model = _chat.build(config)
    except ImportError as error:
        raise InputError(
            "config.json: vision_config: needs timm and torchvision: `pip install 'vlm-export[fastvlm]'`"
        ) from error
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name in _STATISTICS:
                statistics = module.get_buffer(name)
                delattr(module, name)
                module.register_parameter(name, nn.Parameter(statistics, requires_grad=False))
    return model


class Encoder(Parts):
    """`pixel_values` `[images, 3, H, W]` → `image_features` `[images, rows, hidden]`."""

    def __init__(self, model: Any):
        super().__init__(model, (_TOWER, _PROJECTOR))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Run tower and projector; `rows` are the positions of the tower's last map, row by row."""
        maps = self.get_submodule(_TOWER)(pixel_values, do_pooling=False).last_hidden_state
        return self.get_submodule(_PROJECTOR)(maps.flatten(2).permute(0, 2, 1))


@dataclass(frozen=True)
class Reference(ChatReference):
    """The class's own forward and `generate`; what it pools for a classifier is not computed."""

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`image_features` `[images, rows, hidden] float32`; `rows` follows from the images' size."""
        return {"image_features": self.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output}


@lru_cache
def _sample_rows(vision_config: str) -> int:
    """Rows of features of an image of `_SAMPLE_SIZE`, by running the tower without weights."""
    with torch.device("meta"), torch.no_grad():
        tower = AutoModel.from_config(load_config(json.loads(vision_config)))
        maps = tower(torch.empty(1, 3, _SAMPLE_SIZE, _SAMPLE_SIZE)).last_hidden_state
    return maps.shape[2:].numel()


def sample_inputs(config: Config, generator: Generator) -> dict[str, Tensor]:
    """`pixel_values` `[1, 3, 128, 128]` in 0…1, and `input_ids` with as many image tokens as such an image has rows."""
    rows = _sample_rows(json.dumps(config["vision_config"]))
    return {
        "pixel_values": torch.rand(1, 3, _SAMPLE_SIZE, _SAMPLE_SIZE, generator=generator),
        "input_ids": sample_ids(config, rows, generator),
    }


def preprocessor(folder: Path, config: Config, settings: Mapping[str, Any]) -> ChatProcessor:
    """The `LlavaProcessor` of transformers, which counts image tokens by the checkpoint's `processor_config.json`."""
    return ChatProcessor(folder, settings, _INPUT_DTYPES, processor_class="LlavaProcessor")


def components(config: Config) -> tuple[Component, ...]:
    """The graphs of `chat`: `vision_encoder`, for images of any size, `embed_tokens` and `decoder_model_merged`."""
    hidden = load_config(config).text_config.hidden_size
    vision_encoder = Component(
        name="vision_encoder",
        module=Encoder,
        inputs=(TensorSpec("pixel_values", "float32", ("num_images", 3, "height", "width")),),
        outputs=(TensorSpec("image_features", "float32", ("num_images", "rows", hidden)),),
    )
    return vision_encoder, *text_components(config, "model.language_model")


class LlavaQwen2(Chat):
    """The class of that name in transformers.js, whose config is the text model's with the image token in it."""

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """`config.json`, `generation_config.json` and `processor_config.json` as transformers.js's class wants them."""
        image_token_id = load_config(facts.config).image_token_id
        config = {
            **{key: value for key, value in facts.config.items() if key != "text_config"},
            **known_text_config(facts.text_config),
            "model_type": "llava_qwen2",
            "architectures": ["LlavaQwen2ForCausalLM"],  # any other ending, and no tower is loaded
            "image_token_index": image_token_id,  # what 3.x reads
            "image_token_id": image_token_id,
        }
        return {
            "config.json": config,
            "generation_config.json": generation_config(facts),
            "processor_config.json": _processor(facts.processor),
        }


def _processor(stored: Mapping[str, Any]) -> dict[str, Any]:
    """`processor_config.json` with the numbers that the JavaScript `LlavaProcessor` reads."""
    if not isinstance(stored.get("patch_size"), int):
        raise InputError("processor_config.json: no patch_size: save the model's LlavaProcessor beside it")
    dropped = int(stored.get("vision_feature_select_strategy") == "default")  # the class token that there is not
    return {
        "processor_class": "LlavaProcessor",
        "image_token": stored.get("image_token", "<image>"),
        "patch_size": stored["patch_size"],
        "num_additional_image_tokens": stored.get("num_additional_image_tokens", 0) - dropped,
    }


FAMILY = _chat.chat_family(
    "fast_vlm",
    About(
        summary="FastVLM, as transformers has it: FastViT, which timm builds, a projector, Qwen2",
        since="0.1.0",
        towers=("timm_wrapper",),
        decoders=("qwen2",),
        notes=(
            "Needs timm: `pip install 'vlm-export[fastvlm]'`.",
            "Published as `llava_qwen2`, the name by which transformers.js knows it.",
            "Apple's own checkpoints, which call themselves `llava_qwen2`, are code as well as weights: start from "
            "those that transformers' `convert_fastvlm_weights_to_hf.py` made of them.",
            "Convolutions stay in float32 in `int8` and `q8`, and so does most of the tower.",
        ),
    ),
    sample_inputs=sample_inputs,
    reference=lambda model: Reference(model, image_tokens=0),
    preprocessor=preprocessor,
    layout=Layout(components, LlavaQwen2()),
    build=build,
)
