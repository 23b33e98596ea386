"""Greedy generation and sampling: token by token, for several rows at once.

Sampling draws with the numbers of `noise.py`, so that a seed makes it repeatable on any machine, and in the one graph
of layout single. Its tokens cannot be those that torch draws with that seed, though their distribution is the same.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlm_export.errors import InputError
from vlm_export.runtime import logits, noise
from vlm_export.runtime.drivers import Driver
from vlm_export.runtime.options import Plan
from vlm_export.runtime.sessions import Cache, DecoderRun, Inputs, take_rows

FinishReason = Literal["stop", "length", "cancelled"]
# The rows' new tokens so far → for each row whether they end in a stop text. Called once a step.
Watch = Callable[[Sequence[Sequence[int]]], Sequence[bool]]


@dataclass
class Generated:
    """One generated sequence, eos included."""

    token_ids: list[int]
    finish_reason: FinishReason
    score: float | None = None


class Decoder:
    """A driver, what its steps need of the inputs, and the cache: the rows of one generation.

    It begins with the driver's prefill, or with a run that was made.
    """

    def __init__(
        self,
        driver: Driver,
        inputs: Inputs,
        begun: DecoderRun | None = None,
    ):
        self.driver = driver
        self.per_step_inputs = driver.per_step(inputs)
        self.history = driver.token_history(inputs)
        done = driver.prefill(inputs) if begun is None else begun
        self.cache: Cache = done.cache
        self.scores = done.logits[:, -1].astype(np.float32)
        self.first_token = time.perf_counter()

    def step(self, token_ids: Sequence[int]) -> None:
        """Append a token to each row."""
        self.history = [[*row, token] for row, token in zip(self.history, token_ids, strict=True)]
        column = np.array(token_ids, dtype=np.int64)[:, None]
        done = self.driver.step(column, self.cache, self.per_step_inputs)
        self.cache, self.scores = done.cache, done.logits[:, -1].astype(np.float32)

    def take(self, rows: np.ndarray) -> None:
        """Go on with these rows, `[new rows] int64`; nothing is moved where they are those that there are."""
        if np.array_equal(rows, np.arange(len(self.history))):
            return
        self.cache = take_rows(self.cache, rows)
        self.per_step_inputs = {name: value[rows] for name, value in self.per_step_inputs.items()}
        self.history = [self.history[row] for row in rows]
        self.scores = self.scores[rows]


def generate(
    decoder: Decoder, plan: Plan, *, watch: Watch | None = None, cancelled: Callable[[], bool] | None = None
) -> list[Generated]:
    """Generate greedily or by sampling from a decoder that has run its prompts.

    Returns `plan.num_return_sequences` sequences for each row, one row's after another's, none of them padded.
    """
    decoder.take(np.repeat(np.arange(len(decoder.history)), plan.num_return_sequences))
    rows = range(len(decoder.history))
    seeds = [secrets.randbelow(noise.PRIME) if plan.seed is None else plan.seed for _ in rows]
    samples = [row % plan.num_return_sequences for row in rows]  # a prompt's own, whatever the rest of the batch
    tokens: list[list[int]] = [[] for _ in rows]
    reasons: list[FinishReason | None] = [None for _ in rows]
    for count in range(1, plan.max_new_tokens + 1):
        scores = logits.process(decoder.scores, decoder.history, count - 1, plan)
        chosen = (_drawn(scores, seeds, samples, count - 1) if plan.do_sample else scores.argmax(axis=1)).tolist()
        for row in rows:
            if reasons[row] is None:
                tokens[row].append(chosen[row])
                ended = chosen[row] in plan.eos_token_ids
                reasons[row] = "stop" if ended else "length" if count == plan.max_new_tokens else None
        for row, ends in enumerate(watch(tokens) if watch else ()):
            reasons[row] = "stop" if ends else reasons[row]
        if None not in reasons:
            break
        if cancelled and cancelled():
            break
        decoder.step([plan.pad_token_id if reasons[row] else chosen[row] for row in rows])
    return [Generated(ids, reason or "cancelled") for ids, reason in zip(tokens, reasons, strict=True)]


def _drawn(scores: np.ndarray, seeds: Sequence[int], samples: Sequence[int], step: int) -> np.ndarray:
    """A token for each row of `[rows, vocabulary] float32`, drawn with the probability that its scores give it.

    Raises:
        InputError: the rules leave no token.
        FloatingPointError: the decoder's scores are no numbers.
    """
    best = scores.max(axis=1)
    if not (best < np.inf).all():
        raise FloatingPointError("the decoder's scores hold NaN or Inf")
    if np.isneginf(best).any():
        raise InputError("no_repeat_ngram_size: no token is left to draw: lower it, or ask for fewer tokens")
    drawn = []
    for row, seed, sample in zip(scores, seeds, samples, strict=True):
        kept = np.flatnonzero(row > -np.inf)
        drawn.append(kept[(row[kept] + noise.gumbel(seed, sample, step, kept)).argmax()])
    return np.array(drawn)
