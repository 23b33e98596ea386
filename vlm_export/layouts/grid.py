"""chat of Qwen-VL and its kin: transformers.js's own classes, which feed an image as patches and a grid."""

from __future__ import annotations

from typing import Any

from vlm_export.layouts.chat import Chat
from vlm_export.layouts.text_models import known_text_config
from vlm_export.models.chat import load_config
from vlm_export.spec.client import RepoFacts, generation_config

_OLDER = ("min_pixels", "max_pixels")  # of `size`


class GridChat(Chat):
    """The client of a model whose images are patches with a grid.

    `processor_class` and `image_processor_type` are the names of transformers.js's.
    """

    call = "text, image"

    def __init__(self, processor_class: str, image_processor_type: str):
        self.processor_class = processor_class
        self.image_processor_type = image_processor_type

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """The model's own config, with what transformers.js takes for granted, and settings without older names.

        It counts places from the ids of an image and of its start, looks for the number of layers of a `qwen2_vl`
        outside of `text_config`, and takes no patch size, merge size or frames by default.
        """
        loaded = load_config(facts.config)
        text = known_text_config(facts.text_config)
        vision: dict[str, Any] = dict(facts.config["vision_config"])
        config = {
            **facts.config,
            "num_hidden_layers": text["num_hidden_layers"],
            "image_token_id": loaded.image_token_id,
            "text_config": text,
            "vision_config": vision | {"spatial_merge_size": loaded.vision_config.spatial_merge_size},
        }
        if (start := getattr(loaded, "vision_start_token_id", None)) is not None:
            config["vision_start_token_id"] = start
        settings = {name: value for name, value in facts.image_processor.items() if name not in _OLDER}
        return {
            "config.json": config,
            "generation_config.json": generation_config(facts),
            "processor_config.json": {"processor_class": self.processor_class},
            "preprocessor_config.json": settings | {"image_processor_type": self.image_processor_type},
        }
