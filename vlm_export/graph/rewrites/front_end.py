"""Put a component's front end (ONNX text) before its traced core."""

from __future__ import annotations

import re

import onnx_ir as ir

from vlm_export.spec import cache
from vlm_export.spec.graph import Component

PREFIX = "front_end."  # of the values that a front end computes
# What a front end calls the first key cache, and the first of cross-attention.
_PASTS = {"past": re.compile(r"past_key_values\.\d+(\.decoder)?\.key"), "cross_past": re.compile(r".*\.encoder\.key")}
_TYPES = {"float32": "float", "int64": "int64", "bool": "bool"}


def attach(skeleton: ir.Model, component: Component, *, embedding: ir.Value) -> None:
    """Replace the core's inputs by the values that the front end computes, and give the graph the component's inputs.

    In the text, `past` and `cross_past` stand for the first layer's key caches and `embedding` for the weight named
    `embedding`; a front end that computes `past` itself feeds it to every cache input.

    Raises:
        ValueError: the core has an input that is neither declared nor computed by the front end.
    """
    assert component.front_end is not None
    graph = skeleton.graph
    core = {value.name: value for value in graph.inputs}
    front = _parse(component, skeleton.opset_imports[""])
    computed = {value.name: value for node in front for value in node.outputs}
    sources = {value.name: value for value in front.inputs}

    declared: list[ir.Value] = []
    for spec in component.inputs:
        value = sources.get(spec.name) or core.get(spec.name)
        assert value is not None, spec.name
        declared.append(value)
        if spec.name in sources and spec.name in core:
            core[spec.name].replace_all_uses_with(value)
    nodes = list(front)
    for node in nodes:
        for output in node.outputs:
            output.name = f"{PREFIX}{output.name}"
    front.remove(nodes)
    front.inputs.clear()
    graph.insert_before(graph[0], nodes)

    weights = [value for name, value in core.items() if name not in {spec.name for spec in component.trace_signature}]
    if "embedding" in sources:
        table = next((value for value in weights if value.name == embedding.name), embedding)
        if table is embedding:
            weights.append(table)
        sources["embedding"].replace_all_uses_with(table)
    for name, pattern in _PASTS.items():
        if name in sources:
            cached = next(spec.name for spec in component.trace_signature if pattern.fullmatch(spec.name))
            sources[name].replace_all_uses_with(core[cached])
    for spec in component.trace_signature:
        if core[spec.name] in declared:
            continue
        name = "past" if cache.is_past(spec.name) else spec.name
        if name in computed:
            core[spec.name].replace_all_uses_with(computed[name])
        elif spec.name not in sources:
            raise ValueError(f"{component.name}: nothing feeds {spec.name!r} of the traced core")
    graph.inputs.clear()
    graph.inputs.extend([*declared, *weights])


def _parse(component: Component, opset: int) -> ir.Graph:
    assert component.front_end is not None
    text = component.front_end.text
    inputs = [spec for spec in component.inputs if not cache.is_past(spec.name)]
    signature = [f"{_TYPES[spec.dtype]}[{', '.join(map(str, spec.shape))}] {spec.name}" for spec in inputs]
    if "(embedding" in text:
        signature.append("float[vocabulary, hidden] embedding")
    for name in _PASTS:
        if re.search(rf"\({name}\)", text) and not re.search(rf"^\s*{name} = ", text, re.MULTILINE):
            signature.append(f"float[batch_size, heads, {name}_length, head_dim] {name}")
    last = text.strip().splitlines()[-1].split("=")[0].strip()
    model = (
        f'<ir_version: 10, opset_import: ["" : {opset}]> front ({", ".join(signature)}) => (int64[n] {last}) {{{text}}}'
    )
    return ir.from_onnx_text(model).graph
