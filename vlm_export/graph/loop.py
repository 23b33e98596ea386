"""Join the finished graphs of a repo into one, with the loop of generation in it.

    first graph → a beginning → Loop { decoder → next_token } → sequences, lengths, scores, texts

The body of the `Loop` is the decoder, in whatever dtype it was written; carried are what that is fed, its cache, and
what was generated. `loop_start.py` says what a text begins with. What does not change from token to token is computed
before the loop: keys and values of cross-attention, and weights that are unpacked. All weights stay outside the body,
once each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlm_export.contract import IMAGE, OPTIONS, SINGLE_GRAPH
from vlm_export.dtypes import ACTIVATIONS
from vlm_export.graph import texts
from vlm_export.graph.beam_rows import made_by, spread, taken
from vlm_export.graph.choice import Choice
from vlm_export.graph.loop_prompt import PROMPT
from vlm_export.graph.loop_start import ROWS, Beginning, Carried, Opened
from vlm_export.graph.next_token import Rules
from vlm_export.graph.onnx_text import Parsed, named, parsed, typed
from vlm_export.spec.graph import Component, TensorSpec

_BEFORE = """
yes = Constant <value_int = 1> ()
continues = Cast <to = 9> (yes)
positions = Constant <value_ints = [POSITIONS]> ()
left = Sub (positions, taken)
scalar_axis = Constant <value_ints = [0]> ()
room = Squeeze (left, scalar_axis)
trips = Min (max_new_tokens, room)
"""
# How many rows a prompt has in the first run, by whether cross-attention has them.
_FIRST_BEAMS = {
    False: "first_beams = Constant <value_ints = [1]> ()",
    True: "beams_axis = Constant <value_ints = [0]> ()\nfirst_beams = Unsqueeze (num_beams, beams_axis)",
}
# Not by a Transpose: on WebGPU, ONNX Runtime 1.31 moves that behind the Resize, and then fails on its sizes.
_PICTURE = """
plane_axes = Constant <value_ints = [0, 1]> ()
zeroth = Constant <value_int = 0> ()
first = Constant <value_int = 1> ()
second = Constant <value_int = 2> ()
red_plane = Gather <axis = 2> (image, zeroth)
green_plane = Gather <axis = 2> (image, first)
blue_plane = Gather <axis = 2> (image, second)
red = Unsqueeze (red_plane, plane_axes)
green = Unsqueeze (green_plane, plane_axes)
blue = Unsqueeze (blue_plane, plane_axes)
one_picture = Concat <axis = 1> (red, green, blue)
pixels = Cast <to = 1> (one_picture)
"""


def declared(parts: Sequence[Component], *, takes_picture: bool, has_texts: bool) -> Component:
    """What `join` makes of these components, as `signature.differences` compares it."""
    picture = TensorSpec(IMAGE, "uint8", ("height", "width", 3))
    prompt = [TensorSpec(name, "int64", ("batch_size", "prompt_length")) for name in PROMPT]
    return Component(
        SINGLE_GRAPH,
        parts[-1].module,
        inputs=(
            *([picture] if takes_picture else parts[0].inputs),
            *(prompt if len(parts) > 2 else []),
            TensorSpec(OPTIONS, "float32", ("given_options",)),
        ),
        outputs=_outputs(has_texts=has_texts),
    )


def join(
    parts: Sequence[ir.Model],
    start: Beginning,
    rules: Rules,
    *,
    takes_picture: bool = False,
    pieces: Sequence[bytes] | None = None,
) -> ir.Model:
    """One graph of several, which are taken apart: the first one's inputs and `options` → what `declared` says.

    `parts` are in the order in which they run, the decoder last, and `start` is what their layout begins with. Where it
    `takes_picture`, in the place of pixels of any size, that is `image` `[height, width, 3] uint8`. Where the `pieces`
    of a text are known by the token's id, it gives texts too.
    """
    whole, outer = parts[0], parts[0].graph
    opset = whole.opset_imports[""]
    assert all(part.opset_imports[""] == opset for part in parts), "graphs of one export have one opset"
    if takes_picture:
        _feed_picture(outer, opset)
    opened = start.open(parts, opset)
    options = named(OPTIONS, "float32", ["given_options"])
    outer.inputs.append(options)

    positions = start.positions + 1  # the last token is not fed
    before = _before(opened, rules, options, positions, opset)
    outer.extend(before.nodes)
    turn = _turn(opened, rules, before, opset)
    loop = _loop(outer, turn, before, parts[-1].opset_imports)
    _finish(outer, dict(zip(rules.choice.made, loop.outputs, strict=False)), loop, rules.choice, pieces, opset)
    if len({model.metadata_props.get(ACTIVATIONS) for model in parts}) > 1:
        whole.metadata_props.pop(ACTIVATIONS, None)
    return whole


@dataclass(frozen=True)
class _Turn:
    """The body of the loop: nodes that are in no graph yet, what is carried, what becomes of that, and whether."""

    nodes: list[ir.Node]
    iteration: ir.Value
    carried: list[Carried]
    becomes: list[ir.Value]
    going: ir.Value


def _before(opened: Opened, rules: Rules, options: ir.Value, positions: int, opset: int) -> Parsed:
    """What is computed once: the options, how many turns there may be, and what a choice carries first."""
    texts_before = [rules.options_text(), ROWS, _BEFORE.replace("POSITIONS", str(positions))]
    if rules.choice.moves_rows:
        texts_before.append(_FIRST_BEAMS[bool(opened.of_cross)])
    settled = {OPTIONS: options, "of_each_row": opened.of_each_row, "taken": opened.taken}
    return parsed("\n".join([*texts_before, rules.choice.before]), settled, opset, "before.")


def _turn(opened: Opened, rules: Rules, before: Parsed, opset: int) -> _Turn:
    """The decoder, the rules on its scores, the choice of tokens, and what the decoder is fed of them."""
    choice = rules.choice
    iteration = named("iteration", "int64", ())
    made = {name: named(name, *of) for name, of in choice.made.items()}
    if choice.moves_rows:
        opened = spread(opened, made["prompt_of"], before["first_prompt_of"])
    given = {"iteration": iteration, **{name: before[name] for name in ("trips", *rules.options[1:])}}
    scored = parsed(choice.scored, {"logits": opened.logits, **given}, opset, "scored.")
    looked_at = {"plain": scored["plain"], "begun": opened.begun, "tokens": made["tokens"]}
    ruled = parsed(rules.text(), {**looked_at, **given}, opset, "rules.")
    after = parsed(rules.decided(choice.turn), {"final": ruled["final"], **made, **given}, opset, "next.")
    moves: list[ir.Node] = []

    def moved(value: ir.Value) -> ir.Value:
        if not choice.moves_rows:
            return value
        there = taken(value, after["origins"])
        moves.append(made_by(there))
        return there

    behind, fed_next = opened.next(after["chosen"], moved)
    carried = [*(Carried(value, before[f"first_{name}"]) for name, value in made.items()), *opened.carried]
    becomes = [*(after[f"next_{name}"] for name in made), *fed_next]
    nodes = [*opened.nodes, *scored.nodes, *ruled.nodes, *after.nodes, *moves, *behind]
    return _Turn(nodes, iteration, carried, becomes, after["going"])


def _loop(outer: ir.Graph, turn: _Turn, before: Parsed, opset_imports: dict[str, int]) -> ir.Node:
    """Put the loop behind what is in the graph; what is the same in every turn stands in front of it."""
    of_loop = [turn.iteration, named("was_going", "bool", ())]
    varying = [*of_loop, *(each.value for each in turn.carried)]
    outer.extend(_unchanging(turn.nodes, varying))
    body = ir.Graph(
        varying,
        [turn.going, *turn.becomes],
        nodes=[node for node in turn.nodes if node.graph is None],
        opset_imports=opset_imports,
        name="one_token",
    )
    loop = ir.Node(
        "",
        "Loop",
        [before["trips"], before["continues"], *(each.first for each in turn.carried)],
        [ir.AttrGraph("body", body)],
        num_outputs=len(turn.carried),
        name="generation",
    )
    outer.append(loop)
    return loop


def _initializers(outer: ir.Graph, arrays: Mapping[str, np.ndarray]) -> dict[str, ir.Value]:
    """The arrays in the graph, by name."""
    made = {}
    for name, array in arrays.items():
        tensor = ir.tensor(array, name=name)
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
        made[name] = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
        outer.register_initializer(made[name])
    return made


def _unchanging(nodes: Iterable[ir.Node], varying: Iterable[ir.Value]) -> list[ir.Node]:
    """The nodes, in their order, that compute the same for every token: those that read nothing that varies."""
    changes = set(varying)
    found = []
    for node in nodes:
        if changes.intersection(_read_by(node)):
            changes.update(node.outputs)
        else:
            found.append(node)
    return found


def _read_by(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, by its own graphs too."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _read_by(inner)


def _feed_picture(outer: ir.Graph, opset: int) -> None:
    """Put in the place of `pixel_values` `[1, 3, height, width] float32` the picture that they are of."""
    [pixels] = outer.inputs
    picture = named(IMAGE, "uint8", ["height", "width", 3])
    made = parsed(_PICTURE, {IMAGE: picture}, opset, "picture.")
    outer.insert_before(outer[0], made.nodes)
    pixels.replace_all_uses_with(made["pixels"])
    outer.inputs[:] = [picture]


def _finish(
    outer: ir.Graph,
    made: Mapping[str, ir.Value],
    loop: ir.Node,
    choice: Choice,
    pieces: Sequence[bytes] | None,
    opset: int,
) -> None:
    """Give the graph the outputs that a caller wants, of what the loop carried by its name."""
    for index, value in enumerate(loop.outputs):
        value.name = f"generation.{index}"
    after = parsed(choice.after, {f"made_{name}": value for name, value in made.items()}, opset, "after.")
    outputs = {name: after[name] for name in ("sequences", "lengths", "scores")}
    if pieces:
        known = _initializers(outer, texts.tables(pieces))
        said = {**known, "tokens": after["sequences"], "lengths": after["lengths_column"]}
        written = parsed(texts.text(), said, opset, "text.")
        after.nodes.extend(written.nodes)
        outputs["texts"] = written["texts"]
    outer.extend(after.nodes)
    for spec in _outputs(has_texts="texts" in outputs):
        value = outputs[spec.name]
        value.name = spec.name
        typed(value, spec.dtype, spec.shape)
    outer.outputs[:] = list(outputs.values())


def _outputs(*, has_texts: bool) -> tuple[TensorSpec, ...]:
    utf8 = TensorSpec("texts", "uint8", ("text_bytes",))
    return (
        TensorSpec("sequences", "int64", ("batch_size", "new_tokens")),
        TensorSpec("lengths", "int64", ("batch_size",)),
        TensorSpec("scores", "float32", ("batch_size", "new_tokens")),
        *((utf8,) if has_texts else ()),
    )
