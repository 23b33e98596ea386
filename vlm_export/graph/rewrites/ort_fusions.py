"""Make ONNX Runtime's SimplifiedLayerNormalization of an RMSNorm, by onnxscript's fusion rule.

The rule needs the tracer's shapes, so it runs before those are dropped. The residual sum in front of a norm joins it
later (`skip_norms.py`).
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization


def fuse_norms(skeleton: ir.Model) -> int:
    """Apply the rule. Returns how often it applied."""
    return int(fuse_rms_normalization(skeleton))
