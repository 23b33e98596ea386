"""chat of Mistral 3 and LightOnOCR: transformers.js's own classes, which take pictures of their own proportions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_export.errors import InputError
from vlm_export.layouts.chat import Chat
from vlm_export.layouts.text_models import known_text_config
from vlm_export.models.chat import load_config
from vlm_export.spec.client import RepoFacts, generation_config

_OTHERWISE = ("patch_size", "spatial_merge_size", "do_pad", "size")  # said in another way, or without effect
_ENDS = ("image_break_token", "image_end_token")


class PixtralChat(Chat):
    """The client of a Pixtral tower.

    `architecture` is the name of transformers.js's class, `ends` are the tokens after each line of an image's cells and
    after the last, where the checkpoint's `processor_config.json` does not name them.
    """

    def __init__(self, architecture: str, ends: tuple[str, str]):
        self.architecture = architecture
        self.ends = dict(zip(_ENDS, ends, strict=True))

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """The model's own config with both names of the image token, and what `PixtralProcessor` reads.

        Raises:
            InputError: image sizes that transformers.js has no words for.
        """
        loaded = load_config(facts.config)
        cell = {
            "patch_size": loaded.vision_config.patch_size,
            "spatial_merge_size": loaded.spatial_merge_size,
        }
        config = {
            **facts.config,
            "architectures": [self.architecture],
            "image_token_index": loaded.image_token_id,  # what 3.x reads
            "image_token_id": loaded.image_token_id,
            "text_config": known_text_config(facts.text_config),
        }
        return {
            "config.json": config,
            "generation_config.json": generation_config(facts),
            "processor_config.json": {
                "processor_class": "PixtralProcessor",
                "image_token": facts.token(loaded.image_token_id),
                **{name: facts.processor.get(name, token) if token else "" for name, token in self.ends.items()},
                **cell,
            },
            "preprocessor_config.json": {**image_processor(facts.image_processor), **cell},
        }


def image_processor(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Image processor settings as transformers.js acts on them; a cell's size is left to say.

    Raises:
        InputError: it has no words for the size.
    """
    size = settings["size"]
    sides = {size} if isinstance(size, int) else set(size.values())
    if len(sides) != 1 or (not isinstance(size, int) and not set(size) <= {"longest_edge", "height", "width"}):
        raise InputError(
            f"preprocessor_config.json: size: {size}: transformers.js has no limit but `longest_edge`: set that"
        )
    plain = {name: value for name, value in settings.items() if name not in _OTHERWISE}
    return {**plain, "image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": sides.pop()}}
