"""The family of a class that transformers.js lacks, published as a llava: one square an image, one grid of rows.

What the class's own processor writes around an image, `LlavaProcessor` does not: the repo's chat template does, and so
do the texts of goldens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Generator, Tensor, nn

from vlm_export.families import _square
from vlm_export.families._chat import ChatReference, chat_family
from vlm_export.layouts.as_llava import AsLlavaChat, Template
from vlm_export.layouts.chat import llava_processor
from vlm_export.models.chat import text_components
from vlm_export.models.one_tower import TowerEncoder
from vlm_export.preprocessing import ChatProcessor, check_image_size, processor_settings
from vlm_export.spec.family import About, Config, Family, Layout
from vlm_export.spec.graph import Component

_TILING = ("crop_to_patches", "min_patches", "max_patches")
NOTE = "Published as `llava`, the class of transformers.js that is fed in the same way."


def one_tile(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Image processor settings without tiles, under the name of one that transformers.js has and that does the same."""
    plain = {key: value for key, value in settings.items() if key not in _TILING}
    return {**plain, "image_processor_type": "SiglipImageProcessor"}


class TemplatedProcessor(ChatProcessor):
    """Conversations by the template that the repo gets."""

    def __init__(self, *arguments: Any, template: Template, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.processor.chat_template = template(self.processor.chat_template, self.processor.image_token)


def family(
    model_type: str,
    about: About,
    *,
    token: str,
    image_size: Callable[[Config], int],
    image_tokens: Callable[[Config], int],
    encoder: Callable[[Any], nn.Module] = TowerEncoder,
    image_processor: Callable[[Mapping[str, Any]], Mapping[str, Any]] = one_tile,
    client_processor: Callable[[Mapping[str, Any]], Mapping[str, Any]] = one_tile,
    template: Template = lambda own, token: own,
    question: str = "What is in this image?",
    check: Callable[[Config], None] = lambda config: None,
    reference: Callable[[Any, int], ChatReference] = ChatReference,
) -> Family:
    """The family of such a class.

    `token` stands for a row of features; `image_size` and `image_tokens` are the pixels of an image's side and its
    rows. `image_processor` are the settings for transformers, `client_processor` those for transformers.js. `check`
    raises InputError for a config that the graphs would be wrong of.
    """
    client = AsLlavaChat(image_tokens, token, client_processor, template, question)

    def sample_inputs(config: Config, generator: Generator) -> dict[str, Tensor]:
        return _square.sample_inputs(config, generator, image_size(config), image_tokens(config))

    def preprocessor(folder: Path, config: Config, settings: Mapping[str, Any]) -> TemplatedProcessor:
        check_image_size(settings, image_size(config))
        written = client.image_token(processor_settings(folder))
        processor = llava_processor(written, image_tokens(config)) | {"vision_feature_select_strategy": "full"}
        return TemplatedProcessor(
            folder, image_processor(settings), _square.INPUT_DTYPES, template=template, **processor
        )

    def components(config: Config) -> tuple[Component, ...]:
        check(config)
        encoded = _square.vision_encoder(config, image_size(config), image_tokens(config), encoder)
        return encoded, *text_components(config, "model.language_model")

    return chat_family(
        model_type,
        about,
        sample_inputs=sample_inputs,
        reference=lambda model: reference(model, image_tokens(model.config.to_dict())),
        preprocessor=preprocessor,
        layout=Layout(components, client),
        joins=True,
    )
