"""Random numbers for sampling that are the same in every runtime: a number of a seed, a step and a token, and no state.

Each is made of whole numbers below 2**31 - 1 by additions and products, which ONNX Runtime has for int64 everywhere:
`graph/random_draw.py` makes the same numbers in a graph. A round takes a number in and then the fifth power, which
changes places of all residues of this prime, as in the cipher MiMC (Albrecht and others, 2016) with another exponent.
"""

from __future__ import annotations

import math

import numpy as np

PRIME = 2**31 - 1  # 5 does not divide it less one: fifth powers of all residues are all residues
# One a round, with no meaning: behind the point of square roots. Taken in are a seed, a step, a token, and nothing.
ADDENDS = tuple(int(math.sqrt(number) % 1 * PRIME) for number in (2, 3, 5, 7, 11))
STEPS = 2**23  # of what is drawn between 0 and 1: float32 holds the middle of each, and none is 0 or 1
COARSE = 2**31 // STEPS
_APART = 1327217885  # between the seeds of a prompt's samples


def gumbel(seed: int, sample: int, step: int, token_ids: np.ndarray) -> np.ndarray:
    """Noise of these tokens, `[tokens] int64` → `[tokens] float32`; sample 0 is what a graph draws.

    The token whose score and noise have the largest sum is drawn with the probability that scores give it. Seeds that
    differ by a multiple of `PRIME` are the same.
    """
    state = np.zeros(1, dtype=np.int64)
    taken_in: tuple[int | np.ndarray, ...] = ((seed + sample * _APART) % PRIME, step, token_ids, 0, 0)
    for number, addend in zip(taken_in, ADDENDS, strict=True):
        state = (state + number + addend) % PRIME
        square = state * state % PRIME
        state = square * square % PRIME * state % PRIME
    uniform = ((state // COARSE).astype(np.float32) + np.float32(0.5)) / np.float32(STEPS)
    return -np.log(-np.log(uniform))
