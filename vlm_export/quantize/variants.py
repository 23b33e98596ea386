"""Make a graph in each dtype: join the weights with its structure, or quantize.

- fp32: the weights of the checkpoint.
- float16 (`onnxruntime.transformers.float16`): weights and arithmetic in half precision, inputs and outputs float32,
  because transformers.js never casts between graphs. The structure is converted, and the weights are cast as they are
  written, from what the checkpoint holds.
- 8-bit weights, in two forms, because no form is fast everywhere. Weights of MatMuls and the token table, which stays
  one tensor with a tied head, are quantized as they are written; convolutions and norms stay float32.
  - packed (`quantize/matmul_nbits.py`), for decoders on processors: kernels read the packed weights at every token.
    Graphs without a cache run many rows at a time, where that pays nothing; theirs are folded.
  - folded (`quantize/folded.py`), for WASM: what any runtime unpacks when it loads the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnxruntime.transformers.float16 import convert_float_to_float16

from vlm_export.dtypes import Dtype
from vlm_export.graph.weights import attach_weights
from vlm_export.quantize import folded, full_precision, matmul_nbits
from vlm_export.spec.graph import Component
from vlm_export.tensors.stored import TensorRef


@dataclass(frozen=True)
class Source:
    """What the variants of a component are made of: its structure, and a merged checkpoint's tensors."""

    component: Component
    skeleton: ir.Model
    tensors: Mapping[str, TensorRef]

    def path(self, dtype: Dtype, folder: Path) -> Path:
        """Where the variant lies, as clients name it."""
        return folder / f"{self.component.name}{dtype.suffix}.onnx"


def make(source: Source, dtype: Dtype) -> ir.Model:
    """The variant, to be saved: its weights are read, cast and quantized when it is written."""
    return _VARIANTS[dtype.made_by](source)


def _float32(source: Source) -> ir.Model:
    return attach_weights(source.skeleton, source.component, source.tensors)


def _float16(source: Source) -> ir.Model:
    whole = ir.from_proto(ir.to_proto(source.skeleton))
    kept = full_precision.cut(whole)
    declared = [spec.name for spec in (*source.component.inputs, *source.component.outputs)]
    converted = convert_float_to_float16(
        ir.to_proto(whole), keep_io_types=[*declared, *kept.names], disable_shape_infer=True
    )
    structure = ir.from_proto(converted)
    full_precision.join(structure, kept)
    structure.graph.sort()  # the converter puts casts of inputs after their first use
    return attach_weights(structure, source.component, source.tensors, ir.DataType.FLOAT16)


def _packed_8_bits(source: Source) -> ir.Model:
    if not source.component.has_cache:
        return _folded_8_bits(source)
    model = _float32(source)
    matmul_nbits.quantize(model)
    return model


def _folded_8_bits(source: Source) -> ir.Model:
    model = _float32(source)
    folded.quantize(model)
    return model


_VARIANTS: dict[str, Callable[[Source], ir.Model]] = {
    "float32": _float32,
    "float16": _float16,
    "packed_8_bits": _packed_8_bits,
    "folded_8_bits": _folded_8_bits,
}
