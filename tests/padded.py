"""A decoder on a batch of two rows beside PyTorch; where it takes a mask, one of them is left-padded."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers.cache_utils import DynamicCache

from vlm_export.models.decoder import Geometry
from vlm_export.verify.metrics import max_relative_error

STEPS = 4  # the prefill and three tokens


def compare(session: onnxruntime.InferenceSession, language_model: Any, limit: float = 1e-4) -> None:
    """Logits and every `present.*` of the prefill and of each step agree where a row is no padding."""
    geometry = Geometry.of(language_model.config)
    embeds = torch.randn(2, 7, geometry.hidden, generator=torch.Generator().manual_seed(1))
    inputs = [value.name for value in session.get_inputs()]
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    if "attention_mask" not in inputs:
        mask = torch.ones_like(mask)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)  # as transformers.js numbers them
    cache: DynamicCache = DynamicCache()
    names = [name for name in inputs if name.startswith("past_key_values.")]
    past = [np.zeros((2, geometry.pairs.kv_heads, 0, geometry.pairs.head_dim), dtype=np.float32)] * len(names)
    for step in range(STEPS):
        with torch.inference_mode():
            reference = language_model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=1,
            )
        feeds = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
        arrays = {name: tensor.numpy() for name, tensor in feeds.items()} | dict(zip(names, past, strict=True))
        arrays["num_logits_to_keep"] = np.array(1, dtype=np.int64)
        logits, *past = session.run(None, {name: array for name, array in arrays.items() if name in inputs})
        assert max_relative_error(logits, reference.logits.numpy()) < limit, step
        for layer, values in enumerate(cache.layers):
            for place, tensor in enumerate((values.keys, values.values)):
                ours, theirs = past[2 * layer + place], tensor.numpy()
                kept = theirs.shape[2]  # transformers' own cache of a windowed layer forgets what is outside it
                real = mask.bool().numpy()[:, None, -kept:, None]
                error = max_relative_error(np.where(real, ours[:, :, -kept:], 0), np.where(real, theirs, 0))
                assert error < limit, (step, layer, place)
        embeds = torch.randn(2, 1, geometry.hidden, generator=torch.Generator().manual_seed(step))
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], dim=1)
        positions = mask.sum(-1, keepdim=True) - 1
