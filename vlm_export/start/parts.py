"""Which part of a model each tensor of a checkpoint belongs to, by its name as any version of transformers wrote it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from vlm_export.start.headers import Header

PartName = Literal["vision tower", "projector", "token table", "text encoder", "decoder", "head", "LoRA", "not used"]
_TOWER_PART: PartName = "vision tower"
PARTS: tuple[PartName, ...] = (
    "vision tower",
    "projector",
    "token table",
    "text encoder",
    "decoder",
    "head",
    "LoRA",
    "not used",
)
_LORA = re.compile(r"\.lora_\w+(\.|$)")
_NOT_USED = re.compile(
    r"\.original_module\.|(^|\.)(position_ids|inv_freq|masked_bias)$|"
    r"(^encoder|vision_\w+)\.(.*\.)?(pooler|head)\.|h\.\d+\.attn\.bias$"
)
_TOWER = re.compile(r"(^|\.)(vision_tower|vision_model|vision_encoder|visual)\.|^encoder\.")
_IN_TOWER = re.compile(r"(^|\.)visual\.(merger|deepstack_merger_list|downsample)\.")  # and a projector all the same
_PROJECTOR = re.compile(
    r"(^|\.)(multi_modal_projector|mm_projector|connector|aligner|(vision_)?projection|enc_to_dec_proj)\."
)
_TEXT_ENCODER = re.compile(r"(^|\.)language_model\.(model\.)?encoder\.")
_LAYER = re.compile(r"\.layers?\.(\d+)\.")
_HEAD = re.compile(r"(^|\.)(lm_head|output_projection|embed_out|cls\.predictions\.decoder)\.(base_layer\.)?weight$")
_TABLE = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|shared)\.(base_layer\.)?weight$")


@dataclass(frozen=True)
class Placed(Header):
    """A tensor, and the part of the model that it belongs to."""

    part: PartName


@dataclass(frozen=True)
class Part:
    """A part of a checkpoint; `dtypes` by how many numbers are stored in each, the most first."""

    name: PartName
    tensors: int
    parameters: int
    size_bytes: int
    dtypes: Mapping[str, int]


def place(headers: Sequence[Header], config: Mapping[str, Any]) -> tuple[Placed, ...]:
    """Every tensor with its part.

    Layers of the tower above those that `vision_feature_layer` reads are not used, nor are those of the decoder above
    the last that the config counts, which predict further tokens.
    """
    placed = [Placed(each.key, each.dtype, each.shape, _part_of(each.key)) for each in headers]
    text = config.get("text_config")
    layers_of_text = text.get("num_hidden_layers") if isinstance(text, Mapping) else None
    if isinstance(layers_of_text, int):
        placed = [replace(each, part="not used") if _is_further(each, layers_of_text) else each for each in placed]
    chosen = config.get("vision_feature_layer")
    layers = [int(found[1]) + 1 for each in placed if each.part == _TOWER_PART and (found := _LAYER.search(each.key))]
    if chosen is None or not layers:
        return tuple(placed)
    states = max(layers) + 1  # the first is what the layers begin with
    read = max(layer % states for layer in ([chosen] if isinstance(chosen, int) else chosen))
    return tuple(replace(each, part="not used") if _is_above(each, read) else each for each in placed)


def _is_further(placed: Placed, layers: int) -> bool:
    """Whether a tensor of the decoder is of a layer behind so many."""
    layer = _LAYER.search(placed.key)
    return placed.part == "decoder" and layer is not None and int(layer[1]) >= layers


def _is_above(placed: Placed, layers: int) -> bool:
    """Whether a tensor is behind so many layers of the tower: of a later one, or of the norm after the last."""
    if placed.part != _TOWER_PART:
        return False
    layer = _LAYER.search(placed.key)
    return int(layer[1]) >= layers if layer else ".post_layernorm." in placed.key


def _part_of(key: str) -> PartName:
    if _LORA.search(key):
        return "LoRA"
    if _NOT_USED.search(key):
        return "not used"
    if _TOWER.search(key):
        return "projector" if _IN_TOWER.search(key) else _TOWER_PART
    if _PROJECTOR.search(key):
        return "projector"
    if _HEAD.search(key):
        return "head"
    if _TABLE.search(key):
        return "token table"
    return "text encoder" if _TEXT_ENCODER.search(key) else "decoder"


def parts_of(tensors: Iterable[Placed]) -> list[Part]:
    """The parts that are there, in the order in which an image passes through them."""
    found: dict[PartName, list[Placed]] = {}
    for tensor in tensors:
        found.setdefault(tensor.part, []).append(tensor)
    return [_part(name, found[name]) for name in PARTS if name in found]


def _part(name: PartName, tensors: Sequence[Placed]) -> Part:
    stored: Counter[str] = Counter()
    for tensor in tensors:
        stored[tensor.dtype] += tensor.parameters
    return Part(
        name,
        len(tensors),
        sum(tensor.parameters for tensor in tensors),
        sum(tensor.size_bytes for tensor in tensors),
        dict(stored.most_common()),
    )


def has_tied_head(config: Mapping[str, Any], tensors: Iterable[Placed]) -> bool:
    """Whether the token table is the head too: where no head is stored, or the config says so."""
    stored = any(tensor.part == "head" for tensor in tensors)
    text: Mapping[str, Any] = next(
        (config[key] for key in ("text_config", "decoder") if isinstance(config.get(key), Mapping)), {}
    )
    return not stored or text.get("tie_word_embeddings", config.get("tie_word_embeddings")) is True
