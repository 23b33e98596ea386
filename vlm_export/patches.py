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
from types import MethodType, ModuleType
from typing import Any

import torch
import transformers.models.pixtral
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import Lfm2VlConfig, PretrainedConfig
from transformers.image_processing_backends import TorchvisionBackend
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.bart.modeling_bart import BartAttention
from transformers.models.trocr.modeling_trocr import TrOCRAttention
from transformers.utils.import_utils import is_torchvision_available

_MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


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


@contextmanager
def image_processor_without_torchvision(name: str | None) -> Iterator[None]:
    """Within, transformers has its image processor of LFM2-VL where torchvision is not installed, if that is the one.

    There is none for Pillow, and the other wants torchvision for two steps: what that hands to torch, torch is given
    here. Drop this when there is one for Pillow (transformers 5.23 has none).
    """
    if is_torchvision_available() or (name or "").removesuffix("Fast") != "Lfm2VlImageProcessor":
        yield
        return
    known = IMAGE_PROCESSOR_MAPPING._extra_content
    known[Lfm2VlConfig] = {"pil": _lfm2_vl_image_processor()}
    try:
        yield
    finally:
        del known[Lfm2VlConfig]


@cache
def _lfm2_vl_image_processor() -> type:
    wanted = "torchvision.transforms.v2"
    module = ModuleType(wanted)
    module.functional = ModuleType(f"{wanted}.functional")  # type: ignore[attr-defined] # names types, which nobody asks
    sys.modules[wanted] = module
    try:
        found: Any = importlib.import_module("transformers.models.lfm2_vl.image_processing_lfm2_vl")
    finally:
        del sys.modules[wanted]
    library = found.Lfm2VlImageProcessor
    return type(library.__name__, (library, _StepsOnTorch), {})


class _StepsOnTorch(TorchvisionBackend):
    """The two steps of an image processor that torchvision takes, as it takes them on a CPU.

    Source: torchvision 0.28, `resize_image` and `normalize_image` in `transforms/v2/functional`.
    """

    def resize(self, image: Tensor, size: Any, resample: Any = None, antialias: bool = True, **_: Any) -> Tensor:
        """`[…, 3, h, w] uint8` to height and width of `size`, by torch's own filters."""
        wanted = (size.height, size.width)
        if tuple(image.shape[-2:]) == wanted:
            return image
        mode = _MODES[Image.Resampling.BILINEAR if resample is None else Image.Resampling(resample)]
        pictures = image.reshape(-1, *image.shape[-3:])
        made = functional.interpolate(pictures, size=wanted, mode=mode, align_corners=False, antialias=antialias)
        return made.reshape(*image.shape[:-2], *wanted)

    def normalize(self, image: Any, mean: Any, std: Any, *_: Any, **__: Any) -> Any:
        """`[…, 3, h, w] float32` by a mean and a deviation of each channel."""
        means, deviations = (torch.as_tensor(values, dtype=image.dtype).view(-1, 1, 1) for values in (mean, std))
        return (image - means) / deviations
