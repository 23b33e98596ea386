"""Scale the token lookups of a front end as the model's own embedding module does (Gemma: by √hidden).

A front end gathers rows of the bare table, which a tied head shares.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from torch import nn

from vlm_export.graph.rewrites.front_end import PREFIX


def scale_of(embedding: nn.Module) -> float:
    """What the module multiplies the rows of its table by.

    Raises:
        ValueError: it is neither a plain embedding nor one with an `embed_scale`.
    """
    if type(embedding) is nn.Embedding:
        return 1.0
    scale = getattr(embedding, "embed_scale", None)
    if scale is None:
        raise ValueError(f"{type(embedding).__name__} does more than look up rows of its table")
    return float(scale)


def scale_lookups(skeleton: ir.Model, table: str, scale: float) -> int:
    """Multiply what the front end gathers from the weight `table`. Returns how many lookups that were."""
    graph = skeleton.graph
    lookups = [
        node
        for node in graph
        if node.op_type == "Gather"
        and node.inputs[0] is not None
        and node.inputs[0].name == table
        and str(node.outputs[0].name).startswith(PREFIX)
    ]
    if scale == 1 or not lookups:
        return 0
    name = f"{PREFIX}embedding_scale"
    tensor = ir.Tensor(np.array(scale, dtype=np.float32), name=name)
    factor = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(()), const_value=tensor)
    graph.register_initializer(factor)
    for node in lookups:
        rows = node.outputs[0]
        scaled = ir.node("Mul", [rows, factor], name=f"{rows.name}.scaled")
        scaled.outputs[0].name = f"{rows.name}.scaled"
        graph.insert_after(node, scaled)
        for use in tuple(rows.uses()):
            if use.node is not scaled:
                use.node.replace_input_with(use.idx, scaled.outputs[0])
    return len(lookups)
