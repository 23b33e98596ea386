"""What changes in the body of the loop where a prompt has a row of the decoder for each of its beams."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import onnx_ir as ir

from vlm_export.graph.loop_start import Carried, Opened


def spread(opened: Opened, prompt_of: ir.Value, first_prompt_of: ir.Value) -> Opened:
    """The same, where row r is a beam of prompt `prompt_of[r]`; `first_prompt_of` says so of the first run.

    What has a row for each prompt is taken by that at each run. Keys and values of cross-attention would be long to
    copy: they, and all that is fed first, have a row for each beam from the beginning, which is why there is then one
    for each beam in the first run.
    """
    nodes = list(opened.nodes)
    inner = [taken(value, prompt_of) for value in (*opened.by_prompt, opened.begun)]
    for value, each in zip(opened.by_prompt, inner, strict=False):
        _read_instead(nodes, value, each)
    carried = opened.carried
    for value in opened.of_cross:
        maker = value.producer()
        assert maker is not None, value.name
        each = taken(value, first_prompt_of)
        _read_instead(nodes, value, each)
        nodes.insert(nodes.index(maker) + 1, made_by(each))
    if opened.of_cross:
        firsts = {one.first: taken(one.first, first_prompt_of) for one in carried}  # some are the same value
        carried = [Carried(one.value, firsts[one.first]) for one in carried]
        inner += firsts.values()
    return replace(opened, nodes=[*map(made_by, inner), *nodes], begun=inner[len(opened.by_prompt)], carried=carried)


def taken(value: ir.Value, rows: ir.Value) -> ir.Value:
    """These rows of a value."""
    node = ir.Node("", "Gather", [value, rows], num_outputs=1, name=f"{value.name}.by.{rows.name}")
    node.outputs[0].name = node.name
    return node.outputs[0]


def made_by(value: ir.Value) -> ir.Node:
    """The node that computes a value."""
    node = value.producer()
    assert node is not None, value.name
    return node


def _read_instead(nodes: Iterable[ir.Node], value: ir.Value, other: ir.Value) -> None:
    """Let these nodes read another value."""
    own = set(nodes)
    for node, place in list(value.uses()):
        if node in own:
            node.replace_input_with(place, other)
