"""What writing a variant takes, by its graph, which is made for it without reading a weight.

Sizes are those of the graphs themselves, to within a few bytes.
"""

from __future__ import annotations

from vlm_export.dtypes import FP32
from vlm_export.graph.graph_file import size_bytes
from vlm_export.quantize.estimate import Solved, VariantCost
from vlm_export.quantize.variants import Variant


def cost(variant: Variant) -> VariantCost:
    """What writing a variant takes. Its graph is made, and no weight is read."""
    model = variant.make()
    tensors = [value.const_value for value in variant.source.model.graph.initializers.values()]
    sizes = [tensor.size for tensor in tensors if tensor is not None]
    return VariantCost(
        variant.source.name,
        variant.dtype.name,
        variant.file,
        size_bytes(model),
        sum(sizes),
        0 if variant.dtype == FP32 else max(sizes, default=0),
        tuple(
            Solved(variant.source.name, str(of.weight.name), of.form, value, of.inputs, of.outputs, of.blocks)
            for value, of in (variant.to_solve() if variant.is_calibrated else ())
        ),
    )
