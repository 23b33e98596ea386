"""Make the variants of a float32 graph: float16, and dynamic int8.

- float16 (`onnxruntime.transformers.float16`): weights and arithmetic in half precision, inputs and outputs float32,
  because transformers.js never casts between graphs.
- dynamic int8 (`onnxruntime.quantization`): MatMul weights in int8 with one scale a column, activations quantized when
  they come; convolutions stay float32. A token table becomes int8 too, shared with a tied head
  (`rewrites/int8_lookup.py`).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16

from vlm_export.dtypes import Dtype
from vlm_export.rewrites import int8_lookup
from vlm_export.rewrites.angles import cut_angles, join_angles
from vlm_export.weights import save_graph


def quantize(graph: Path, dtype: Dtype, target: Path) -> int:
    """Write the `dtype` variant of a float32 graph file to `target`. Returns the number of external data chunks."""
    with tempfile.TemporaryDirectory(prefix="vlm-export-", dir=target.parent) as folder:
        made = _QUANTIZERS[dtype.quantizer](graph, Path(folder))
        return save_graph(made, target)


def _float16(graph: Path, folder: Path) -> ir.Model:
    source = ir.from_proto(onnx.load(graph))
    angles = cut_angles(source)
    converted = convert_float_to_float16(ir.to_proto(source), keep_io_types=True, disable_shape_infer=True)
    model = ir.from_proto(converted)
    join_angles(model, angles)
    model.graph.sort()  # the converter puts casts of inputs after their first use
    return model


def _dynamic_int8(graph: Path, folder: Path) -> ir.Model:
    quantized = folder / "quantized.onnx"
    logging.getLogger().setLevel(logging.ERROR)  # the quantizer advises a pre-processing step that is done already
    quantize_dynamic(
        graph,
        quantized,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=graph.with_name(f"{graph.name}_data").exists(),
        extra_options={"MatMulConstBOnly": True},
    )
    model = ir.from_proto(onnx.load(quantized))
    int8_lookup.quantize_lookups(model)
    return model


_QUANTIZERS: dict[str, Callable[[Path, Path], ir.Model]] = {"float16": _float16, "dynamic_int8": _dynamic_int8}
