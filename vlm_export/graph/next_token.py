"""What the rules of generation leave of a token's scores in the loop of a whole caption, as ONNX text.

The rules are transformers' (`runtime/logits.py` names its classes), in its order. Some of them a caller may set at each
run (`contract.SINGLE_OPTIONS`); the others are the checkpoint's and fixed.

Of a history of ids, one that has no score (an image token, or what pads a prompt) is given the id `vocabulary`, and the
scores a column of -inf for it, so that no rule needs to know of such ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_export.contract import EARLY_STOPPING, HEEDED, SAMPLING_OPTIONS, SEARCH_OPTIONS, SINGLE_OPTIONS
from vlm_export.errors import InputError
from vlm_export.graph.beam_search import SEARCH
from vlm_export.graph.choice import ONE_BY_ONE, Choice
from vlm_export.runtime.options import searches

_OF_SEARCH = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False}  # in transformers, where nothing is said
_NOT_DRAWN = {"temperature": 0.0, "top_k": 50, "top_p": 1.0, "seed": 0}
_NO_COUNTS = ("repetition_penalty", "length_penalty", "temperature", "top_p")
_FIXED = ("min_length", "suppress_tokens", "begin_suppress_tokens")


@dataclass(frozen=True)
class Rules:
    """Rules of generation, decided.

    Attributes:
        options: those that a caller may set, in order.
        defaults: of each of them.
        ends: ids that end a text.
        pad: the id behind an end.
        never, never_first: ids that are not chosen, or not as the first.
        vocabulary: how many ids have scores.
    """

    options: tuple[str, ...]
    defaults: tuple[float, ...]
    ends: tuple[int, ...]
    pad: int
    vocabulary: int
    never: tuple[int, ...] = ()
    never_first: tuple[int, ...] = ()

    @classmethod
    def of(cls, generation: Mapping[str, Any], vocabulary: int, begun: int | None) -> Rules:
        """The rules of a `generation_config.json`; `begun` ids are there before the first new one, of a prompt any.

        Raises:
            InputError: one of them is not made as a graph.
        """
        fixed = _FIXED if begun is not None else _FIXED[1:]  # a prompt is of any length
        others = HEEDED.keys() - {*SINGLE_OPTIONS, *fixed}
        if asked := sorted(name for name in others if generation.get(name) not in (None, HEEDED[name], [])):
            raise InputError(f"generation: {', '.join(asked)}: layout single has no such rule: take another layout")
        known = {**HEEDED, **{name: value for name, value in generation.items() if value is not None}}
        options = (*SINGLE_OPTIONS, *(SEARCH_OPTIONS if searches(generation) else SAMPLING_OPTIONS))
        known = {**_OF_SEARCH, **known, **_NOT_DRAWN}
        known["early_stopping"] = EARLY_STOPPING.index(known["early_stopping"])
        known["min_new_tokens"] = max(int(known["min_new_tokens"]), int(known["min_length"]) - (begun or 0))
        return cls(
            options=options,
            defaults=tuple(float(known[name]) for name in options),
            ends=_ids(known["eos_token_id"]),
            pad=int(known["pad_token_id"]),
            vocabulary=vocabulary,
            never=_ids(known["suppress_tokens"]),
            never_first=_ids(known["begin_suppress_tokens"]),
        )

    @property
    def choice(self) -> Choice:
        """How a token is taken of what these leave."""
        return SEARCH if set(SEARCH_OPTIONS) <= set(self.options) else ONE_BY_ONE

    def options_text(self) -> str:
        """`options` `[n] float32` → a scalar for each of the options, under its name; counts are int64."""
        lines = [
            f"defaults = Constant <value_floats = {list(self.defaults)}> ()",
            "given = Shape (options)",
            f"all_options = Constant <value_ints = [{len(self.options)}]> ()",
            "option_axis = Constant <value_ints = [0]> ()",
            "not_given = Slice (defaults, given, all_options, option_axis)",
            "settings = Concat <axis = 0> (options, not_given)",
        ]
        for place, name in enumerate(self.options):
            is_count = name not in _NO_COUNTS
            lines += [
                f"place_{place} = Constant <value_int = {place}> ()",
                f"setting_{place} = Gather (settings, place_{place})",
                f"{name} = {f'Cast <to = {_INT64}>' if is_count else 'Identity'} (setting_{place})",
            ]
        return "\n".join(lines)

    def text(self) -> str:
        """The rules themselves.

        Of `plain` `[R, V]`, `begun` and `tokens` `[R, …] int64` (ids before, and new ones so far), the options and the
        count `iteration` it makes `final` `[R, V]`.
        """
        return self.decided("\n".join([_SCORED, *self._excluded(), _FINAL]))

    def decided(self, text: str) -> str:
        """A text with the numbers of this model in it."""
        numbers = {
            "VOCABULARY": self.vocabulary,
            "PAD": self.pad,
            "ENDS": list(self.ends),
            "CANDIDATES": max(2, 1 + len(self.ends)),
        }
        for name, value in numbers.items():
            text = text.replace(name, str(value))
        return text

    def _excluded(self) -> Iterator[str]:
        """Lines that give tokens which the other rules exclude the score -inf."""
        made = "after_ngrams"
        for name, ids, condition in (
            ("early_end", self.ends, "Less (iteration, min_new_tokens)"),
            ("never", self.never, "GreaterOrEqual (iteration, zero)"),
            ("never_first", self.never_first, "Equal (iteration, zero)"),
        ):
            if known := [each for each in ids if 0 <= each < self.vocabulary]:
                yield (
                    _EXCLUDED.replace("NAME", name)
                    .replace("IDS", str(known))
                    .replace("CONDITION", condition)
                    .replace("MADE", made)
                )
                made = f"without_{name}"
        yield f"ruled = Identity ({made})"


def _ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


_INT64 = 7  # of onnx.TensorProto
_EXCLUDED = """
NAME_ids = Constant <value_ints = IDS> ()
NAME_now = CONDITION
NAME_those = Where (NAME_now, NAME_ids, nothing)
NAME_count = Shape (NAME_those)
NAME_shape = Concat <axis = 0> (rows_count, NAME_count)
NAME_places = Expand (NAME_those, NAME_shape)
NAME_lowest = Expand (lowest, NAME_shape)
without_NAME = ScatterElements <axis = 1> (MADE, NAME_places, NAME_lowest)
"""
_SCORED = """
zero = Constant <value_int = 0> ()
one = Constant <value_int = 1> ()
first_axis = Constant <value_ints = [0]> ()
second_axis = Constant <value_ints = [1]> ()
third_axis = Constant <value_ints = [2]> ()
nothing = Constant <value_int = VOCABULARY> ()
none = Constant <value_float = 0.0> ()
highest = Constant <value_float = 3.4e38> ()
twice = Add (highest, highest)
lowest = Neg (twice)
rows_count = Shape <start = 0, end = 1> (plain)
one_each = Constant <value_ints = [1]> ()
column_shape = Concat <axis = 0> (rows_count, one_each)
unscored = Expand (lowest, column_shape)
scored = Concat <axis = 1> (plain, unscored)
whole_history = Concat <axis = 1> (begun, tokens)
history = Min (whole_history, nothing)
their_scores = GatherElements <axis = 1> (scored, history)
multiplied = Mul (their_scores, repetition_penalty)
divided = Div (their_scores, repetition_penalty)
is_negative = Less (their_scores, none)
penalized = Where (is_negative, multiplied, divided)
after_penalty = ScatterElements <axis = 1> (scored, history, penalized)
length_one = Shape <start = 1, end = 2> (history)
length = Squeeze (length_one, first_axis)
before_last = Sub (no_repeat_ngram_size, one)
first_end = Max (before_last, zero)
has_ngrams = Greater (no_repeat_ngram_size, zero)
ends_limit = Where (has_ngrams, length, zero)
ends = Range (first_end, ends_limit, one)
offsets = Range (one, no_repeat_ngram_size, one)
filler = Expand (nothing, column_shape)
filled = Concat <axis = 1> (filler, history)
ends_in_filled = Add (ends, one)
ends_column = Unsqueeze (ends_in_filled, second_axis)
their_places = Sub (ends_column, offsets)
their_beginnings = Gather <axis = 1> (filled, their_places)
length_filled = Add (length, one)
last_places = Sub (length_filled, offsets)
known_places = Max (last_places, zero)
last_tokens = Gather <axis = 1> (filled, known_places)
beginning = Unsqueeze (last_tokens, second_axis)
is_same = Equal (their_beginnings, beginning)
is_other = Not (is_same)
others = Cast <to = 7> (is_other)
count_of_others = ReduceSum <keepdims = 0> (others, third_axis)
would_repeat = Equal (count_of_others, zero)
completions = Gather <axis = 1> (history, ends)
repeated = Where (would_repeat, completions, nothing)
repeated_shape = Shape (repeated)
repeated_lowest = Expand (lowest, repeated_shape)
after_ngrams = ScatterElements <axis = 1> (after_penalty, repeated, repeated_lowest)
"""
_FINAL = """
score_limit = Constant <value_ints = [VOCABULARY]> ()
score_start = Constant <value_ints = [0]> ()
final = Slice (ruled, score_start, score_limit, second_axis)
"""
