"""What the llavas have in common: features of chosen layers of a CLIP or SigLIP tower, a projector, any text model.

`vision_feature_layer` counts hidden states as transformers does: 0 is what goes into the first layer, -1 what comes out
of the last, before any final norm. `vision_feature_select_strategy: default` drops the class token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from vlm_export.models.chat import Parts, put

_TOWER = "model.vision_tower"
_LAYERS = f"{_TOWER}.encoder.layers"
_PROJECTOR = "model.multi_modal_projector"


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
        """Run the tower layer by layer, join the chosen hidden states along the last axis, and project them."""
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
