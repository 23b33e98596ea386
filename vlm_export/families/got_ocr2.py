"""GOT-OCR 2.0, a page at a time: a SAM tower, two convolutions and a linear layer, Qwen2. Published as a llava.

The checkpoint has no chat template: transformers' processor writes the conversation around an image itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.got_ocr2.modeling_got_ocr2 import GotOcr2VisionAttention

from vlm_export import patches
from vlm_export.errors import InputError
from vlm_export.families._as_llava import NOTE, family
from vlm_export.models.chat import load_config
from vlm_export.models.one_tower import TowerEncoder
from vlm_export.spec.client import ChatTemplate
from vlm_export.spec.family import About, Config

_HALVED = 4  # two convolutions that halve both sides
_QUESTION = " OCR: "  # as the processor writes it, spaces included
# What `GotOcr2Processor.prepare_inputs_layout` of transformers 5.23 writes.
_TEMPLATE = (
    "<|im_start|>system\nYou should follow the instructions carefully and explain your answers in detail.<|im_end|>"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<img>TOKEN</img>\n{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def image_size(config: Config) -> int:
    """Pixels of an image's side."""
    return int(load_config(config).vision_config.image_size)


def image_tokens(config: Config) -> int:
    """Rows of features of an image."""
    return int((image_size(config) // load_config(config).vision_config.patch_size // _HALVED) ** 2)


class Encoder(TowerEncoder):
    """`pixel_values` `[images, 3, H, W]` → `image_features` `[images, rows, hidden]`."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Tower and projector. Tables of relative places have the size that they are read in, and are not resampled."""
        with patches.replaced(GotOcr2VisionAttention, "get_rel_pos", _relative):
            return super().forward(pixel_values)


def _relative(attention: Any, queries: int, keys: int, table: Tensor) -> Tensor:
    """In the place of `get_rel_pos`: the rows `[queries, keys, head]` of a table of `2 · queries - 1` distances."""
    assert queries == keys and len(table) == 2 * queries - 1, (queries, keys, len(table))
    return table[torch.arange(queries)[:, None] - torch.arange(keys)[None, :] + keys - 1]


def own_template(template: ChatTemplate | None, token: str) -> ChatTemplate:
    """The checkpoint's, or one that writes what transformers' processor does."""
    return template or _TEMPLATE.replace("TOKEN", token)


def check(config: Config) -> None:
    """Raises InputError for a tower of other images than squares."""
    vision = load_config(config).vision_config
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise InputError(f"config.json: vision_config.{name}: {getattr(vision, name)} is no number")


FAMILY = family(
    "got_ocr2",
    About(
        summary="GOT-OCR 2.0: a SAM tower for one page, Qwen2",
        since="0.1.0",
        towers=("got_ocr2_vision",),
        decoders=("qwen2",),
        notes=(
            NOTE,
            "One page an image, stretched to the tower's square, as transformers makes it by default; no crops, and "
            "one page a prompt.",
            "The published chat template writes what transformers' processor does; the text behind the image is "
            "` OCR: ` or ` OCR with format: `, spaces included.",
            "transformers.js stops at no texts: `generation_config.json` must name the id of `<|im_end|>` as "
            "`eos_token_id`.",
        ),
    ),
    token="<imgpad>",
    image_size=image_size,
    image_tokens=image_tokens,
    encoder=Encoder,
    template=own_template,
    question=_QUESTION,
    check=check,
)
