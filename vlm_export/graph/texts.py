"""The texts of generated ids as ONNX text: their tokens' bytes in a row, as UTF-8 that is whole.

Bytes and no strings, since the builds of ONNX Runtime for WebGPU join no strings: onnxruntime-web 1.31 has there only
operators that copy them, such as `Gather`, `Reshape` and `Identity`.

A character may have its bytes in several tokens. Where some of them are missing, since the text was cut or a rule
forbade the next token, those that are there are left out, so that any decoder takes the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm_export.contract import TEXTS_BETWEEN

# Within which the second byte of a character lies, by its first one (table 3-7 of the Unicode standard).
_SECOND = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}
_ANY_SECOND = (0x80, 0xBF)
_WHITE = b"\t\n\v\f\r "


def tables(pieces: Sequence[bytes]) -> dict[str, np.ndarray]:
    """What `text` reads: `piece_bytes` `[bytes] uint8`, and of each piece its size and end there, int32."""
    sizes = np.array([len(piece) for piece in pieces], dtype=np.int32)
    whole = b"".join(pieces) or TEXTS_BETWEEN.encode()  # `Gather` takes no empty table
    ends = np.cumsum(sizes, dtype=np.int32)
    return {"piece_bytes": np.frombuffer(whole, dtype=np.uint8), "piece_sizes": sizes, "piece_ends": ends}


def text() -> str:
    """Of `tokens` `[B, T] int64`, `lengths` `[B, 1] int64` and the tables it makes `texts` `[bytes] uint8`.

    A row's text has no white space at either end, and none has `TEXTS_BETWEEN`, which stands between two of them.
    """
    seconds = [_SECOND.get(byte, _ANY_SECOND) for byte in range(256)]
    by_byte = {
        "SIZES": [_character_size(byte) for byte in range(256)],
        "LOWEST": [low for low, _ in seconds],
        "HIGHEST": [high for _, high in seconds],
        "WHITE": [int(byte in _WHITE) for byte in range(256)],
    }
    made = _BYTES + _WHOLE + _ROWS
    for name, values in by_byte.items():
        made = made.replace(name, str(values))
    return made


def _character_size(byte: int) -> int:
    """How many bytes a character has that begins with this one; 0 where none does."""
    beginnings = ((0x01, 0x80), (0xC2, 0xE0), (0xE0, 0xF0), (0xF0, 0xF5))
    return next((size for size, (low, end) in enumerate(beginnings, 1) if low <= byte < end), 0)


# `codes` `[B, W]`: a row's bytes, and zeros up to one more than the longest row has.
_BYTES = """
none = Constant <value_int = 0> ()
one = Constant <value_int = 1> ()
along = Constant <value_ints = [1]> ()
one_behind = Constant <value_ints = [0, 0, 0, 1]> ()
token_count = Shape <start = 1, end = 2> (tokens)
first_axis = Constant <value_ints = [0]> ()
count = Squeeze (token_count, first_axis)
token_places = Range (none, count, one)
is_said = Less (token_places, lengths)
short_sizes = Gather (piece_sizes, tokens)
all_sizes = Cast <to = 7> (short_sizes)
sizes = Where (is_said, all_sizes, none)
ends = CumSum (sizes, one)
starts = Sub (ends, sizes)
short_ends = Gather (piece_ends, tokens)
ends_there = Cast <to = 7> (short_ends)
starts_there = Sub (ends_there, all_sizes)
shifts = Sub (starts_there, starts)
padded_shifts = Pad (shifts, one_behind)
row_sizes = ReduceSum <keepdims = 1> (sizes, along)
longest = ReduceMax <keepdims = 0> (row_sizes)
width = Add (longest, one)
places = Range (none, width, one)
rows = Shape <start = 0, end = 1> (tokens)
width_one = Unsqueeze (width, first_axis)
grid_shape = Concat <axis = 0> (rows, width_one)
no_ends = ConstantOfShape <value = int64[1] {0}> (grid_shape)
end_shape = Shape (ends)
each_end = ConstantOfShape <value = int64[1] {1}> (end_shape)
ends_here = ScatterElements <axis = 1, reduction = "add"> (no_ends, ends, each_end)
owners = CumSum (ends_here, one)
their_shifts = GatherElements <axis = 1> (padded_shifts, owners)
far_places = Add (their_shifts, places)
is_in_row = Less (places, row_sizes)
their_places = Where (is_in_row, far_places, none)
short_codes = Gather (piece_bytes, their_places)
all_codes = Cast <to = 7> (short_codes)
codes = Where (is_in_row, all_codes, none)
"""
# `is_whole` `[B, W]`: the bytes that are of a whole character. `reach` is its size at its first byte, else 0.
_WHOLE = """
character_sizes = Constant <value_ints = SIZES> ()
lowest_seconds = Constant <value_ints = LOWEST> ()
highest_seconds = Constant <value_ints = HIGHEST> ()
lowest = Constant <value_int = 128> ()
highest = Constant <value_int = 191> ()
two = Constant <value_int = 2> ()
three = Constant <value_int = 3> ()
four = Constant <value_int = 4> ()
at_0 = Constant <value_ints = [0]> ()
at_2 = Constant <value_ints = [2]> ()
at_3 = Constant <value_ints = [3]> ()
but_1 = Constant <value_ints = [-1]> ()
but_2 = Constant <value_ints = [-2]> ()
but_3 = Constant <value_ints = [-3]> ()
to_end = Constant <value_ints = [9223372036854775807]> ()
three_behind = Constant <value_ints = [0, 0, 0, 3]> ()
three_before = Constant <value_ints = [0, 3, 0, 0]> ()
size = Gather (character_sizes, codes)
low = Gather (lowest_seconds, codes)
high = Gather (highest_seconds, codes)
and_behind = Pad (codes, three_behind)
second = Slice (and_behind, along, but_2, along)
third = Slice (and_behind, at_2, but_1, along)
fourth = Slice (and_behind, at_3, to_end, along)
second_not_below = GreaterOrEqual (second, low)
second_not_above = LessOrEqual (second, high)
third_not_below = GreaterOrEqual (third, lowest)
third_not_above = LessOrEqual (third, highest)
fourth_not_below = GreaterOrEqual (fourth, lowest)
fourth_not_above = LessOrEqual (fourth, highest)
is_second = And (second_not_below, second_not_above)
is_third = And (third_not_below, third_not_above)
is_fourth = And (fourth_not_below, fourth_not_above)
needs_no_second = Less (size, two)
needs_no_third = Less (size, three)
needs_no_fourth = Less (size, four)
has_second = Or (needs_no_second, is_second)
has_third = Or (needs_no_third, is_third)
has_fourth = Or (needs_no_fourth, is_fourth)
has_two = And (has_second, has_third)
has_all = And (has_two, has_fourth)
reach = Where (has_all, size, none)
and_before = Pad (reach, three_before)
reach_1 = Slice (and_before, at_2, but_1, along)
reach_2 = Slice (and_before, along, but_2, along)
reach_3 = Slice (and_before, at_0, but_3, along)
begins = Greater (reach, none)
is_in_1 = GreaterOrEqual (reach_1, two)
is_in_2 = GreaterOrEqual (reach_2, three)
is_in_3 = GreaterOrEqual (reach_3, four)
is_in_near = Or (begins, is_in_1)
is_in_far = Or (is_in_2, is_in_3)
is_whole = Or (is_in_near, is_in_far)
"""
_ROWS = """
white = Constant <value_ints = WHITE> ()
are_white = Gather (white, codes)
is_white = Cast <to = 9> (are_white)
is_black = Not (is_white)
is_shown = And (is_whole, is_black)
are_shown = Cast <to = 7> (is_shown)
shown_before = CumSum (are_shown, one)
shown_behind = CumSum <reverse = 1> (are_shown, one)
has_begun = Greater (shown_before, none)
goes_on = Greater (shown_behind, none)
is_inside = And (has_begun, goes_on)
is_text = And (is_whole, is_inside)
is_separator = Equal (places, longest)
is_taken = Or (is_text, is_separator)
all_rows = Constant <value_ints = [-1]> ()
bytes = Cast <to = 2> (codes)
flat = Reshape (bytes, all_rows)
flat_taken = Reshape (is_taken, all_rows)
separated = Compress <axis = 0> (flat, flat_taken)
texts = Slice (separated, at_0, but_1, at_0)
"""
