"""Make a graph in each dtype: join the weights with its structure, or quantize.

- fp32: the weights of the checkpoint.
- float16 (`onnxruntime.transformers.float16`): weights and arithmetic in half precision, inputs and outputs float32,
  because transformers.js never casts between graphs. The structure is converted, and the weights are cast as they are
  written, from what the checkpoint holds.
- dynamic int8 (`onnxruntime.quantization`): MatMul weights in int8 with one scale a column, activations quantized when
  they come; convolutions stay float32. A token table becomes int8 too, shared with a tied head
  (`rewrites/int8_lookup.py`).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16

from vlm_export.checkpoint import TensorRef
from vlm_export.dtypes import FP32, Dtype
from vlm_export.families.base import Component
from vlm_export.rewrites import full_precision, int8_lookup
from vlm_export.weights import attach_weights


@dataclass(frozen=True)
class Source:
    """What the variants of a component are made of: its structure, and a merged checkpoint's tensors."""

    component: Component
    structure: ir.Model
    tensors: Mapping[str, TensorRef]

    def path(self, dtype: Dtype, folder: Path) -> Path:
        """Where the variant lies, as clients name it."""
        return folder / f"{self.component.name}{dtype.suffix}.onnx"


def make(source: Source, dtype: Dtype, folder: Path) -> ir.Model:
    """The variant, to be saved. Dynamic int8 is made from the float32 variant, which must lie in `folder`."""
    return _VARIANTS[dtype.made_by](source, folder)


def _float32(source: Source, _: Path) -> ir.Model:
    return attach_weights(source.structure, source.component, source.tensors)


def _float16(source: Source, _: Path) -> ir.Model:
    whole = ir.from_proto(ir.to_proto(source.structure))
    kept = full_precision.cut(whole)
    declared = [spec.name for spec in (*source.component.inputs, *source.component.outputs)]
    converted = convert_float_to_float16(
        ir.to_proto(whole), keep_io_types=[*declared, *kept.names], disable_shape_infer=True
    )
    structure = ir.from_proto(converted)
    full_precision.join(structure, kept)
    structure.graph.sort()  # the converter puts casts of inputs after their first use
    return attach_weights(structure, source.component, source.tensors, ir.DataType.FLOAT16)


def _dynamic_int8(source: Source, folder: Path) -> ir.Model:
    float32 = source.path(FP32, folder)
    logging.getLogger().setLevel(logging.ERROR)  # the quantizer advises a pre-processing step that is done already
    with tempfile.TemporaryDirectory(prefix="vlm-export-", dir=folder) as beside:
        quantized = Path(beside, "quantized.onnx")
        quantize_dynamic(
            float32,
            quantized,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=float32.with_name(f"{float32.name}_data").exists(),
            extra_options={"MatMulConstBOnly": True},
        )
        model = ir.from_proto(onnx.load(quantized))
    int8_lookup.quantize_lookups(model)
    return model


_VARIANTS: dict[str, Callable[[Source, Path], ir.Model]] = {
    "float32": _float32,
    "float16": _float16,
    "dynamic_int8": _dynamic_int8,
}
