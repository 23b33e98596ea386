"""A table of tokens that was resized for a fine-tune: `resize_token_embeddings`, with the new rows in the adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlm_export.errors import InputError
from vlm_export.merging.adapters import Adapter
from vlm_export.source.checkpoint import Checkpoint
from vlm_export.tensors.stored import Weight


@dataclass(frozen=True)
class Resized:
    """A weight with another number of rows: its own, then zeros until an adapter brings what belongs there."""

    original: Weight
    rows: int

    @property
    def dtype(self) -> str:
        """The original weight's dtype."""
        return self.original.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The original weight's shape, with the new number of rows."""
        return (self.rows, *self.original.shape[1:])

    def load(self) -> torch.Tensor:
        """`[rows, …]`: the original's rows, cut off or followed by zeros."""
        value = self.original.load()
        return torch.cat([value[: self.rows], value.new_zeros(max(0, self.rows - len(value)), *value.shape[1:])])

    def rounded(self, value: torch.Tensor) -> torch.Tensor:
        """What would be left of `value` in the form of the original weight."""
        return self.original.rounded(value)

    def __str__(self) -> str:
        return str(self.original)


def rows_of(adapters: Sequence[Adapter], checkpoint: Checkpoint, model: nn.Module) -> int:
    """The rows of the token table that the adapters were trained with: the model's, unless they say otherwise.

    Raises:
        InputError: they say different things.
    """
    rows = checkpoint.family.text_config(checkpoint.config).vocab_size
    tables = {name: module for name, module in model.named_modules() if _has_rows(module, rows)}
    said = {count: where for adapter in adapters for count, where in _said(adapter, tables, rows)}
    others = {count: where for count, where in said.items() if count != rows}
    if len(others) > 1:
        (one, first), (other, second), *_ = others.items()
        raise InputError(f"{first}: is of a table of {one} tokens, and {second} is of one of {other}")
    return next(iter(others), rows)


def with_rows(checkpoint: Checkpoint, rows: int) -> dict[str, Any]:
    """The config of a model whose token table has `rows` rows.

    Raises:
        InputError: the family's config does not say how many there are.
    """
    old = checkpoint.family.text_config(checkpoint.config).vocab_size
    config = _replaced(checkpoint.config, old, rows)
    for key in ("text_config", "decoder"):
        if checkpoint.family.text_config(config).vocab_size != rows and isinstance(config.get(key), dict):
            config = {**config, key: {**config[key], "vocab_size": rows}}
    if checkpoint.family.text_config(config).vocab_size != rows:
        raise InputError(
            f"{checkpoint.path / 'config.json'}: says nowhere that there are {old} tokens, and the adapter has {rows}: "
            "save the resized model first"
        )
    return config


def check_new_rows(adapters: Sequence[Adapter], weights: Mapping[str, tuple[Weight, bool]]) -> None:
    """Raises InputError where a resized weight has new rows that no adapter brings.

    What transformers puts there is random, so there is nothing that they could be.

    Args:
        adapters: those that were merged.
        weights: every weight, as it was before anything was merged into it, and whether something was.
    """
    trained = {index for adapter in adapters for index in _trained_tokens(adapter)}
    for name, (weight, is_merged_into) in weights.items():
        if not isinstance(weight, Resized):
            continue
        new = set(range(weight.original.shape[0], weight.rows))
        if new and not (is_merged_into and trained >= new):
            raise InputError(
                f"{adapters[-1].source.parent}: has {weight.rows} tokens, the model "
                f"{weight.original.shape[0]}, and {name} lacks the new rows: save it with `save_embedding_layers=True`"
            )


def _has_rows(module: nn.Module, rows: int) -> bool:
    return (isinstance(module, nn.Embedding) and module.num_embeddings == rows) or (
        isinstance(module, nn.Linear) and module.out_features == rows
    )


def _said(adapter: Adapter, tables: Mapping[str, nn.Module], rows: int) -> Iterator[tuple[int, str]]:
    """The numbers of rows that an adapter's tensors and settings are for, and where each says so."""
    for name, weight in adapter.tensors.items():
        module, _, part = (adapter.root + name).rpartition(".")
        module = module.removesuffix(".base_layer")
        if module in tables and part in ("weight", "bias"):
            yield weight.shape[0], str(weight)
        for suffix, axis in ((".lora_B", 0), (".lora_embedding_A", 1)):
            whole = (adapter.root + name).removesuffix(".weight")
            if whole.endswith(suffix) and whole.removesuffix(suffix) in tables:
                yield weight.shape[axis], str(weight)
    last = max(_trained_tokens(adapter), default=-1)
    if last >= rows:
        yield last + 1, f"{adapter.source}: trainable_token_indices"


def _trained_tokens(adapter: Adapter) -> list[int]:
    indices = getattr(adapter.config, "trainable_token_indices", None) or []
    return [index for part in indices.values() for index in part] if isinstance(indices, Mapping) else list(indices)


def _replaced(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """A config that says `new` wherever it said that there are `old` tokens, at every level."""
    nested = {key: _replaced(value, old, new) for key, value in config.items() if isinstance(value, Mapping)}
    replaced = {**config, **nested}
    return replaced | {"vocab_size": new} if config.get("vocab_size") == old else replaced
