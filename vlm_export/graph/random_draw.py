"""How the loop of generation draws a token by chance, as ONNX text: `TemperatureLogitsWarper`, top-k, top-p, a draw.

The noise is `runtime/noise.py`'s, so that a seed draws the same tokens in every runtime, unless two of them are nearly
tied, and those that `run` draws of the graphs apart. A text does not depend on the others of its run: they share the
seed's noise. With a `top_k` of 1 there is nothing to draw, and the likeliest is taken.

Where scores are equal to the last that `top_k` keeps, the lower ids are kept, while transformers keeps all of them.
"""

from __future__ import annotations

from vlm_export.runtime.noise import ADDENDS, COARSE, PRIME, STEPS

# Of what is drawn from, in the order of scores: K tokens of each of R rows.
_KEPT = """
no_top_k = Constant <value_int = 0> ()
scalar_place = Constant <value_ints = [0]> ()
second_place = Constant <value_int = 1> ()
nothing_before = Constant <value_float = 0.0> ()
everything = Constant <value_float = 1.0> ()
largest = Constant <value_float = 3.4e38> ()
infinite = Add (largest, largest)
excluded = Neg (infinite)
cooled = Div (final, temperature)
all_tokens = Shape <start = 1, end = 2> (final)
asked_count = Unsqueeze (top_k, scalar_place)
fewer_tokens = Min (asked_count, all_tokens)
has_top_k = Greater (top_k, no_top_k)
kept_count = Where (has_top_k, fewer_tokens, all_tokens)
ranked, ranked_ids = TopK <axis = 1, largest = 1, sorted = 1> (cooled, kept_count)
shares = Softmax <axis = 1> (ranked)
share_before = CumSum <exclusive = 1> (shares, second_place)
is_in_share = Less (share_before, top_p)
is_best = LessOrEqual (share_before, nothing_before)
has_no_top_p = GreaterOrEqual (top_p, everything)
in_share_or_best = Or (is_in_share, is_best)
is_kept = Or (in_share_or_best, has_no_top_p)
kept = Where (is_kept, ranked, excluded)
"""
_NUMBERS = f"""
prime = Constant <value_int = {PRIME}> ()
coarse = Constant <value_int = {COARSE}> ()
steps = Constant <value_float = {STEPS}.0> ()
half_a_step = Constant <value_float = 0.5> ()
no_number = Constant <value_int = 0> ()
state_of_none = Identity (no_number)
"""
_ROUND = """
addend_of_NAME = Constant <value_int = ADDEND> ()
with_NAME = Add (state_of_BEFORE, NUMBER)
beside_NAME = Add (with_NAME, addend_of_NAME)
residue_of_NAME = Mod (beside_NAME, prime)
square_of_NAME = Mul (residue_of_NAME, residue_of_NAME)
second_of_NAME = Mod (square_of_NAME, prime)
square_again_of_NAME = Mul (second_of_NAME, second_of_NAME)
fourth_of_NAME = Mod (square_again_of_NAME, prime)
product_of_NAME = Mul (fourth_of_NAME, residue_of_NAME)
state_of_NAME = Mod (product_of_NAME, prime)
"""
_DRAWN = """
step_of_each = Div (state_of_last, coarse)
step_number = Cast <to = 1> (step_of_each)
middle = Add (step_number, half_a_step)
uniform = Div (middle, steps)
logarithm = Log (uniform)
waiting = Neg (logarithm)
logarithm_of_waiting = Log (waiting)
disturbed = Sub (kept, logarithm_of_waiting)
drawn_place = ArgMax <axis = 1, keepdims = 1> (disturbed)
best = GatherElements <axis = 1> (ranked_ids, drawn_place)
likelihoods = LogSoftmax <axis = 1> (kept)
its_score = GatherElements <axis = 1> (likelihoods, drawn_place)
"""


def text() -> str:
    """A draw: of `final` `[R, V] float32` → `best` `[R, 1] int64` and the logarithm of its probability, `its_score`.

    It reads `temperature` and `top_p`, float32, and `top_k`, `seed` and `iteration`, int64, which are scalars. The
    logarithm is that of the probability among the tokens which are kept.
    """
    return "\n".join([_KEPT, _NUMBERS, *_rounds(), _DRAWN])


def _rounds() -> list[str]:
    """The rounds of `noise.gumbel`, each of what it takes in."""
    taken_in = {"seed": "seed", "step": "iteration", "token": "ranked_ids", "fourth": "no_number", "last": "no_number"}
    made, before = [], "none"
    for (name, number), addend in zip(taken_in.items(), ADDENDS, strict=True):
        made.append(
            _ROUND.replace("NAME", name)
            .replace("BEFORE", before)
            .replace("NUMBER", number)
            .replace("ADDEND", str(addend))
        )
        before = name
    return made
