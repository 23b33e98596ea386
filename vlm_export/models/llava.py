"""What the llavas have in common: features of chosen layers of a CLIP or SigLIP tower, a projector, any text model.

`vision_feature_layer` counts hidden states as transformers does: 0 is what goes into the first layer, -1 what comes out
of the last, before any final norm. `vision_feature_select_strategy: default` drops the class token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from transformers import PretrainedConfig

from vlm_export.families.base import About, Component, Config, Family, Layout, TensorSpec
from vlm_export.layouts.chat import llava_processor
from vlm_export.layouts.llava import LlavaChat
from vlm_export.models.chat import ChatReference, Parts, chat_family, load_config, put, sample_ids, text_components
from vlm_export.preprocessing import ChatProcessor, check_image_size

_TOWER = "model.vision_tower"
_LAYERS = f"{_TOWER}.encoder.layers"
_PROJECTOR = "model.multi_modal_projector"
_FED: dict[str, type[np.generic]] = {"pixel_values": np.float32, "input_ids": np.int64, "attention_mask": np.int64}


def feature_rows(config: PretrainedConfig) -> int:
    """Rows of features that the tower gives for one image, under its selection."""
    vision = config.vision_config
    has_class_token = vision.model_type.startswith("clip")
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + has_class_token - (config.vision_feature_select_strategy == "default")


def trim_tower(model: Any) -> None:
    """Drop the layers above the highest feature layer: no feature depends on them."""
    owner, layers = model.get_submodule(_LAYERS.rpartition(".")[0]), model.get_submodule(_LAYERS)
    owner.layers = nn.ModuleList(list(layers)[: max(_feature_layers(model.config))])


def _feature_layers(config: PretrainedConfig) -> list[int]:
    """The hidden states that are taken, by their index from 0."""
    chosen = config.vision_feature_layer
    count = config.vision_config.num_hidden_layers + 1
    return [layer % count for layer in ([chosen] if isinstance(chosen, int) else chosen)]


class FeatureEncoder(Parts):
    """`pixel_values` `[images, 3, H, W]` → `image_features` `[images, rows, hidden]`, of a model that was trimmed."""

    def __init__(self, model: Any):
        tower = model.get_submodule(_TOWER)
        norms = ["pre_layrnorm"] if hasattr(tower, "pre_layrnorm") else []
        super().__init__(model, [f"{_TOWER}.{part}" for part in ("embeddings", *norms)])
        put(self, _PROJECTOR, model.get_submodule(_PROJECTOR))
        layers = model.get_submodule(_LAYERS)
        self.several = not isinstance(model.config.vision_feature_layer, int)
        self.chosen = _feature_layers(model.config)
        # One that is the model's own can be traced as two layers, and repeated; its last layer's output is the feature.
        put(self, _LAYERS, nn.ModuleList(list(layers)) if self.several else layers)
        self.drops_first = model.config.vision_feature_select_strategy == "default"

    def forward(self, pixel_values: Tensor) -> Tensor:
        tower: Any = self.get_submodule(_TOWER)
        hidden = tower.embeddings(pixel_values)
        if hasattr(tower, "pre_layrnorm"):
            hidden = tower.pre_layrnorm(hidden)
        states = [hidden]
        for layer in tower.encoder.layers:
            states.append(layer(states[-1], None))
        chosen = [states[index] for index in self.chosen] if self.several else [states[-1]]
        features = torch.cat([state[:, 1:] if self.drops_first else state for state in chosen], dim=-1)
        return self.get_submodule(_PROJECTOR)(features)


def family(
    model_type: str,
    about: About,
    *,
    encoder: Callable[[Any], nn.Module] = FeatureEncoder,
    reference: Callable[[Any, int], ChatReference] = ChatReference,
    rows_of_its_own: int = 0,
    image_processor: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> Family:
    """The family of a llava that adds `rows_of_its_own` to an image's features.

    `image_processor` are the settings that give the pixels that transformers.js feeds, where the model's own do not.
    """

    def rows(config: PretrainedConfig) -> int:
        return feature_rows(config) + rows_of_its_own

    def image_tokens(config: Config) -> int:
        return rows(load_config(config))

    def sample_inputs(config: Config, generator: Generator) -> dict[str, Tensor]:
        size = load_config(config).vision_config.image_size
        return {
            "pixel_values": torch.rand(2, 3, size, size, generator=generator) * 2 - 1,
            "input_ids": sample_ids(config, image_tokens(config), generator),
        }

    def feeder(folder: Path, config: Config, settings: Mapping[str, Any]) -> ChatProcessor:
        check_image_size(image_processor(settings), load_config(config).vision_config.image_size)
        processor = llava_processor("<image>", image_tokens(config)) | {"vision_feature_select_strategy": "full"}
        return ChatProcessor(folder, image_processor(settings), _FED, **processor)

    def chat(config: Config) -> tuple[Component, ...]:
        loaded = load_config(config)
        size, hidden = loaded.vision_config.image_size, loaded.text_config.hidden_size
        vision_encoder = Component(
            name="vision_encoder",
            module=encoder,
            inputs=(TensorSpec("pixel_values", "float32", ("num_images", 3, size, size)),),
            outputs=(TensorSpec("image_features", "float32", ("num_images", image_tokens(config), hidden)),),
        )
        return vision_encoder, *text_components(config, "model.language_model")

    return chat_family(
        model_type,
        about,
        sample_inputs=sample_inputs,
        reference=lambda model: reference(model, rows(model.config)),
        feeder=feeder,
        layout=Layout(chat, LlavaChat(image_tokens)),
        trim=trim_tower,
    )
