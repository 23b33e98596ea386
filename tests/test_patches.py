"""vlm_export.patches: what is changed in other libraries is put back, whatever happens within; nested ones too."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any

import pico
import pytest
from torch.nn import functional
from torch.onnx._internal.exporter._registration import ONNXRegistry
from transformers import TrOCRConfig
from transformers.models.trocr.modeling_trocr import TrOCRAttention

from vlm_export import patches
from vlm_export.models import attention
from vlm_export.models.prefix import PrefixConditioningVLM


def layer() -> TrOCRAttention:
    return TrOCRAttention(TrOCRConfig(d_model=8, decoder_attention_heads=2), 8, 2, layer_idx=0)


LAYER = layer()
PATCHES: dict[str, tuple[Any, Any]] = {
    "an attribute": (lambda: patches.replaced(functional, "relu", abs), lambda: functional.relu),
    "operators_read_once": (patches.operators_read_once, lambda: ONNXRegistry.__dict__["from_torchlib"]),
    "no_word_of_torchvision": (patches.no_word_of_torchvision, lambda: logging.getLogger("torch.onnx").level),
    "trocr": (lambda: patches.trocr_asks_the_interface({LAYER: TrOCRConfig()}), lambda: dict(vars(LAYER))),
    "torchs_attention": (lambda: patches.torchs_attention(max), lambda: functional.scaled_dot_product_attention),
}


@pytest.mark.parametrize("name", PATCHES)
def test_it_is_put_back(name: str) -> None:
    make, look = PATCHES[name]
    before = look()

    def fail(context: AbstractContextManager[None]) -> None:
        with context:
            assert look() != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail(make())
    assert look() == before
    with make():
        with make():
            pass
        assert look() != before
    assert look() == before


def test_a_name_that_is_gone_is_an_error() -> None:
    with pytest.raises(AttributeError), patches.replaced(functional, "no_such_function", max):
        pass


def test_attention_of_one_model_inside_another_s() -> None:
    """What was noted of the inner one stays its own, and the outer one's attention is in force again behind it."""
    outer, inner = (PrefixConditioningVLM(pico.config()) for _ in range(2))
    before = outer.language_model.config._attn_implementation
    with attention.fused(outer) as noted:
        with attention.fused(inner) as own:
            assert own is not noted
            assert attention.is_fused(inner.language_model)
        assert attention.is_fused(outer.language_model) and not attention.is_fused(inner.language_model)
    assert outer.language_model.config._attn_implementation == before
