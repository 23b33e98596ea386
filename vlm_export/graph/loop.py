"""Join the finished graphs of a captioner into one, with the loop of generation in it.

    encoder → the first values of what is carried → Loop { decoder → next_token } → sequences, lengths, scores, texts

The body of the `Loop` is the decoder, in whatever dtype it was written; carried are its ids, its cache, and what was
generated. What does not change from token to token is computed before the loop: keys and values of cross-attention,
and weights that are unpacked. All weights stay outside the body, once each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from vlm_export.contract import IMAGE, OPTIONS, SINGLE_GRAPH, SINGLE_OPTIONS
from vlm_export.dtypes import ACTIVATIONS
from vlm_export.graph.next_token import Rules
from vlm_export.spec.graph import Component, TensorSpec

_PAST, _PRESENT, _CROSS = "past_key_values.", "present.", ".encoder."
_TYPES = {
    "float": ir.DataType.FLOAT,
    "int64": ir.DataType.INT64,
    "bool": ir.DataType.BOOL,
    "uint8": ir.DataType.UINT8,
    "string": ir.DataType.STRING,
}
# Inputs of the body beside the decoder's own, in order: of the loop itself, then what is carried.
_Sizes = tuple[int | str, ...]
_OF_LOOP: Mapping[str, tuple[str, _Sizes]] = {"iteration": ("int64", ()), "was_going": ("bool", ())}
_CARRIED: Mapping[str, tuple[str, _Sizes]] = {
    "tokens": ("int64", ("batch_size", "made_tokens")),
    "finished": ("bool", ("batch_size", 1)),
    "lengths": ("int64", ("batch_size", 1)),
    "scores": ("float", ("batch_size", "made_tokens")),
    "text": ("string", ("batch_size", 1)),
}
_BEFORE = """
yes = Constant <value_int = 1> ()
continues = Cast <to = 9> (yes)
no_columns = Constant <value_ints = [0]> ()
one_column = Constant <value_ints = [1]> ()
rows = Shape <start = 0, end = 1> (states)
empty_shape = Concat <axis = 0> (rows, no_columns)
column_shape = Concat <axis = 0> (rows, one_column)
first_tokens = ConstantOfShape <value = int64[1] {0}> (empty_shape)
first_scores = ConstantOfShape (empty_shape)
first_lengths = ConstantOfShape <value = int64[1] {0}> (column_shape)
first_finished = Cast <to = 9> (first_lengths)
nothing_said = Constant <value_string = ""> ()
first_text = Expand (nothing_said, column_shape)
start_token = Constant <value_int = START> ()
first_ids = Expand (start_token, column_shape)
cache_sizes = Constant <value_ints = CACHE> ()
cache_shape = Concat <axis = 0> (rows, cache_sizes)
empty_cache = ConstantOfShape (cache_shape)
positions = Constant <value_ints = [POSITIONS]> ()
"""
_HISTORY = {True: "begun = Identity (first_ids)", False: "begun = Identity (first_tokens)"}
_ROOM = {
    True: "taken = Shape <start = 1, end = 2> (states)\nleft = Sub (positions, taken)",
    False: "left = Identity (positions)",
}
_TRIPS = """
scalar_axis = Constant <value_ints = [0]> ()
room = Squeeze (left, scalar_axis)
trips = Min (max_new_tokens, room)
"""
# Behind the pieces of all tokens are those of them as the first of a text, which has no space before it.
_ONE_PIECE = """
first_of_all = Constant <value_int = 0> ()
as_first = Constant <value_int = COUNT> ()
is_first = Equal (iteration, first_of_all)
shift = Where (is_first, as_first, first_of_all)
its_place = Add (chosen, shift)
its_piece = Gather (pieces, its_place)
no_piece = Constant <value_string = ""> ()
piece = Where (finished, no_piece, its_piece)
next_text = StringConcat (text, piece)
"""
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
_AFTER = """
last_axis = Constant <value_ints = [1]> ()
lengths = Squeeze (lengths_column, last_axis)
"""
_TEXTS = """
text_axis = Constant <value_ints = [1]> ()
texts = Squeeze (texts_column, text_axis)
"""


@dataclass(frozen=True)
class Start:
    """How a text begins, and how long it may become.

    Attributes:
        token: the id that is fed first.
        is_history: whether rules on repetition look back on it.
        positions: how many new tokens the model has positions for; a prefix takes some of them.
        has_prefix: whether the encoder's rows stand before the text.
    """

    token: int
    is_history: bool
    positions: int
    has_prefix: bool


def declared(parts: Sequence[Component], *, takes_picture: bool, has_texts: bool) -> Component:
    """What `join` makes of these components, as `signature.differences` compares it."""
    [pixels] = [spec for part in parts for spec in part.inputs if spec.name == "pixel_values"]
    picture = TensorSpec(IMAGE, "uint8", ("height", "width", 3))
    return Component(
        SINGLE_GRAPH,
        parts[-1].module,
        inputs=(picture if takes_picture else pixels, TensorSpec(OPTIONS, "float32", ("given_options",))),
        outputs=_outputs(has_texts=has_texts),
    )


def join(
    encoder: ir.Model,
    decoder: ir.Model,
    start: Start,
    rules: Rules,
    *,
    takes_picture: bool = False,
    pieces: Sequence[bytes] | None = None,
) -> ir.Model:
    """One graph of two, which are taken apart: the encoder's input and `options` → what `declared` says.

    Where it `takes_picture`, in the place of pixels of any size, that is `image` `[height, width, 3] uint8`. Where the
    `pieces` of a text are known by the token's id, it gives texts too.
    """
    outer, core = encoder.graph, decoder.graph
    opset = encoder.opset_imports[""]
    assert decoder.opset_imports[""] == opset, "graphs of one export have one opset"
    fed = {str(value.name): value for value in core.inputs}
    found = {str(value.name): value for value in core.outputs}
    own = [name for name in fed if name.startswith(_PAST) and _CROSS not in name]
    nodes = list(core)
    core.remove(nodes)
    core.inputs.clear()
    core.outputs.clear()
    _name_apart(outer, core, nodes, fed.values())
    [states] = outer.outputs
    if takes_picture:
        _feed_picture(outer, opset)
    options = _value(OPTIONS, "float", ["given_options"])
    outer.inputs.append(options)

    before = _parsed(_text_before(start, rules, fed[own[0]]), {OPTIONS: options, "states": states}, opset, "before.")
    outer.extend(before.nodes)
    fed["encoder_hidden_states"].replace_all_uses_with(states)
    for name in fed:
        if _CROSS in name:
            fed[name].replace_all_uses_with(before["empty_cache"])

    of_loop = {name: _value(name, *of) for name, of in _OF_LOOP.items()}
    made = {name: _value(name, *of) for name, of in _CARRIED.items() if pieces or name != "text"}
    given = {name: before[name] for name in ("begun", *SINGLE_OPTIONS[1:])}
    text = rules.text()
    if pieces:
        text += _ONE_PIECE.replace("COUNT", str(len(pieces)))
        given["pieces"] = _pieces(outer, pieces)
    after = _parsed(text, {**of_loop, **made, **given, "logits": found["logits"]}, opset, "next.")
    nodes += after.nodes
    carried = [
        *(_Carried(value, before[f"first_{name}"], after[f"next_{name}"]) for name, value in made.items()),
        _Carried(fed["input_ids"], before["first_ids"], after["chosen"]),
        *(_Carried(fed[name], before["empty_cache"], found[name.replace(_PAST, _PRESENT, 1)]) for name in own),
    ]
    outer.extend(_unchanging(nodes, [*of_loop.values(), *(each.value for each in carried)]))
    body = ir.Graph(
        [*of_loop.values(), *(each.value for each in carried)],
        [after["going"], *(each.next for each in carried)],
        nodes=[node for node in nodes if node.graph is None],
        opset_imports=decoder.opset_imports,
        name="one_token",
    )
    loop = ir.Node(
        "",
        "Loop",
        [before["trips"], before["continues"], *(each.first for each in carried)],
        [ir.AttrGraph("body", body)],
        num_outputs=len(carried),
        name="caption",
    )
    outer.append(loop)
    _finish(outer, dict(zip(made, loop.outputs, strict=False)), loop, opset)
    both = (encoder, decoder)
    if len({model.metadata_props.get(ACTIVATIONS) for model in both}) > 1:
        encoder.metadata_props.pop(ACTIVATIONS, None)
    return encoder


@dataclass(frozen=True)
class _Carried:
    """What the loop carries: an input of its body, what that is first, and what it is next."""

    value: ir.Value
    first: ir.Value
    next: ir.Value


def _text_before(start: Start, rules: Rules, past: ir.Value) -> str:
    """ONNX text of what is computed between the encoder and the loop; `past` is a cache of the decoder."""
    sizes = past.shape
    assert sizes is not None
    before = _BEFORE.replace("START", str(start.token)).replace("CACHE", str([sizes[1], 0, sizes[3]]))
    positions = str(start.positions + 1)  # the last token is not fed
    return "\n".join(
        [
            rules.options_text(),
            before.replace("POSITIONS", positions),
            _HISTORY[start.is_history],
            _ROOM[start.has_prefix],
            _TRIPS,
        ]
    )


def _pieces(outer: ir.Graph, pieces: Sequence[bytes]) -> ir.Value:
    """The table of all pieces, and of them as the first of a text, in the graph."""
    both = [*pieces, *(piece.lstrip() for piece in pieces)]
    tensor = ir.StringTensor(both, shape=ir.Shape([len(both)]), name="pieces")
    value = ir.Value(name="pieces", type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    outer.register_initializer(value)
    return value


@dataclass(frozen=True)
class _Parsed:
    """Nodes of a text, and what they compute by its name there."""

    nodes: list[ir.Node]
    values: Mapping[str, ir.Value]

    def __getitem__(self, name: str) -> ir.Value:
        return self.values[name]


def _parsed(text: str, inputs: Mapping[str, ir.Value], opset: int, prefix: str) -> _Parsed:
    """The nodes of ONNX text, reading these values by these names; names of what they compute get the prefix."""
    names = ", ".join(f"float[n] {name}" for name in inputs)
    last = text.strip().splitlines()[-1].partition("=")[0].strip()
    model = f'<ir_version: 10, opset_import: ["" : {opset}]> text ({names}) => (float[n] {last}) {{\n{text}\n}}'
    graph = ir.from_onnx_text(model).graph
    nodes = list(graph)
    values = {str(value.name): value for node in nodes for value in node.outputs}
    for value in list(graph.inputs):
        value.replace_all_uses_with(inputs[str(value.name)])
    graph.outputs.clear()
    graph.remove(nodes)
    for name, value in values.items():
        value.name, value.shape, value.type = f"{prefix}{name}", None, None
    for node in nodes:
        node.name = node.outputs[0].name
    return _Parsed(nodes, values)


def _value(name: str, kind: str, shape: Sequence[int | str] | None = None) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(_TYPES[kind]), shape=None if shape is None else ir.Shape(shape))


def _name_apart(outer: ir.Graph, core: ir.Graph, nodes: Iterable[ir.Node], fed: Iterable[ir.Value]) -> None:
    """Move the weights of the core to the outer graph, and give what the core computes names of its own."""
    taken = {str(value.name) for node in outer for value in node.outputs} | set(outer.initializers)
    for name, value in list(core.initializers.items()):
        core.initializers.pop(name)
        if name in taken:
            value.name = f"decoder.{name}"
        outer.register_initializer(value)
    for value in [*fed, *(value for node in nodes for value in node.outputs)]:
        if value.name:
            value.name = f"decoder.{value.name}"
    for node in nodes:
        node.name = f"decoder.{node.name}" if node.name else None


def _unchanging(nodes: Iterable[ir.Node], varying: Iterable[ir.Value]) -> list[ir.Node]:
    """The nodes, in their order, that compute the same for every token: those that read nothing that varies."""
    changes = set(varying)
    found = []
    for node in nodes:
        if changes.intersection(value for value in node.inputs if value is not None):
            changes.update(node.outputs)
        else:
            found.append(node)
    return found


def _feed_picture(outer: ir.Graph, opset: int) -> None:
    """Put in the place of `pixel_values` `[1, 3, height, width] float32` the picture that they are of."""
    [pixels] = outer.inputs
    picture = _value(IMAGE, "uint8", ["height", "width", 3])
    made = _parsed(_PICTURE, {IMAGE: picture}, opset, "picture.")
    outer.insert_before(outer[0], made.nodes)
    pixels.replace_all_uses_with(made["pixels"])
    outer.inputs[:] = [picture]


def _finish(outer: ir.Graph, carried: Mapping[str, ir.Value], loop: ir.Node, opset: int) -> None:
    """Give the graph the outputs that a caller wants, of what the loop carried by its name."""
    for index, value in enumerate(loop.outputs):
        value.name = f"caption.{index}"
    after = _parsed(_AFTER, {"lengths_column": carried["lengths"]}, opset, "after.")
    outputs = {"sequences": carried["tokens"], "lengths": after["lengths"], "scores": carried["scores"]}
    if "text" in carried:
        texts = _parsed(_TEXTS, {"texts_column": carried["text"]}, opset, "after.")
        after.nodes.extend(texts.nodes)
        outputs["texts"] = texts["texts"]
    outer.extend(after.nodes)
    for spec in _outputs(has_texts="text" in carried):
        value = outputs[spec.name]
        value.name, value.shape = spec.name, ir.Shape(spec.shape)
        value.type = ir.TensorType(_TYPES[spec.dtype.replace("float32", "float")])
    outer.outputs[:] = list(outputs.values())


def _outputs(*, has_texts: bool) -> tuple[TensorSpec, ...]:
    texts = TensorSpec("texts", "string", ("batch_size",))
    return (
        TensorSpec("sequences", "int64", ("batch_size", "new_tokens")),
        TensorSpec("lengths", "int64", ("batch_size",)),
        TensorSpec("scores", "float32", ("batch_size", "new_tokens")),
        *((texts,) if has_texts else ()),
    )
