"""What is changed in other libraries: each for as long as a block, and put back behind it.

Each entry says what goes wrong without it, why, and when it can be dropped. A name that is no longer there is an
AttributeError or a KeyError of the block, not a patch of nothing.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any

import transformers.models.pixtral
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig
from transformers.models.bart.modeling_bart import BartAttention
from transformers.models.trocr.modeling_trocr import TrOCRAttention
from transformers.utils.import_utils import is_torchvision_available


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within, an attribute of a Python module, an `nn.Module` or its class has another value."""
    before = getattr(owner, name)
    own = name in vars(owner) or name in vars(owner).get("_buffers", ())
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


@contextmanager
def operators_read_once() -> Iterator[None]:
    """Within, the exporter makes its table of operators once a process, in place of once a call.

    Making it parses a thousand functions, a fifth of the time that a small graph takes; nobody here adds to it. Drop
    this when torch keeps it itself (torch 2.13 does not).
    """
    from torch.onnx._internal.exporter._registration import ONNXRegistry  # imports the exporter

    make = ONNXRegistry.__dict__["from_torchlib"]
    setattr(ONNXRegistry, "from_torchlib", staticmethod(_once(ONNXRegistry.from_torchlib)))  # noqa: B010 (mypy)
    try:
        yield
    finally:
        setattr(ONNXRegistry, "from_torchlib", make)  # noqa: B010 (mypy)


@cache
def _once(make: Callable[..., Any]) -> Callable[..., Any]:
    """A function's first result for the same arguments, from then on."""
    return cache(make)


@contextmanager
def no_word_of_torchvision() -> Iterator[None]:
    """Within, the exporter's log has errors alone.

    It warns of every operator of torchvision that is not installed, none of which a graph here has. Drop this when it
    warns of those that a model uses (torch 2.13 does not).
    """
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@contextmanager
def trocr_asks_the_interface(layers: Mapping[TrOCRAttention, PretrainedConfig]) -> Iterator[None]:
    """Within, TrOCR's attention layers ask transformers' attention interface, under the config that is given for each.

    TrOCR writes attention out in plain operators; Bart's, of which it is a copy, asks the interface. Drop this when
    TrOCRAttention calls ALL_ATTENTION_FUNCTIONS (transformers 5.23 does not).
    """

    def forward(self: Any, hidden_states: Tensor, key_value_states: Tensor | None = None, **keywords: Any) -> Any:
        self.is_causal = key_value_states is None
        keywords.pop("output_attentions", None)
        return BartAttention.forward(self, hidden_states, key_value_states, **keywords)

    changed = ("config", "forward", "is_causal")
    before = [{name: vars(layer)[name] for name in changed if name in vars(layer)} for layer in layers]
    for layer, config in layers.items():
        layer.__dict__ |= {"config": config, "forward": MethodType(forward, layer)}
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            for name in changed:
                layer.__dict__.pop(name, None)
            layer.__dict__ |= own


@contextmanager
def torchs_attention(attention: Callable[..., Tensor]) -> Iterator[None]:
    """Within, `functional.scaled_dot_product_attention` is another function.

    timm's models call it directly, and no interface. Drop this when they can be told which attention to use (timm 1.0
    cannot).
    """
    with replaced(functional, "scaled_dot_product_attention", attention):
        yield


@contextmanager
def pixtral_processor_without_torchvision() -> Iterator[None]:
    """Within, transformers has its PixtralProcessor where torchvision is not installed.

    It is refused there, because its module takes one function from that of the image processor for torchvision; the
    module for Pillow has the same. Drop this when it takes that one (transformers 5.23 does not).
    """
    if is_torchvision_available():
        yield
        return
    found, name = _pixtral_processor(), "PixtralProcessor"
    with replaced(transformers, name, found), replaced(transformers.models.pixtral, name, found):
        yield


@cache
def _pixtral_processor() -> type:
    package = transformers.models.pixtral.__name__
    wanted = f"{package}.image_processing_pixtral"
    sys.modules[wanted] = importlib.import_module(f"{package}.image_processing_pil_pixtral")
    try:
        return importlib.import_module(f"{package}.processing_pixtral").PixtralProcessor
    finally:
        del sys.modules[wanted]
