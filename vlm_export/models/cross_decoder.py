"""A decoder that looks at the image through cross-attention, its cross keys and values computed once.

They are part of the cache. While the cache has none, they come from `encoder_hidden_states`; as soon as it has, the
front end cuts the encoder's states to no rows, and projecting no rows costs nothing. No `If`, no second graph, and the
cache decides by itself: one that a client hands over empty is simply filled.

transformers.js keeps `present.*.encoder.*` of the first run and ignores it afterwards, so the graph returns what it
computed anew, which later is nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm_export.models import attention
from vlm_export.models.chat import put
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
"""
_IDS = """
    token_ids = Identity (input_ids)
"""
_EMBEDDINGS = """
    embeds = Identity (inputs_embeds)
    states_mask = Identity (encoder_attention_mask)
"""


class CrossDecoderCore(nn.Module):
    """`decoder` with a flat cache of both kinds, and logits at the last position only.

    Its attribute has the model's own name, so that traced weights have the names of the merged checkpoint.
    """

    main_input = "input_ids"

    def __init__(self, decoder: PreTrainedModel):
        super().__init__()
        self.decoder = decoder

    @property
    def text_model(self) -> Any:
        """The model whose attention runs."""
        return self.decoder

    def logits(self, **arguments: Any) -> Tensor:
        """Logits, those of the last position last, `[B, kept, V]`."""
        if "logits_to_keep" in inspect.signature(self.decoder.forward).parameters:
            arguments["logits_to_keep"] = 1
        return self.decoder(**arguments).logits

    def forward(
        self,
        tokens: Tensor,
        new_states: Tensor,
        past_key_values: Sequence[Tensor],
        states_mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Ids `[B, S]` or embeddings `[B, S, H]`, `[B, R, E]` of the encoder (no rows where the cache has them), and of
        each layer four tensors, self keys and values `[B, K, P, D]` and cross keys and values `[B, K, C, D]` → logits
        `[B, 1, V]`, and of each layer self keys and values `[B, K, P + S, D]` and the new cross keys and values
        `[B, K, R, D]`. Where the encoder's rows can be padded, `states_mask` `[B, C + R]` says which are seen.
        """
        layers = [past_key_values[start : start + 4] for start in range(0, len(past_key_values), 4)]
        own = {layer: (key, value) for layer, (key, value, _, _) in enumerate(layers)}
        cross = {layer: (key, value) for layer, (_, _, key, value) in enumerate(layers)}
        fused = attention.is_fused(self.text_model)
        cache, new_cross = attention.cross_cache(own, cross, fused=fused)
        batch, length = tokens.shape[:2]
        total = own[0][0].shape[2] + length
        arguments: dict[str, Any] = {
            self.main_input: tokens,
            "encoder_hidden_states": new_states,
            "past_key_values": cache,
            "use_cache": True,
        }
        if states_mask is not None:  # as a bias: transformers leaves a mask to the attention that is chosen
            arguments["encoder_attention_mask"] = attention.padding_bias(states_mask, length, new_states.dtype)
        if fused:
            with attention.decoder_run(self.text_model, own, None, None, total) as present:
                logits = self.logits(**arguments)
            pairs = [present[layer] for layer in range(len(layers))]
        else:
            mask = torch.ones((batch, total), dtype=torch.int64)
            logits = self.logits(**arguments, attention_mask=mask)
            pairs = [(layer.keys, layer.values) for layer in cache.self_attention_cache.layers]
        outputs = [tensor for layer, pair in enumerate(pairs) for tensor in (*pair, *new_cross[layer])]
        return logits[:, -1:], *outputs


class HeadlessCrossDecoder(CrossDecoderCore):
    """A headless decoder at `path` that is fed embeddings, and the head beside it."""

    main_input = "inputs_embeds"

    def __init__(self, model: PreTrainedModel, path: str):
        nn.Module.__init__(self)
        self.path = path
        for part in (path, "lm_head"):
            put(self, part, model.get_submodule(part))

    @property
    def text_model(self) -> Any:
        """The decoder, whose attention runs."""
        return self.get_submodule(self.path)

    def logits(self, **arguments: Any) -> Tensor:
        """Logits of the last position, `[B, 1, V]`: the head runs on no other."""
        return self.lm_head(self.text_model(**arguments).last_hidden_state[:, -1:])  # type: ignore[operator]


def cross_decoder(geometry: Geometry, encoder_hidden: int) -> Component:
    """`decoder_model_merged` of an encoder-decoder: ids, the encoder's states, and a cache with a part for each."""
    return _merged(
        geometry,
        encoder_hidden,
        lambda model: CrossDecoderCore(model.decoder),
        (TensorSpec("input_ids", "int64", ("batch_size", "decoder_sequence_length")),),
        (TensorSpec("token_ids", "int64", ("batch_size", "sequence_length")),),
        _IDS,
    )


def embedded_cross_decoder(geometry: Geometry, encoder_hidden: int, path: str) -> Component:
    """`decoder_model_merged` of a decoder at `path`: embeddings in the place of ids, and a mask of the states' rows."""
    hidden = geometry.hidden
    return _merged(
        geometry,
        encoder_hidden,
        lambda model: HeadlessCrossDecoder(model, path),
        (
            TensorSpec("inputs_embeds", "float32", ("batch_size", "decoder_sequence_length", hidden)),
            TensorSpec("encoder_attention_mask", "int64", ("batch_size", "encoder_sequence_length")),
        ),
        (
            TensorSpec("embeds", "float32", ("batch_size", "sequence_length", hidden)),
            TensorSpec("states_mask", "int64", ("batch_size", "seen_sequence_length")),
        ),
        _EMBEDDINGS,
    )


def _merged(
    geometry: Geometry,
    encoder_hidden: int,
    module: Callable[[Any], nn.Module],
    fed: tuple[TensorSpec, ...],
    traced: tuple[TensorSpec, ...],
    text: str,
) -> Component:
    """`decoder_model_merged`: what is fed, what the tracer sees of it (tokens first), and how `text` makes the one of
    the other.
    """
    states = TensorSpec("encoder_hidden_states", "float32", ("batch_size", "encoder_sequence_length", encoder_hidden))
    past = _cache(geometry, "past_key_values", "past_sequence_length", "past_encoder_sequence_length")
    tokens, *others = traced
    return Component(
        name="decoder_model_merged",
        module=module,
        inputs=(*fed, states, *past),
        outputs=(
            TensorSpec("logits", "float32", ("batch_size", 1, geometry.vocabulary)),
            *_cache(geometry, "present", "present_sequence_length", "new_encoder_sequence_length"),
        ),
        traced_inputs=(
            tokens,
            TensorSpec("new_states", "float32", ("batch_size", "new_encoder_sequence_length", encoder_hidden)),
            *past,
            *others,
        ),
        front_end=FrontEnd(_STATES_ONCE + text),
    )


def _cache(geometry: Geometry, prefix: str, own_length: str, cross_length: str) -> tuple[TensorSpec, ...]:
    """The flat cache, float32 `[batch_size, kv_heads, length, head_dim]`, as transformers.js names that of TrOCR."""
    heads, size = geometry.pairs.kv_heads, geometry.pairs.head_dim
    return tuple(
        TensorSpec(f"{prefix}.{layer}.{kind}.{part}", "float32", ("batch_size", heads, length, size))
        for layer in range(geometry.layers)
        for kind, length in (("decoder", own_length), ("encoder", cross_length))
        for part in ("key", "value")
    )
