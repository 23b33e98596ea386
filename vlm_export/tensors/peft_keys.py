"""How PEFT spells the tensors of an adapter."""

from __future__ import annotations

import re

_PARTS = r"lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)"
# `….lora_A.default.weight`: how in-memory state dicts spell what PEFT saves as `….lora_A.weight`.
_WITH_ADAPTER_NAME = re.compile(
    r"(?P<part>\.lora_[AB])\.[^.]+(?P<kind>\.(?:weight|bias))$"
    r"|(?P<embedding>\.lora_embedding_[AB])\.[^.]+$"
    r"|(?P<magnitude>\.lora_magnitude_vector)(?:\.[^.]+)?\.weight$"
)
_ADAPTED = re.compile(rf"\.({_PARTS}|token_adapter|trainable_tokens_delta|base_layer)(\.|$)")
_LORA = re.compile(rf"\.{_PARTS}(\.|$)")
PEFT_ROOT = "base_model.model."  # how PEFT calls the module that it was put on


def plain_key(key: str) -> str:
    """A key as PEFT saves it, below the module that PEFT was put on, whatever the adapter was called in memory."""
    return _WITH_ADAPTER_NAME.sub(lambda found: "".join(part for part in found.groups() if part), below_root(key))


def below_root(key: str) -> str:
    """A key without PEFT's name for what is around it, which it has once for each adapter that was put on another."""
    while key.startswith(PEFT_ROOT):
        key = key.removeprefix(PEFT_ROOT)
    return key


def module_of(name: str) -> str:
    """The module that a tensor adapts; the whole name if it is of no adapter's layer."""
    return _ADAPTED.split(name, maxsplit=1)[0]


def is_adapters(name: str) -> bool:
    """Whether a tensor is of a layer that an adapter puts in a module's place."""
    return bool(_ADAPTED.search(name))


def is_lora(name: str) -> bool:
    """Whether a tensor is one of LoRA's own: a factor, its bias, a magnitude."""
    return bool(_LORA.search(name))
