"""A skeleton in float16, by `onnxruntime.transformers.float16`; inputs and outputs stay float32."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
from onnxruntime.transformers.float16 import convert_float_to_float16

from vlm_export.quantize import full_precision
from vlm_export.spec.graph import Component


def converted(skeleton: ir.Model, component: Component, too_large: Collection[str] = ()) -> ir.Model:
    """The skeleton in half precision, but for what `full_precision.py` keeps.

    The weights that are its inputs have the type in which they are to join. `too_large` are names of values, weights
    among them, that are not to be in half precision.
    """
    whole = ir.from_proto(ir.to_proto(skeleton))
    inputs = [spec.name for spec in component.inputs]
    kept = full_precision.cut(whole, inputs, too_large)
    outputs = [spec.name for spec in component.outputs]
    proto = convert_float_to_float16(
        ir.to_proto(whole), keep_io_types=[*inputs, *outputs, *kept.names], disable_shape_infer=True
    )
    found = ir.from_proto(proto)
    full_precision.join(found, kept)
    found.graph.sort()  # the converter puts casts of inputs after their first use
    return found
