"""models/blocks.py: which tokens see one another, beside the masks that transformers makes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask

from vlm_export.models.blocks import runs, whole_prompt

WINDOW = 4
CONFIG = AutoConfig.for_model("gemma2", sliding_window=WINDOW, attn_implementation="eager")
IMAGES = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0], [1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 1]])


def cached(past: int, batch: int) -> DynamicCache:
    cache = DynamicCache()
    if past:
        cache.update(torch.zeros(batch, 1, past, 8), torch.zeros(batch, 1, past, 8), 0)
    return cache


def as_seen(mask: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
    assert mask is not None
    return (mask == 0).expand(shape[0], 1, *shape[1:])[:, 0]


@pytest.mark.parametrize("past", [0, 1, 6])
@pytest.mark.parametrize("length", [1, 9])
def test_a_prompt_is_seen_whole_and_what_follows_is_not(past: int, length: int) -> None:
    """As PaliGemma's class: a block of 0 for a prompt, none after a cache; a window does not end it."""
    embeds = torch.zeros(2, length, 8)
    kinds = None if past else torch.zeros(2, length, dtype=torch.int64)
    blocks = whole_prompt(embeds, past)
    for window, make in ((None, create_causal_mask), (WINDOW, create_sliding_window_causal_mask)):
        expected = make(
            config=CONFIG,
            inputs_embeds=embeds,
            attention_mask=torch.ones(2, past + length, dtype=torch.int64),
            past_key_values=cached(past, 2),
            position_ids=None,
            block_sequence_ids=kinds,
            allow_is_causal_skip=False,
        )
        seen = blocks.seen(past, window)
        assert torch.equal(seen, as_seen(expected, seen.shape)), window


@pytest.mark.parametrize("past", [0, 3])
def test_images_are_seen_whole_within_a_window(past: int) -> None:
    """As Gemma 3's class: neighbouring rows of images are one image."""
    embeds = torch.zeros(*IMAGES.shape, 8)
    whole = torch.cat([torch.zeros(2, past, dtype=torch.int64), IMAGES], dim=1)
    expected = create_masks_for_vision_model(
        config=CONFIG,
        inputs_embeds=torch.zeros(*whole.shape, 8),
        attention_mask=torch.ones_like(whole),
        past_key_values=None,
        position_ids=None,
        block_sequence_ids=get_block_sequence_ids_for_mask(whole),
    )
    blocks = runs(IMAGES == 1)
    for window, kind in ((None, "full_attention"), (WINDOW, "sliding_attention")):
        seen = blocks.seen(past, window)
        assert torch.equal(seen, as_seen(expected[kind][:, :, past:], seen.shape)), kind
    assert embeds.shape[1] == seen.shape[1]
