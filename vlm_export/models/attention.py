"""What attention becomes in a graph: one fused operator of ONNX Runtime, or plain ones where none can express it.

transformers lets a function stand in for every attention layer (`AttentionInterface`). While a component is traced,
ours emits `com.microsoft::GroupQueryAttention` for a decoder, with the flat cache as the operator's own past and
present and, where it can, with rotary embedding inside (`rotary.py`); and `com.microsoft::MultiHeadAttention` for a
tower. Where tokens see later ones (`blocks.py`), which GroupQueryAttention cannot express, they are plain operators,
which were as fast as `Attention` of opset 23 on ONNX Runtime's CPU provider, and faster with a cap: 300 tokens, 8
heads of 256, 12.5 ms with either, 8.4 ms against 27 ms with a cap; one token after 300, 0.16 ms against 0.18 ms.
Contracts: onnxruntime's `docs/ContribOperators.md`. Only this module knows transformers' attention interface.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.trocr.modeling_trocr import TrOCRAttention

from vlm_export import patches
from vlm_export.contract import HEAD_MULTIPLE
from vlm_export.models.blocks import Blocks
from vlm_export.models.rotary import Rotary, find_rotation

_NAME = "vlm_export"
_BIAS_INPUT = 10  # of GroupQueryAttention
_KNOWN_KEYWORDS = {"sliding_window", "softcap", "is_causal", "position_ids", "use_cache", "cache_position"}


Pairs = Mapping[int, tuple[Tensor, Tensor]]  # by layer: keys and values `[B, K, P, D]`


class CannotFuse(Exception):
    """This attention is more than the fused operators express; the message says what."""


@dataclass
class Notes:
    """What stayed plain operators in a graph whose attention is fused, and why."""

    unfused_rotary: str = ""
    unfused_attention: str = ""


@dataclass
class _DecoderRun:
    """One run of a decoder while it is traced: the past that goes into each layer, and the present that comes out."""

    past: Pairs
    bias: Tensor | None  # [B, 1, S, P + S]: padding
    padding: Tensor | None  # [B, P + S]: the same as a mask
    blocks: Blocks | None  # of tokens that see later ones
    total_length: Tensor  # int32 scalar: positions after the run, past included
    last_positions: Tensor  # [B] int32: the last of them in each row
    rotary: Rotary
    present: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    by_window: dict[int | None, Tensor] = field(default_factory=dict)  # [B, 1, S, P + S]: all that is not seen


_run: ContextVar[_DecoderRun | None] = ContextVar("run of a decoder", default=None)
_notes: ContextVar[Notes] = ContextVar("notes of what is fused")


class DecoderCache(DynamicCache):
    """What transformers' layers call for a past: keys and values of some, of others a state of one size.

    Attributes:
        states: of each layer that keeps one `[B, …]`, after it has run that of its run.
    """

    def __init__(self, pairs: Pairs, states: Mapping[int, Tensor] | None = None):
        super().__init__()
        self.states = dict(states or {})
        for layer, (key, value) in pairs.items():
            DynamicCache.update(self, key, value, layer)
        self._counting = min(pairs)  # the layer whose keys say how long the past is

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions of the past, which a layer without keys does not know."""
        return super().get_seq_length(self._counting if layer_idx in self.states else layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As many keys as the layers have that keep some."""
        return super().get_mask_sizes(query_length, self._counting if layer_idx in self.states else layer_idx)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """None, as before a first run: a layer takes the way that is right for any number of tokens."""
        return None

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """A short convolution's new inputs `[B, H, S]` behind the last ones `[B, H, K]`, which they become."""
        last = self.states[layer_idx]
        both = torch.cat([last, conv_states], dim=-1)
        self.states[layer_idx] = both[..., -last.shape[-1] :]
        return both


class _NewTokensOnly(DecoderCache):
    """A cache whose layers have the past's length and hand back only the new keys and values: the operator appends."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def decoder_cache(pairs: Pairs, states: Mapping[int, Tensor] | None = None, *, fused: bool) -> DecoderCache:
    """Keys and values by layer, and the states of others, as the `DynamicCache` that transformers' layers call."""
    return (_NewTokensOnly if fused else DecoderCache)(pairs, states)


class _CarriedCross(DynamicCache):
    """Cross keys and values that a layer computes, behind those that are there already: one of the two is empty."""

    def __init__(self, past: Pairs):
        super().__init__()
        self.past = past
        self.new: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.new[layer_idx] = (key_states, value_states)
        past_key, past_value = self.past[layer_idx]
        return torch.cat([past_key, key_states], dim=2), torch.cat([past_value, value_states], dim=2)


def cross_cache(past: Pairs, cross_past: Pairs, *, fused: bool) -> tuple[Any, dict[int, tuple[Tensor, Tensor]]]:
    """Two caches as one that a decoder's cross-attention calls too, and the dict that collects its new entries."""
    carried = _CarriedCross(cross_past)
    return EncoderDecoderCache(decoder_cache(past, fused=fused), carried), carried.new


@contextmanager
def fused(model: nn.Module) -> Iterator[Notes]:
    """Within, the attention of every transformers model inside `model` is ours; yields what is noted of it."""
    notes = Notes()
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    before = [part.config._attn_implementation for part in parts]
    for part in parts:
        part.config._attn_implementation = _NAME
        find_rotation(part)  # by trying it, which is too late while tracing
    trocrs = {layer: part.config for part in parts for layer in part.modules() if isinstance(layer, TrOCRAttention)}
    has_timm = any(part.config.model_type == "timm_wrapper" for part in parts)
    noted = _notes.set(notes)
    try:
        with (
            patches.trocr_asks_the_interface(trocrs),
            patches.torchs_attention(_attention_of_timm) if has_timm else nullcontext(),
        ):
            yield notes
    finally:
        _notes.reset(noted)
        for part, implementation in zip(parts, before, strict=True):
            part.config._attn_implementation = implementation


def _attention_of_timm(query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, **keywords: Any) -> Tensor:
    """As torch's function: `[B, heads, S, D]` each → the same."""
    given = sorted(name for name, value in keywords.items() if value not in (None, False))
    if given:
        raise CannotFuse(f"a timm model passes {', '.join(given)}")
    merged = _multi_head(query, key, value, query.shape[-1] ** -0.5, None, cached=False)
    return merged.transpose(1, 2)


def is_fused(language_model: PreTrainedModel) -> bool:
    """Whether `fused` is in force for this model."""
    return bool(language_model.config._attn_implementation == _NAME)


@contextmanager
def decoder_run(
    language_model: PreTrainedModel,
    past: Pairs,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    length: int,
    blocks: Blocks | None = None,
) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Within, attention layers take their past from `past`; yields the dict that collects each layer's present.

    Layers that keep no keys are not among either. `length` is the number of positions after the run, past included;
    `position_ids` may be None where none is rotated. `blocks` are of tokens that see later ones.
    """
    key, _ = next(iter(past.values()))
    total_length = torch.scalar_tensor(length, dtype=torch.int32)  # once for all layers, as are the next two
    last_positions = (total_length - 1).expand(key.shape[0])
    bias = None
    if attention_mask is not None:
        bias = padding_bias(attention_mask, length - key.shape[2], key.dtype)
    # The operator numbers a row's positions from its first one on, which padding breaks: then it cannot rotate.
    rotary = Rotary(language_model, position_ids, length if attention_mask is None else None)
    if blocks is not None:
        _notes.get().unfused_attention = "tokens see later ones, which GroupQueryAttention cannot express"
    run = _DecoderRun(past, bias, attention_mask, blocks, total_length, last_positions, rotary)
    outer = _run.set(run)
    try:
        with rotary.replaced():
            yield run.present
        if len(run.present) < len(past):
            raise CannotFuse(f"{type(language_model).__name__} does not call transformers' attention interface")
    finally:
        _run.reset(outer)
        _notes.get().unfused_rotary = rotary.unfused


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Stands in for an attention layer: `[B, heads, S, D]` each → `[B, S, heads, D]`."""
    unknown = {name for name, given in keywords.items() if given is not None} - _KNOWN_KEYWORDS
    if unknown:
        raise CannotFuse(f"{type(module).__name__} passes {', '.join(sorted(unknown))}")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    run = _run.get()
    if run is not None and run.blocks is not None:
        return _in_blocks(run, run.blocks, module, query, key, value, scale, keywords), None
    causal = getattr(module, "is_causal", run is not None)
    if run is None or not causal:
        if causal:
            raise CannotFuse(f"{type(module).__name__} is causal outside a decoder")
        cached = run is not None  # cross-attention
        return _multi_head(query, key, value, scale, attention_mask, cached=cached), None
    return _group_query(run, module, query, key, value, scale, keywords), None


def _multi_head(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None, *, cached: bool
) -> Tensor:
    """`bias` is additive, `[B, 1 or heads, S, L]`; `cached` keys and values stay `[B, heads, L, D]`, as they lie."""
    batch, heads, length, size = query.shape
    if bias is not None and (bias.dtype != query.dtype or bias.dim() != 4):
        raise CannotFuse(f"a mask is {bias.dtype} of {bias.dim()} dimensions, not an additive bias")
    merged = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        [
            _side_by_side(query),
            *((key, value) if cached else map(_side_by_side, (key, value))),
            *(() if bias is None else (None, None, bias)),
        ],
        attrs={"num_heads": heads, "scale": scale},
        dtype=query.dtype,
        shape=(batch, length, heads * size),
        version=1,
    )
    return merged.reshape(batch, length, heads, size)


def _group_query(
    run: _DecoderRun,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    keywords: dict[str, Any],
) -> Tensor:
    attributes: dict[str, Any] = {}
    tables: tuple[Tensor, ...] = ()
    rotated = run.rotary.inside(query, key)
    if rotated is not None:
        query, key = rotated.before
        tables = rotated.tables
        attributes = {"do_rotary": 1} | ({"rotary_interleaved": 1} if rotated.interleaved else {})
    batch, heads, length, size = query.shape
    if size % HEAD_MULTIPLE:
        raise CannotFuse(f"heads of {size}, which is not a multiple of {HEAD_MULTIPLE}")
    kv_heads, layer = key.shape[1], int(module.layer_idx)  # type: ignore[arg-type]
    past_key, past_value = run.past[layer]
    total = past_key.shape[2] + length
    inputs: list[Tensor | None] = [_side_by_side(tensor) for tensor in (query, key, value)]
    inputs += [past_key, past_value, run.last_positions, run.total_length, *tables]
    if run.bias is not None:
        inputs += [None] * (_BIAS_INPUT - len(inputs)) + [run.bias]
    attributes |= {"num_heads": heads, "kv_num_heads": kv_heads, "scale": scale}
    if keywords.get("sliding_window"):
        attributes["local_window_size"] = int(keywords["sliding_window"])
    if keywords.get("softcap"):
        attributes["softcap"] = float(keywords["softcap"])
    merged, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attrs=attributes,
        dtypes=(query.dtype,) * 3,
        shapes=((batch, length, heads * size), *((batch, kv_heads, total, size),) * 2),
        version=1,
    )
    run.present[layer] = (present_key, present_value)
    return merged.reshape(batch, length, heads, size)


def _in_blocks(
    run: _DecoderRun,
    blocks: Blocks,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    keywords: dict[str, Any],
) -> Tensor:
    """Plain operators. Query heads that share keys are rows of one product, so that no key is repeated."""
    layer, window, cap = int(module.layer_idx), keywords.get("sliding_window"), keywords.get("softcap")  # type: ignore[arg-type]
    batch, heads, length, size = query.shape
    kv_heads, rows = key.shape[1], heads // key.shape[1] * length
    past_key, past_value = run.past[layer]
    keys, values = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
    run.present[layer] = (keys, values)
    if window not in run.by_window:
        seen = blocks.seen(past_key.shape[2], window)
        if run.padding is not None:
            seen = seen & run.padding.bool()[:, None, :]
        run.by_window[window] = torch.where(seen[:, None], 0.0, torch.finfo(query.dtype).min)
    scores = (query * scale).reshape(batch, kv_heads, rows, size) @ keys.transpose(2, 3)
    if cap:
        scores = torch.tanh(scores / cap) * cap
    scores = scores.reshape(batch, heads, length, -1) + run.by_window[window]
    weights = scores.softmax(dim=-1).reshape(batch, kv_heads, rows, -1)
    return (weights @ values).reshape(batch, heads, length, size).transpose(1, 2)


def _side_by_side(heads: Tensor) -> Tensor:
    """`[B, heads, S, D]` → `[B, S, heads · D]`."""
    batch, _, length, _ = heads.shape
    return heads.transpose(1, 2).reshape(batch, length, -1)


def padding_bias(mask: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """A mask `[B, L]` as an additive bias `[B, 1, length, L]`: 0 for a position that is seen, else the lowest number.

    Causality is not in it: the operator adds that itself.
    """
    zero, lowest = torch.zeros((), dtype=dtype), torch.full((), torch.finfo(dtype).min, dtype=dtype)
    bias = torch.where(mask.bool(), zero, lowest)
    return bias[:, None, None, :].expand(-1, 1, length, -1)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, lambda *_, **__: None)
