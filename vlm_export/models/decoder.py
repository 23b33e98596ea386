"""The decoder that every layout shares: one traced core, and the front ends that fit it to what a client feeds.

The core takes `inputs_embeds`, `position_ids`, `kept_positions`, an `attention_mask` where there can be padding, and
the flat cache, and knows nothing of images or token ids. What differs between layouts is put before it as ONNX text,
because it depends on whether the past is empty: something the tracer would have to decide once and for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from optimum.utils import NormalizedConfigManager, NormalizedTextConfigWithGQA
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from vlm_export.errors import InputError
from vlm_export.models import attention
from vlm_export.models.blocks import Blocks
from vlm_export.spec.cache import PAST, present_of
from vlm_export.spec.graph import Component, FrontEnd, TensorSpec

# The front ends, in ONNX's textual syntax. `past` is the key cache of layer 0, whose length is the past's; `embedding`
# is the token table, shared with a tied head. A front end that computes `past` itself stands before a first run.
_CAPTIONER = """
    none = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    past_length = Shape <start = 2, end = 3> (past)
    no_past = Equal (past_length, none)
    first = Cast <to = 7> (no_past)
    prefix_length = Shape <start = 1, end = 2> (encoder_hidden_states)
    prefix_end = Mul (prefix_length, first)
    prefix = Slice (encoder_hidden_states, none, prefix_end, one)
    ids_end = Shape <start = 1, end = 2> (input_ids)
    text_ids = Slice (input_ids, first, ids_end, one)
    text = Gather (embedding, text_ids)
    inputs_embeds = Concat <axis = 1> (prefix, text)
"""
_IDS_WITHIN_TABLE = """
    last_row = Constant <value_int = LAST_ROW> ()
    token_ids = Min (input_ids, last_row)
"""
_PREFIX_AND_PROMPT = """
    prefix_batch = Shape <start = 0, end = 1> (prefix_embeddings)
    empty_heads = Constant <value_ints = [KV_HEADS, 0, HEAD_DIM]> ()
    empty_shape = Concat <axis = 0> (prefix_batch, empty_heads)
    past = ConstantOfShape (empty_shape)
    prompt = Gather (embedding, input_ids)
    inputs_embeds = Concat <axis = 1> (prefix_embeddings, prompt)
"""
_POSITIONS_FROM_PAST = """
    step = Constant <value_int = 1> ()
    unit = Constant <value_ints = [1]> ()
    axis = Constant <value_ints = [0]> ()
    batch = Shape <start = 0, end = 1> (past)
    start = Shape <start = 2, end = 3> (past)
    length = Shape <start = 1, end = 2> (inputs_embeds)
    end = Add (start, length)
    first_position = Squeeze (start, axis)
    last_position = Squeeze (end, axis)
    positions = Range (first_position, last_position, step)
    positions_shape = Concat <axis = 0> (batch, length)
    position_ids = Expand (positions, positions_shape)
    kept_positions = Sub (length, unit)
"""
_NUM_LOGITS_TO_KEEP = """
    all = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    axis = Constant <value_ints = [0]> ()
    lengths = Shape <start = 1, end = 2> (inputs_embeds)
    length = Squeeze (lengths, axis)
    keep_all = Equal (num_logits_to_keep, all)
    wanted = Min (num_logits_to_keep, length)
    count = Where (keep_all, length, wanted)
    first_kept = Sub (length, count)
    kept_positions = Range (first_kept, length, step)
"""


@dataclass(frozen=True)
class KeyValues:
    """What an attention layer keeps: a key and a value for each position."""

    kv_heads: int
    head_dim: int

    def parts(self, layer: int, length: str) -> tuple[tuple[str, tuple[int | str, ...]], ...]:
        """Names before a run, `past_key_values.{layer}.key|value`, and shapes: heads, positions, size of a head."""
        shape = ("batch_size", self.kv_heads, length, self.head_dim)
        return tuple((f"{PAST}.{layer}.{part}", shape) for part in ("key", "value"))


@dataclass(frozen=True)
class State:
    """What another layer keeps: of one size after any number of tokens, and zeros before the first.

    `kind` is transformers.js's word for it, as in `past_conv.{layer}`.
    """

    kind: str
    sizes: tuple[int, ...]

    def parts(self, layer: int, length: str) -> tuple[tuple[str, tuple[int | str, ...]], ...]:
        """Its name before a run, and its shape `[batch_size, *sizes]`."""
        return ((f"past_{self.kind}.{layer}", ("batch_size", *self.sizes)),)


def _short_convolution(config: Any) -> State:
    """The last inputs of a convolution of `conv_L_cache` positions: the first of them is not used again."""
    return State("conv", (config.hidden_size, config.conv_L_cache))


# What layers keep that are no attention, by their name in a config's `layer_types`.
_STATES: dict[str, Callable[[Any], State]] = {"conv": _short_convolution}


@dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder: what each layer keeps. `hidden` is an embedding's size."""

    kept: tuple[KeyValues | State, ...]
    hidden: int
    vocabulary: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Geometry:
        """The sizes of a text config.

        They are read through optimum's normalized configs, which know older decoders' names; newer ones share Llama's.
        """
        names = NormalizedConfigManager._conf.get(config.model_type, NormalizedTextConfigWithGQA)
        normalized = names(config)
        heads = normalized.num_attention_heads
        pairs = KeyValues(
            kv_heads=getattr(normalized, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or normalized.hidden_size // heads,
        )
        kinds = dict(enumerate(getattr(config, "layer_types", None) or ()))
        states = {layer: _STATES[kind](config) for layer, kind in kinds.items() if kind in _STATES}
        return cls(
            kept=tuple(states.get(layer, pairs) for layer in range(normalized.num_layers)),
            hidden=getattr(config, "word_embed_proj_dim", None) or normalized.hidden_size,  # OPT may project to hidden
            vocabulary=normalized.vocab_size,
        )

    @classmethod
    def alike(cls, layers: int, *, kv_heads: int, head_dim: int, hidden: int, vocabulary: int) -> Geometry:
        """That of attention layers alone."""
        return cls((KeyValues(kv_heads, head_dim),) * layers, hidden, vocabulary)

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self.kept)

    @property
    def pairs(self) -> KeyValues:
        """What the attention layers keep, all of them alike."""
        return next(kept for kept in self.kept if isinstance(kept, KeyValues))

    @property
    def past(self) -> tuple[TensorSpec, ...]:
        """The flat cache that a run is given, float32, layer by layer."""
        return self._cache("past_sequence_length")

    @property
    def present(self) -> tuple[TensorSpec, ...]:
        """The flat cache that a run gives."""
        return tuple(replace(spec, name=present_of(spec.name)) for spec in self._cache("present_sequence_length"))

    def _cache(self, length: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name, "float32", shape)
            for layer, kept in enumerate(self.kept)
            for name, shape in kept.parts(layer, length)
        )

    def by_layer(self, flat: Sequence[Tensor]) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[int, Tensor]]:
        """The tensors of a flat cache, of which the last layers may be missing: keys and values, and states."""
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        states: dict[int, Tensor] = {}
        rest = iter(flat)
        for layer, kept in enumerate(self.kept):
            first = next(rest, None)
            if first is None:
                break
            if isinstance(kept, State):
                states[layer] = first
            else:
                pairs[layer] = (first, next(rest))
        return pairs, states


class DecoderCore(nn.Module):
    """`language_model` with a flat cache, and logits at chosen positions only.

    Its attribute has the model's own name, so that traced weights have the names of the merged checkpoint.
    """

    def __init__(self, language_model: PreTrainedModel):
        super().__init__()
        self.language_model = language_model

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        kept_positions: Tensor,
        past_key_values: Sequence[Tensor],
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """`[B, S, H]`, `[B, S]` or `[axes, B, S]`, `[kept]`, a flat cache of keys and values `[B, K, P, D]` and of
        states, and `[B, P + S]` where there can be padding → logits `[B, kept, V]`, and the cache with keys and values
        `[B, K, P + S, D]`.
        """
        text_model = self.text_model
        fused = attention.is_fused(text_model)
        past, states = Geometry.of(text_model.config).by_layer(past_key_values)
        before = next(iter(past.values()))[0].shape[2]
        total = before + inputs_embeds.shape[1]
        inputs_embeds, blocks = self.blocks(inputs_embeds, before)
        if blocks is not None and not fused:
            raise InputError(f"{type(text_model).__name__}: tokens see later ones, by attention that is none of ours")
        cache: Any = attention.decoder_cache(past, states, fused=fused)
        arguments: dict[str, Any] = {
            "inputs_embeds": inputs_embeds,
            "position_ids": position_ids,
            "past_key_values": cache,
            "use_cache": True,
        }
        if states and attention_mask is not None:  # what pads a row must not come into them
            arguments["attention_mask"] = attention_mask
        if fused:
            with attention.decoder_run(text_model, past, position_ids, attention_mask, total, blocks) as present:
                logits = self.logits(kept_positions, **arguments)
        else:
            if attention_mask is None:
                attention_mask = torch.ones((inputs_embeds.shape[0], total), dtype=torch.int64)
            logits = self.logits(kept_positions, **arguments | {"attention_mask": attention_mask})
            present = {layer: (cache.layers[layer].keys, cache.layers[layer].values) for layer in past}
        made = (present[layer] if layer in past else (cache.states[layer],) for layer in sorted({*past, *states}))
        return logits, *(tensor for of_layer in made for tensor in of_layer)

    def blocks(self, inputs_embeds: Tensor, past: int) -> tuple[Tensor, Blocks | None]:
        """`[B, S, H]` as the text model takes them, after a past of so many positions, and which tokens see later ones.

        None: each sees what is before it.
        """
        return inputs_embeds, None

    @property
    def text_model(self) -> PreTrainedModel:
        """The model whose attention runs."""
        return self.language_model

    def logits(self, kept_positions: Tensor, **arguments: Any) -> Tensor:
        """Logits of the kept positions, `[B, kept, V]`."""
        return self.language_model(**arguments, logits_to_keep=kept_positions).logits


class EmbedTokens(nn.Module):
    """Token ids `[B, S]` → `[B, S, H]`."""

    def __init__(self, language_model: PreTrainedModel):
        super().__init__()
        self.language_model = language_model

    def forward(self, token_ids: Tensor) -> Tensor:
        """Look the ids up in the model's token table."""
        return self.language_model.get_input_embeddings()(token_ids)


def position_ids(axes: int) -> TensorSpec:
    """The input `position_ids` of a text whose tokens have places along so many axes: 1, or height and width too."""
    shape = ("batch_size", "sequence_length")
    return TensorSpec("position_ids", "int64", shape if axes == 1 else (axes, *shape))


def core_inputs(geometry: Geometry, *, padded: bool, axes: int = 1) -> tuple[TensorSpec, ...]:
    """The inputs that the core is traced with; `padded` adds the attention mask, `axes` are those of positions."""
    mask = TensorSpec("attention_mask", "int64", ("batch_size", "total_sequence_length"))
    return (
        TensorSpec("inputs_embeds", "float32", ("batch_size", "sequence_length", geometry.hidden)),
        position_ids(axes),
        TensorSpec("kept_positions", "int64", ("num_logits",)),
        *geometry.past,
        *((mask,) if padded else ()),
    )


def decoder_outputs(geometry: Geometry, kept: int | str) -> tuple[TensorSpec, ...]:
    """Logits of the kept positions, and the cache with this run's tokens appended."""
    logits = TensorSpec("logits", "float32", ("batch_size", kept, geometry.vocabulary))
    return logits, *geometry.present


def core_of(model: Any) -> nn.Module:
    """The core of a model that holds a causal language model."""
    return DecoderCore(model.language_model)


def decoder(
    name: str,
    geometry: Geometry,
    front: tuple[TensorSpec, ...],
    text: str,
    *,
    past: bool,
    kept: int | str,
    core: Callable[[Any], nn.Module] = core_of,
    axes: int = 1,
) -> Component:
    """A decoder graph: the traced core behind the front end `text`, whose own inputs are `front`."""
    cache = geometry.past if past else ()
    padded = any(spec.name == "attention_mask" for spec in front)
    return Component(
        name=name,
        module=core,
        inputs=(*front, *cache),
        outputs=decoder_outputs(geometry, kept),
        traced_inputs=core_inputs(geometry, padded=padded, axes=axes),
        front_end=FrontEnd(text),
    )


def embedding_of(model: Any) -> nn.Module:
    """The token table of a model that holds a causal language model."""
    return EmbedTokens(model.language_model)


def embed_tokens(geometry: Geometry, module: Callable[[Any], nn.Module] = embedding_of) -> Component:
    """The token table as a graph of its own.

    An image token of ours has the first id after the table, so that it can never be generated; it takes the last row,
    and the client writes the image's features over it.
    """
    shape = ("batch_size", "sequence_length")
    return Component(
        name="embed_tokens",
        module=module,
        inputs=(TensorSpec("input_ids", "int64", shape),),
        outputs=(TensorSpec("inputs_embeds", "float32", (*shape, geometry.hidden)),),
        traced_inputs=(TensorSpec("token_ids", "int64", shape),),
        front_end=FrontEnd(_IDS_WITHIN_TABLE.replace("LAST_ROW", str(geometry.vocabulary - 1))),
    )


def captioner_decoder(geometry: Geometry) -> Component:
    """`decoder_model_merged` of the captioner layout: with an empty past, the prefix takes the start token's place."""
    return decoder(
        "decoder_model_merged",
        geometry,
        (
            TensorSpec("input_ids", "int64", ("batch_size", "decoder_sequence_length")),
            TensorSpec("encoder_hidden_states", "float32", ("batch_size", "encoder_sequence_length", geometry.hidden)),
        ),
        _CAPTIONER + _POSITIONS_FROM_PAST,
        past=True,
        kept=1,
    )


def chat_decoder(geometry: Geometry, core: Callable[[Any], nn.Module] = core_of, axes: int = 1) -> Component:
    """`decoder_model_merged` of the chat layout: the client merges the embeddings and says how many logits it wants.

    A token's place has so many `axes`.
    """
    return decoder(
        "decoder_model_merged",
        geometry,
        (
            TensorSpec("inputs_embeds", "float32", ("batch_size", "sequence_length", geometry.hidden)),
            TensorSpec("attention_mask", "int64", ("batch_size", "total_sequence_length")),
            position_ids(axes),
            TensorSpec("num_logits_to_keep", "int64", ()),
        ),
        _NUM_LOGITS_TO_KEEP,
        past=True,
        kept="num_logits",
        core=core,
        axes=axes,
    )


def plain_decoder(geometry: Geometry) -> Component:
    """`language_model` of the components layout: embeddings and a cache, nothing else to keep in step."""
    return decoder(
        "language_model",
        geometry,
        (TensorSpec("inputs_embeds", "float32", ("batch_size", "sequence_length", geometry.hidden)),),
        _POSITIONS_FROM_PAST,
        past=True,
        kept=1,
    )


def prefix_init(geometry: Geometry) -> Component:
    """`prefix_init` of the components layout: the first run, from prefix and prompt ids, with no past to feed."""
    return decoder(
        "prefix_init",
        geometry,
        (
            TensorSpec("prefix_embeddings", "float32", ("batch_size", "prefix_length", geometry.hidden)),
            TensorSpec("input_ids", "int64", ("batch_size", "prompt_length")),
        ),
        _PREFIX_AND_PROMPT.replace("KV_HEADS", str(geometry.pairs.kv_heads)).replace(
            "HEAD_DIM", str(geometry.pairs.head_dim)
        )
        + _POSITIONS_FROM_PAST,
        past=False,
        kept=1,
    )
