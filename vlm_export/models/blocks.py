"""Tokens that see later ones: a decoder's blocks, beside what is before each token.

The mask is that of transformers 5.23's `masking_utils.py`: `sliding_window_causal_mask_function`, `blockwise_overlay`,
and padding last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """The new tokens of a run that see one another, whatever their order.

    Attributes:
        ids: `[B, S] int64`, the block of each; one of -1 sees what is before it, and no more.
        beyond_window: whether a token sees all of its block where a layer's window ends before.
    """

    ids: Tensor
    beyond_window: bool

    def seen(self, past: int, window: int | None) -> Tensor:
        """`[B, S, P + S] bool`: whether each new token sees each position, after a past of P.

        A layer with a `window` sees so many positions, its own the last.
        """
        batch, length = self.ids.shape
        own = torch.arange(length)[:, None] + past
        positions = torch.arange(past + length)[None, :]
        before = positions <= own
        near = positions > own - window if window else torch.ones_like(before)
        of_past = torch.full((batch, past), -1, dtype=self.ids.dtype)
        blocks = torch.cat([of_past, self.ids], dim=1)
        together = (self.ids[:, :, None] == blocks[:, None, :]) & (self.ids >= 0)[:, :, None]
        return (near & before) | together if self.beyond_window else near & (before | together)


def whole_prompt(embeds: Tensor, past: int) -> Blocks:
    """All of a prompt `[B, S, H]` that nothing is before; what comes after a cache is in no block."""
    first = torch.scalar_tensor(past, dtype=torch.int64) == 0
    block = first.to(torch.int64) - 1  # 0, or none
    return Blocks(block.expand(embeds.shape[0], embeds.shape[1]), beyond_window=True)


def runs(marked: Tensor) -> Blocks:
    """Each run of neighbouring tokens that are marked, `[B, S] bool`: say, those of one image.

    `get_block_sequence_ids_for_mask` in `models/gemma3/modeling_gemma3.py`.
    """
    before = torch.nn.functional.pad(marked, (1, 0))[:, :-1]
    number = (marked & ~before).to(torch.int64).cumsum(dim=1) - 1
    return Blocks(torch.where(marked, number, -1), beyond_window=False)
