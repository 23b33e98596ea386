"""How the loop of generation takes tokens of the scores that rules leave, as ONNX text.

A decoder's rows are the prompts, or several beams of each. What is carried from token to token is a choice's own, and
so is what becomes of it at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlm_export.graph import random_draw
from vlm_export.graph.onnx_text import Sizes


@dataclass(frozen=True)
class Choice:
    """Texts of a choice. B: prompts, R: rows of the decoder, V: vocabulary, T: tokens so far.

    Attributes:
        made: what is carried beside the decoder's inputs, by name, with its type and sizes; of it `tokens` `[R, T]`.
        before: makes `first_…` of each of `made`, of the options by name, `rows` `[1]`, `empty_shape` `[2]` (a row
            each, no columns), `column_shape` `[2]` (one) and `first_beams` `[1]`, how many rows a prompt has first.
        scored: `logits` `[R, 1, V]` → `plain` `[R, V]`, which the rules are for.
        turn: of `plain`, `final` `[R, V]` (behind the rules), the options, `trips`, `iteration` and `made` it makes
            `chosen` `[R, 1]`, `going` (whether a text goes on), `next_…` of each of `made`, and, where `moves_rows`,
            `origins` `[R]`, the row that each row of the next run continues.
        after: of `made_…`, each of `made` at the end, → `sequences` `[B, T]`, `lengths` `[B]`, the same as
            `lengths_column` `[B, 1]`, and `scores` `[B, T]`.
        moves_rows: whether rows become others'.
    """

    made: Mapping[str, tuple[str, Sizes]]
    before: str
    scored: str
    turn: str
    after: str
    moves_rows: bool = False


# The likeliest token, or one that is drawn, where the option `temperature` is above 0.
ONE_BY_ONE = Choice(
    made={
        "tokens": ("int64", ("batch_size", "made_tokens")),
        "finished": ("bool", ("batch_size", 1)),
        "lengths": ("int64", ("batch_size", 1)),
        "scores": ("float32", ("batch_size", "made_tokens")),
    },
    before="""
first_tokens = ConstantOfShape <value = int64[1] {0}> (empty_shape)
first_scores = ConstantOfShape (empty_shape)
first_lengths = ConstantOfShape <value = int64[1] {0}> (column_shape)
first_finished = Cast <to = 9> (first_lengths)
""",
    scored="""
only_column = Constant <value_ints = [1]> ()
plain = Squeeze (logits, only_column)
""",
    turn=f"""
zero = Constant <value_int = 0> ()
none = Constant <value_float = 0.0> ()
along = Constant <value_ints = [1]> ()
is_drawn = Greater (temperature, none)
taken, its_score = If (is_drawn) <
    then_branch = draw () => (best, its_logarithm) {{
{random_draw.text()}
        its_logarithm = Identity (its_score)
    }},
    else_branch = likeliest () => (likeliest_id, likeliest_score) {{
        likeliest_id = ArgMax <axis = 1, keepdims = 1> (final)
        likelihoods = LogSoftmax <axis = 1> (final)
        likeliest_score = GatherElements <axis = 1> (likelihoods, likeliest_id)
    }}
>
score = Where (finished, none, its_score)
next_scores = Concat <axis = 1> (scores, score)
pad = Constant <value_int = PAD> ()
chosen = Where (finished, pad, taken)
next_tokens = Concat <axis = 1> (tokens, chosen)
ends_of_text = Constant <value_ints = ENDS> ()
is_each_end = Equal (chosen, ends_of_text)
each_end = Cast <to = 7> (is_each_end)
any_end = ReduceMax <keepdims = 1> (each_end, along)
is_end = Cast <to = 9> (any_end)
next_finished = Or (finished, is_end)
unfinished = Not (finished)
one_more = Cast <to = 7> (unfinished)
next_lengths = Add (lengths, one_more)
goes_on = Not (next_finished)
go_on = Cast <to = 7> (goes_on)
rows_going = ReduceSum <keepdims = 0> (go_on)
going = Greater (rows_going, zero)
""",
    after="""
last_axis = Constant <value_ints = [1]> ()
sequences = Identity (made_tokens)
lengths_column = Identity (made_lengths)
lengths = Squeeze (lengths_column, last_axis)
scores = Identity (made_scores)
""",
)
