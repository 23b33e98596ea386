"""chat of LFM2-VL: transformers.js's own class, which cuts pictures into tiles of any proportions."""

from __future__ import annotations

from typing import Any

from vlm_export.errors import InputError
from vlm_export.layouts.chat import Chat
from vlm_export.layouts.text_models import known_text_config
from vlm_export.models.chat import load_config
from vlm_export.spec.client import RepoFacts, generation_config

# Settings that transformers does not look at, because it resizes and pads in any case; transformers.js would make
# squares of all pictures before it cuts them.
_OF_NO_EFFECT = ("size", "crop_size", "do_center_crop", "do_pad")
_IMAGE = "<image>"


class NaflexChat(Chat):
    """The client of an LFM2-VL."""

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """The model's own config, its text config complete, and image settings with which pictures keep proportions.

        transformers.js reads no `processor_config.json` of this class, so that what it writes for an image is given.

        Raises:
            InputError: the model was trained with other tokens for an image, or without those around it.
        """
        if not facts.processor.get("use_image_special_tokens", True):
            raise InputError(
                "processor_config.json: use_image_special_tokens: is false; transformers.js always writes them"
            )
        image_token_id = load_config(facts.config).image_token_id
        if (token := facts.token(image_token_id)) != _IMAGE:
            raise InputError(
                f"config.json: image_token_id: is {token!r}, and transformers.js writes {_IMAGE!r}: rename it in "
                "tokenizer.json"
            )
        config = {
            **facts.config,
            "image_token_index": image_token_id,  # what 3.x reads
            "image_token_id": image_token_id,
            "text_config": known_text_config(facts.text_config),
        }
        settings = {name: value for name, value in facts.image_processor.items() if name not in _OF_NO_EFFECT}
        return {
            "config.json": config,
            "generation_config.json": generation_config(facts),
            "processor_config.json": {"processor_class": "Lfm2VlProcessor"},
            "preprocessor_config.json": settings | {"do_resize": False},
        }
