"""What stands before the loop of generation: what its decoder is fed first, and what it is fed next.

`Start` is a captioner's: a start token, and the states of an encoder. Each beginning takes the graphs of its layout,
puts what is computed once into the first of them, and says what the loop carries of the decoder's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from vlm_export.graph.onnx_text import parsed
from vlm_export.graph.taken_apart import Part, move_weights, take_apart
from vlm_export.spec import cache

_CROSS = ".encoder."
ROWS = """
no_columns = Constant <value_ints = [0]> ()
one_column = Constant <value_ints = [1]> ()
rows = Shape <start = 0, end = 1> (of_each_row)
empty_shape = Concat <axis = 0> (rows, no_columns)
column_shape = Concat <axis = 0> (rows, one_column)
"""
_EMPTY = """
NAME_sizes = Constant <value_ints = SIZES> ()
NAME_shape = Concat <axis = 0> (rows, NAME_sizes)
NAME = ConstantOfShape (NAME_shape)
"""
_START = """
start_token = Constant <value_int = START> ()
first_ids = Expand (start_token, column_shape)
no_ids = ConstantOfShape <value = int64[1] {0}> (empty_shape)
"""
_OF_PREFIX = "taken = Shape <start = 1, end = 2> (of_each_row)"
_NOTHING_TAKEN = "taken = Constant <value_ints = [0]> ()"


Moved = Callable[[ir.Value], ir.Value]


@dataclass(frozen=True)
class Carried:
    """What the loop carries: an input of its body, and what that is first."""

    value: ir.Value
    first: ir.Value


@dataclass(frozen=True)
class Opened:
    """What stands before the loop, and the decoder for its body.

    Attributes:
        nodes: of the decoder, in no graph.
        logits: what they give for the last column, `[B, 1, V] float32`.
        of_each_row: a value outside the loop whose first axis is the batch's.
        begun: ids that rules on repetition look back on, `[B, …] int64`.
        taken: how many positions are taken before the first new token is fed, `[1] int64`.
        carried: of the decoder's inputs, in order.
        next: of the ids chosen, `[R, 1] int64`, and of what takes a value of the rows before to the rows that are
            next, the nodes that make what each of those is fed next, and that.
        by_prompt: values from outside that the body reads row by row.
        of_cross: keys and values of cross-attention, which are the same in each run.
    """

    nodes: list[ir.Node]
    logits: ir.Value
    of_each_row: ir.Value
    begun: ir.Value
    taken: ir.Value
    carried: list[Carried]
    next: Callable[[ir.Value, Moved], tuple[list[ir.Node], list[ir.Value]]]
    by_prompt: Sequence[ir.Value] = ()
    of_cross: Sequence[ir.Value] = ()


class Beginning(Protocol):
    """How a text begins, and how long it may become."""

    @property
    def positions(self) -> int:
        """How many tokens the model has positions for."""

    def open(self, parts: Sequence[ir.Model], opset: int) -> Opened:
        """Take the graphs after the first apart, and put what stands before the loop into the first."""


@dataclass(frozen=True)
class Start:
    """A captioner's: `encoder_model` and `decoder_model_merged`.

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

    def open(self, parts: Sequence[ir.Model], opset: int) -> Opened:
        """As of `Beginning`: the states are the same for each token, and keys and values of them are made once."""
        encoder, core = (model.graph for model in parts)
        [states] = encoder.outputs
        move_weights(core, encoder, "decoder.")
        decoder = take_apart(core, "decoder.")
        empties, empty = empty_caches(decoder)
        none = next(iter(empty.values()))
        text = "\n".join(
            [
                ROWS,
                empties,
                _START.replace("START", str(self.token)),
                _OF_PREFIX if self.has_prefix else _NOTHING_TAKEN,
            ]
        )
        before = parsed(text, {"of_each_row": states}, opset, "start.")
        encoder.extend(before.nodes)
        decoder.fed["encoder_hidden_states"].replace_all_uses_with(states)
        for name, value in decoder.fed.items():
            if _CROSS in name:
                value.replace_all_uses_with(before[none])
        return Opened(
            decoder.nodes,
            decoder.given["logits"],
            states,
            before["first_ids" if self.is_history else "no_ids"],
            before["taken"],
            [
                Carried(decoder.fed["input_ids"], before["first_ids"]),
                *(Carried(decoder.fed[name], before[made]) for name, made in empty.items()),
            ],
            lambda chosen, moved: ([], [chosen, *map(moved, given_cache(decoder))]),
            by_prompt=[states] if self.has_prefix else [],
            of_cross=[value for name, value in decoder.given.items() if _CROSS in name],
        )


def own_cache(decoder: Part) -> dict[str, ir.Value]:
    """The inputs of a decoder that hold what its layers keep, by name; not those of cross-attention."""
    return {name: value for name, value in decoder.fed.items() if cache.is_past(name) and _CROSS not in name}


def given_cache(decoder: Part) -> list[ir.Value]:
    """What a decoder gives for each of `own_cache`."""
    return [decoder.given[cache.present_of(name)] for name in own_cache(decoder)]


def empty_caches(decoder: Part) -> tuple[str, dict[str, str]]:
    """ONNX text that makes of `rows` what each of `own_cache` is first, and by its name the name of that in the text.

    Of keys and values there are none; of any other state there are zeros.
    """
    made: dict[str, str] = {}
    sizes: dict[str, str] = {}
    for name, value in own_cache(decoder).items():
        assert value.shape is not None, name
        known = [0 if not isinstance(size, int) else size for size in value.shape[1:]]
        made[name] = sizes.setdefault(str(known), f"empty_{len(sizes)}")
    text = "".join(_EMPTY.replace("NAME", name).replace("SIZES", known) for known, name in sizes.items())
    return text, made
