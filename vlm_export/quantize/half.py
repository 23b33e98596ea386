"""A skeleton in float16, by `onnxruntime.transformers.float16`; inputs and outputs stay float32."""

from __future__ import annotations

import onnx_ir as ir
from onnxruntime.transformers.float16 import convert_float_to_float16

from vlm_export.quantize import full_precision
from vlm_export.spec.graph import Component


def converted(skeleton: ir.Model, component: Component) -> ir.Model:
    """The skeleton in half precision, but for what `full_precision.py` keeps; its weights join in float16."""
    whole = ir.from_proto(ir.to_proto(skeleton))
    kept = full_precision.cut(whole)
    declared = [spec.name for spec in (*component.inputs, *component.outputs)]
    proto = convert_float_to_float16(
        ir.to_proto(whole), keep_io_types=[*declared, *kept.names], disable_shape_infer=True
    )
    found = ir.from_proto(proto)
    full_precision.join(found, kept)
    found.graph.sort()  # the converter puts casts of inputs after their first use
    return found
