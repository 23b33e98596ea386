"""Normalizations and GELU as ONNX Runtime's own operators, by onnxscript's fusion rules.

RMSNorm becomes SimplifiedLayerNormalization, and a residual sum in front of it or of LayerNormalization joins it as
Skip(Simplified)LayerNormalization. They need the tracer's shapes, so they run before those are dropped.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter.ort_fusions.erfgelu import fuse_erfgelu
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.ort_fusions.skip_normalization import (
    fuse_skip_layer_normalization,
    fuse_skip_rms_normalization,
)

_FUSIONS = (fuse_erfgelu, fuse_rms_normalization, fuse_skip_layer_normalization, fuse_skip_rms_normalization)


def fuse(structure: ir.Model) -> int:
    """Apply the rules in order. Returns how often they applied."""
    return sum(fusion(structure) for fusion in _FUSIONS)
