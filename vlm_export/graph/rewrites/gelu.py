"""Make one operator of each form of GELU that transformers writes out in many.

`gelu` and `gelu_pytorch_tanh` come out of the tracer as `Gelu` already. Here `gelu_new` (GPT-2) and `gelu_fast`, the
same function in other words, become `Gelu(approximate="tanh")`, `gelu_python` becomes `Gelu`, and `quick_gelu` (CLIP)
`com.microsoft::QuickGelu`. SiLU stays `x * sigmoid(x)`: ONNX Runtime makes one operator of it on the CPU, and on WebGPU
looks for just this form to join it with the quantized projections around it (MatMulNBitsMlp).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern

_CUBE, _ROOT = 0.044715, math.sqrt(2 / math.pi)


def _gelu_new(op: Any, x: Any) -> Any:
    inner = op.Mul(op.Add(x, op.Mul(op.Pow(x, 3.0), _CUBE)), _ROOT)
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(inner), 1.0))


def _gelu_fast(op: Any, x: Any) -> Any:
    inner = op.Mul(op.Mul(x, _ROOT), op.Add(op.Mul(op.Mul(x, _CUBE), x), 1.0))
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(inner), 1.0))


def _gelu_python(op: Any, x: Any) -> Any:
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Erf(op.Div(x, math.sqrt(2))), 1.0))


def _quick_gelu(op: Any, x: Any, alpha: Any) -> Any:
    return op.Mul(x, op.Sigmoid(op.Mul(x, alpha)))


def _tanh_gelu(op: Any, x: ir.Value) -> Any:
    return op.Gelu(x, approximate="tanh")


def _erf_gelu(op: Any, x: ir.Value) -> Any:
    return op.Gelu(x)


def _is_number(context: Any, x: ir.Value, alpha: ir.Value) -> bool:
    """A constant of one element: what scales each channel by its own number is no QuickGelu."""
    return _number(alpha) is not None


def _one_quick_gelu(op: Any, x: ir.Value, alpha: ir.Value) -> Any:
    return op.QuickGelu(x, alpha=_number(alpha), _domain="com.microsoft")


def _number(value: ir.Value) -> float | None:
    array = None if value.const_value is None else value.const_value.numpy()
    return float(np.reshape(array, ())) if array is not None and array.size == 1 else None


_RULES = pattern.RewriteRuleSet(
    [
        pattern.RewriteRule(_gelu_new, _tanh_gelu),
        pattern.RewriteRule(_gelu_fast, _tanh_gelu),
        pattern.RewriteRule(_gelu_python, _erf_gelu),
        pattern.RewriteRule(_quick_gelu, _one_quick_gelu, _is_number),
    ],
    commute=True,
)


def fuse_gelu(skeleton: ir.Model) -> int:
    """Apply the rules. Returns how often they applied."""
    return int(_RULES.apply_to_model(skeleton))
