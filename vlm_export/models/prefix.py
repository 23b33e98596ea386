"""The prefix-conditioning captioner as a PyTorch module: tower → projection → prefix of a decoder-only language model.

transformers has no class for this architecture, so the module is ours. The prefix is the tower's last hidden state, as
in distilvit2: all of it, class and register tokens included. Its attribute names are the key prefixes of
distilvit2 checkpoints, and its dimensions come from the two nested configs of their `config.json`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from vlm_export.models.towers import build_tower, tower_config


class ProjectionHead(nn.Module):
    """The vision-to-text bridge: `[batch, patches, vision_dim]` → `[batch, patches, text_dim]`.

    The MLP keeps distilvit2's indices: layer 0, GELU, dropout, layer 3.
    """

    def __init__(self, vision_dim: int, text_dim: int, kind: str = "linear", mlp_hidden_dim: int = 2048):
        super().__init__()
        self.projection: nn.Module
        if kind == "linear":
            self.projection = nn.Linear(vision_dim, text_dim)
        elif kind == "mlp":
            self.projection = nn.Sequential(
                nn.Linear(vision_dim, mlp_hidden_dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(mlp_hidden_dim, text_dim)
            )
        else:
            raise ValueError(f"projection_type is {kind!r}, not 'linear' or 'mlp'")

    def forward(self, vision_features: torch.Tensor) -> torch.Tensor:
        """Project every patch by itself."""
        return self.projection(vision_features)


class PrefixConditioningVLM(nn.Module):
    """A tower, a projection and a causal language model that continues the projected patches.

    `config` is the dict of `config.json`: `vision_config`, `text_config`, `projection_type`, `mlp_hidden_dim`.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        vision_config = tower_config(config["vision_config"])
        language_model = AutoModelForCausalLM.from_config(nested_config(config["text_config"]))
        self.vision_encoder = build_tower(config["vision_config"])
        self.projection = ProjectionHead(
            vision_config.hidden_size,
            language_model.get_input_embeddings().embedding_dim,
            config.get("projection_type", "linear"),
            config.get("mlp_hidden_dim", 2048),
        )
        self.language_model = language_model

    def get_input_embeddings(self) -> nn.Module:
        """The token table, by transformers' name for it."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The head; PEFT asks for both when it saves an adapter of either."""
        return self.language_model.get_output_embeddings()

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[batch, 3, H, W] float32` → the prefix, `[batch, patches, text_dim] float32`."""
        return self.projection(self.vision_encoder(pixel_values).last_hidden_state)

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits of prefix + text, `[batch, patches + tokens, vocabulary]`."""
        text = self.language_model.get_input_embeddings()(input_ids)
        embeds = torch.cat([self.image_features(pixel_values), text], dim=1)
        return self.language_model(inputs_embeds=embeds).logits


def nested_config(values: dict[str, Any]) -> PretrainedConfig:
    """The transformers config of a nested `text_config` dict, by its `model_type`."""
    values = dict(values)
    return AutoConfig.for_model(values.pop("model_type"), **values)
