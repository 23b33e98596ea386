"""Normalizations and GELU as ONNX Runtime's own operators, by onnxscript's fusion rules.

RMSNorm becomes SimplifiedLayerNormalization. The rules need the tracer's shapes, so they run before those are dropped.
The residual sum in front of a norm is left to ONNX Runtime, which joins the two when it loads a graph: joined here, two
values would lead from one layer into the next, and layers could not be repeated.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter.ort_fusions.erfgelu import fuse_erfgelu
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization

_FUSIONS = (fuse_erfgelu, fuse_rms_normalization)


def fuse(structure: ir.Model) -> int:
    """Apply the rules in order. Returns how often they applied."""
    return sum(fusion(structure) for fusion in _FUSIONS)
