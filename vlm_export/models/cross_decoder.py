"""A decoder that looks at the image through cross-attention, its cross keys and values computed once.

They are part of the cache. While the cache has none, they come from `encoder_hidden_states`; as soon as it has, the
front end cuts the encoder's states to no rows, and projecting no rows costs nothing. No `If`, no second graph, and the
cache decides by itself: one that a client hands over empty is simply filled.

transformers.js keeps `present.*.encoder.*` of the first run and ignores it afterwards, so the graph returns what it
computed anew, which later is nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm_export.models import attention
from vlm_export.models.decoder import Geometry
from vlm_export.spec.graph import Component, FrontEnd, TensorSpec

# `cross_past` is the cross key cache of layer 0.
_STATES_ONCE = """
    none = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    carried = Shape <start = 2, end = 3> (cross_past)
    nothing_carried = Equal (carried, none)
    first = Cast <to = 7> (nothing_carried)
    rows = Shape <start = 1, end = 2> (encoder_hidden_states)
    wanted_rows = Mul (rows, first)
    new_states = Slice (encoder_hidden_states, none, wanted_rows, one)
    token_ids = Identity (input_ids)
"""


class CrossDecoderCore(nn.Module):
    """`decoder` with a flat cache of both kinds, and logits at the last position only.

    Its attribute has the model's own name, so that traced weights have the names of the merged checkpoint.
    """

    def __init__(self, decoder: PreTrainedModel):
        super().__init__()
        self.decoder = decoder

    def forward(self, token_ids: Tensor, new_states: Tensor, past_key_values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`[B, S]`, `[B, R, E]` of the encoder (no rows where the cache has them), and of each layer four tensors, self
        keys and values `[B, K, P, D]` and cross keys and values `[B, K, C, D]` → logits `[B, 1, V]`, and of each layer
        self keys and values `[B, K, P + S, D]` and the new cross keys and values `[B, K, R, D]`.
        """
        layers = [past_key_values[start : start + 4] for start in range(0, len(past_key_values), 4)]
        own = [tensor for key, value, _, _ in layers for tensor in (key, value)]
        cross = [tensor for _, _, key, value in layers for tensor in (key, value)]
        fused = attention.is_fused(self.decoder)
        cache, new_cross = attention.cross_cache(own, cross, fused=fused)
        total = own[0].shape[2] + token_ids.shape[1]
        arguments: dict[str, Any] = {
            "input_ids": token_ids,
            "encoder_hidden_states": new_states,
            "past_key_values": cache,
            "use_cache": True,
        }
        if "logits_to_keep" in inspect.signature(self.decoder.forward).parameters:
            arguments["logits_to_keep"] = 1
        if fused:
            with attention.decoder_run(self.decoder, own, None, None, total) as present:
                logits = self.decoder(**arguments).logits
            pairs = [present[layer] for layer in range(len(layers))]
        else:
            mask = token_ids.new_ones((token_ids.shape[0], total))
            logits = self.decoder(**arguments, attention_mask=mask).logits
            pairs = [(layer.keys, layer.values) for layer in cache.self_attention_cache.layers]
        outputs = [tensor for layer, pair in enumerate(pairs) for tensor in (*pair, *new_cross[layer])]
        return logits[:, -1:], *outputs


def cross_decoder(geometry: Geometry, encoder_hidden: int) -> Component:
    """`decoder_model_merged` of an encoder-decoder: ids, the encoder's states, and a cache with a part for each."""
    states = TensorSpec("encoder_hidden_states", "float32", ("batch_size", "encoder_sequence_length", encoder_hidden))
    ids = TensorSpec("input_ids", "int64", ("batch_size", "decoder_sequence_length"))
    past = _cache(geometry, "past_key_values", "past_sequence_length", "past_encoder_sequence_length")
    return Component(
        name="decoder_model_merged",
        module=lambda model: CrossDecoderCore(model.decoder),
        inputs=(ids, states, *past),
        outputs=(
            TensorSpec("logits", "float32", ("batch_size", 1, geometry.vocabulary)),
            *_cache(geometry, "present", "present_sequence_length", "new_encoder_sequence_length"),
        ),
        traced_inputs=(
            TensorSpec("token_ids", "int64", ("batch_size", "sequence_length")),
            TensorSpec("new_states", "float32", ("batch_size", "new_encoder_sequence_length", encoder_hidden)),
            *past,
        ),
        front_end=FrontEnd(_STATES_ONCE),
    )


def _cache(geometry: Geometry, prefix: str, own_length: str, cross_length: str) -> tuple[TensorSpec, ...]:
    """The flat cache, float32 `[batch_size, kv_heads, length, head_dim]`, as transformers.js names that of TrOCR."""
    return tuple(
        TensorSpec(
            f"{prefix}.{layer}.{kind}.{part}", "float32", ("batch_size", geometry.kv_heads, length, geometry.head_dim)
        )
        for layer in range(geometry.layers)
        for kind, length in (("decoder", own_length), ("encoder", cross_length))
        for part in ("key", "value")
    )
