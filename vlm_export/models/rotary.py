"""Rotary embedding as an operator of ONNX Runtime, of its own or inside GroupQueryAttention.

A model computes cosines and sines with its module `rotary_emb` and rotates with its function `apply_rotary_pos_emb`.
The module stays, so that every kind of rope is the model's own: scaled ones, two in one model, layers without any. In
the place of the function, `com.microsoft::RotaryEmbedding` takes one row of cosines and sines a token, which holds with
padding and rotates a part of a head too. Without padding GroupQueryAttention does the same itself, from a table over
all positions. Contracts: onnxruntime's `docs/ContribOperators.md`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vlm_export import patches
from vlm_export.contract import ROTATED_MULTIPLE

_FUNCTION = "apply_rotary_pos_emb"
_OF_LENGTH = ("dynamic", "longrope")  # kinds of rope whose frequencies depend on the length of the sequence

Tables = tuple[Tensor, Tensor]  # cosines and sines, [positions, rotated size / 2] each


@dataclass(frozen=True)
class Rotated:
    """A rotation that GroupQueryAttention may do instead: what came out, what went in, and all positions' tables."""

    query: Tensor
    key: Tensor
    before: tuple[Tensor, Tensor]
    tables: Tables
    interleaved: bool


class Rotary:
    """The rotations of one run of a decoder while it is traced.

    `length` is the number of positions after the run; None says that padding shifts them. `unfused` says why rotations
    stay plain operators, if they do.
    """

    def __init__(self, language_model: PreTrainedModel, position_ids: Tensor | None, length: int | None):
        self.module = getattr(language_model.base_model, "rotary_emb", None)
        self.modeling = sys.modules[type(language_model).__module__]
        self.position_ids = position_ids
        self.positions = None if length is None else torch.arange(length).unsqueeze(0)
        self.unfused = ""
        self._function: Callable[..., Any] = getattr(self.modeling, _FUNCTION, None)  # type: ignore[assignment]
        self._rows: dict[int, tuple[Tensor, tuple[Tensor, Tables]]] = {}
        self._tables: dict[int, tuple[Tensor, Tables]] = {}
        self._rotated: list[Rotated] = []

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Within, the model's rotations are ours."""
        if self.module is None or self.position_ids is None:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(_frequencies_of_length(self.module, self.position_ids))
            if self._function is None:
                self.unfused = f"{self.modeling.__name__} has no {_FUNCTION}"
            elif rotation(self._function) is None:
                self.unfused = f"{self.modeling.__name__}.{_FUNCTION} does not rotate halves or pairs of a head"
            else:
                stack.enter_context(patches.replaced(self.modeling, _FUNCTION, self._rotate))
                if self.positions is not None:
                    stack.enter_context(patches.replaced(self.module, "forward", self._forward))
            yield

    def inside(self, query: Tensor, key: Tensor) -> Rotated | None:
        """The rotation of exactly these queries and keys, if GroupQueryAttention can do it."""
        last = self._rotated[-1] if self._rotated else None
        return last if last is not None and last.query is query and last.key is key else None

    def _forward(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        """In the place of `rotary_emb.forward`: beside the tokens' cosines and sines, those of all positions."""
        forward: Callable[..., tuple[Tensor, Tensor]] = type(self.module).forward  # type: ignore[union-attr]
        bound = inspect.signature(forward).bind(self.module, *arguments, **keywords)
        cos, sin = forward(*bound.args, **bound.kwargs)
        bound.arguments["position_ids"] = self.positions
        self._tables[id(cos)] = cos, self._once(*forward(*bound.args, **bound.kwargs))
        return cos, sin

    def _once(self, cos: Tensor, sin: Tensor) -> Tables:
        """`[B, S, n]` each → `[B · S, n / 2]`: every angle once."""
        return (_twins if rotation(self._function) == "twins" else _halves)(cos, sin)

    def _rotate(
        self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """In the place of `apply_rotary_pos_emb`: `[B, heads, S, D]` each, `[B, S, rotated size]` each."""
        if unsqueeze_dim != 1 or cos.dim() != 3:
            self.unfused = f"{self.modeling.__name__} rotates tensors of other axes than [batch, heads, positions]"
            return self._function(query, key, cos, sin, unsqueeze_dim)
        interleaved = rotation(self._function) in ("pairs", "twins")
        if id(cos) not in self._rows:
            batch, length, _ = cos.shape
            rows = torch.arange(batch * length).reshape(batch, length)
            self._rows[id(cos)] = cos, (rows, self._once(cos, sin))
        _, (rows, tables) = self._rows[id(cos)]
        made = tuple(_rotary_embedding(heads, rows, tables, interleaved) for heads in (query, key))
        if (
            id(cos) in self._tables
            and query.shape[-1] % ROTATED_MULTIPLE == 0
            and cos.shape[-1] % ROTATED_MULTIPLE == 0
        ):
            self._rotated.append(Rotated(made[0], made[1], (query, key), self._tables[id(cos)][1], interleaved))
        return made[0], made[1]


def rotate_heads(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads `[1, heads, S, D]` rotated by halves, by cosines and sines `[S, D]` whose second halves repeat the first.

    It is for a trace: `com.microsoft::RotaryEmbedding`.
    """
    return _rotary_embedding(heads, torch.arange(heads.shape[2])[None], _halves(cos[None], sin[None]), False)


def find_rotation(language_model: PreTrainedModel) -> str | None:
    """What the model's `apply_rotary_pos_emb` does (see `rotation`), or None if it has none."""
    function = getattr(sys.modules[type(language_model).__module__], _FUNCTION, None)
    return None if function is None else rotation(function)


@lru_cache
def rotation(function: Callable[..., Any]) -> str | None:
    """What an `apply_rotary_pos_emb` does to a head, by trying it.

    It rotates "halves" or "pairs" by tables whose second half repeats the first, or "twins", pairs by tables in which
    each angle comes twice in a row; or does neither (None). A function that takes heads larger than the rotated size
    must pass the rest through.
    """
    angles = torch.rand(1, 3, 4, generator=torch.Generator().manual_seed(0))
    halves = (torch.cat([part, part], dim=-1) for part in (angles.cos(), angles.sin()))
    twins = (part.repeat_interleave(2, dim=-1) for part in (angles.cos(), angles.sin()))
    found = _tried(function, angles, *halves)
    return found if found or _tried(function, angles, *twins) != "pairs" else "twins"


def _tried(function: Callable[..., Any], angles: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Whether a function rotates "halves" or "pairs" by these tables of the angles."""
    generator = torch.Generator().manual_seed(1)
    found = {"halves", "pairs"}
    for size in (8, 12):
        heads = torch.rand(1, 2, 3, size, generator=generator)
        try:
            query, key = function(heads, heads[:, :1], cos, sin)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            if size == 8:
                return None
            continue
        for kind in tuple(found):
            expected = _rotate_plainly(heads, angles, kind)
            if not (_is_same(query, expected) and _is_same(key, expected[:, :1])):
                found.discard(kind)
    return next(iter(found), None)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Equal but for float32's roundings of what was added up, in whatever order."""
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-5 * other.abs().max())


def _rotate_plainly(heads: Tensor, angles: Tensor, kind: str) -> Tensor:
    """The definition: numbers i and i + n / 2 ("halves") or 2i and 2i + 1 ("pairs") of the first n turn by angle i."""
    count = 2 * angles.shape[-1]
    turned, rest = heads[..., :count], heads[..., count:]
    axes = (2, count // 2) if kind == "halves" else (count // 2, 2)
    one, two = turned.unflatten(-1, axes).unbind(-2 if kind == "halves" else -1)
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    parts = [one * cos - two * sin, two * cos + one * sin]
    turned = torch.cat(parts, dim=-1) if kind == "halves" else torch.stack(parts, dim=-1).flatten(-2)
    return torch.cat([turned, rest], dim=-1)


def _halves(cos: Tensor, sin: Tensor) -> Tables:
    """`[B, S, n]` → `[B · S, n / 2]`: the second half repeats the first."""
    size = cos.shape[-1]
    return cos.reshape(-1, size)[:, : size // 2], sin.reshape(-1, size)[:, : size // 2]


def _twins(cos: Tensor, sin: Tensor) -> Tables:
    """`[B, S, n]` → `[B · S, n / 2]`: each comes twice in a row."""
    size = cos.shape[-1]
    return cos.reshape(-1, size)[:, ::2], sin.reshape(-1, size)[:, ::2]


def _rotary_embedding(heads: Tensor, rows: Tensor, tables: Tables, interleaved: bool) -> Tensor:
    batch, count, length, size = heads.shape
    rotated = 2 * tables[0].shape[-1]
    attributes: dict[str, Any] = {"interleaved": 1} if interleaved else {}
    if rotated != size:
        attributes |= {"num_heads": count, "rotary_embedding_dim": rotated}
    side_by_side = heads.transpose(1, 2).reshape(batch, length, count * size)
    made = torch.onnx.ops.symbolic(
        "com.microsoft::RotaryEmbedding",
        [side_by_side, rows, *tables],
        attrs=attributes,
        dtype=heads.dtype,
        shape=side_by_side.shape,
        version=1,
    )
    return made.reshape(batch, length, count, size).transpose(1, 2)


@contextmanager
def _frequencies_of_length(module: nn.Module, position_ids: Tensor) -> Iterator[None]:
    """Within, frequencies that depend on the length are computed in the graph.

    transformers changes the module's buffer when the length does; a trace would keep one length's for ever.
    """
    kind = getattr(module, "rope_type", None)
    if kind not in _OF_LENGTH:
        yield
        return
    config: Any = module.config
    length = position_ids.max() + 1
    if kind == "longrope":
        limit = config.rope_parameters["original_max_position_embeddings"]
        short, long = (ROPE_INIT_FUNCTIONS[kind](config, seq_len=size)[0] for size in (limit, limit + 1))
        frequencies = torch.where(length > limit, long, short)
    else:
        frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
    with patches.replaced(module, "inv_freq", frequencies), patches.replaced(module, "rope_type", "default"):
        yield
