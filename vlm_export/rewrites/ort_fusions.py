"""RMSNorm as ONNX Runtime's own SimplifiedLayerNormalization, by onnxscript's fusion rule.

The rule needs the tracer's shapes, so it runs before those are dropped. The residual sum in front of a norm is left to
ONNX Runtime, which joins the two when it loads a graph: joined here, two values would lead from one layer into the
next, and layers could not be repeated.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization


def fuse_norms(structure: ir.Model) -> int:
    """Apply the rule. Returns how often it applied."""
    return int(fuse_rms_normalization(structure))
