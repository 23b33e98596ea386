"""What is done to a decoder's scores before a token is taken from them, in transformers' order and with its results.

Written by hand: transformers has these for torch alone, onnxruntime-genai has its own inside a runtime with its own
format of models, and no kept library was found that has them for numpy. `scores` are `[rows, vocabulary] float32`;
`history` holds for each row the ids that rules on repetition look back on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm_export.runtime.options import Plan

History = Sequence[Sequence[int]]
_NEVER = np.float32(-np.inf)


def process(scores: np.ndarray, history: History, new_tokens: int, plan: Plan) -> np.ndarray:
    """Everything that `plan` asks for; `new_tokens` were generated so far.

    Raises:
        FloatingPointError: a score is NaN, which `argmax` would take for the best.
    """
    if np.isnan(scores).any():
        raise FloatingPointError("the decoder's scores are no numbers: some are too large for the dtype")
    if plan.repetition_penalty != 1.0:
        scores = repetition_penalty(scores, history, plan.repetition_penalty)
    if plan.no_repeat_ngram_size:
        scores = no_repeat_ngrams(scores, history, plan.no_repeat_ngram_size)
    if plan.bad_words_ids:
        scores = bad_words(scores, history, plan)
    if new_tokens < plan.min_new_tokens:
        scores = without(scores, plan.eos_token_ids)
    if new_tokens == 0 and plan.forced_bos_token_id is not None:
        scores = only(scores, (plan.forced_bos_token_id,))
    if new_tokens == plan.max_new_tokens - 1 and plan.forced_eos_token_ids:
        scores = only(scores, plan.forced_eos_token_ids)
    if plan.suppress_tokens:
        scores = without(scores, plan.suppress_tokens)
    begin = 0 if plan.forced_bos_token_id is None else 1
    if new_tokens == begin and plan.begin_suppress_tokens:
        scores = without(scores, plan.begin_suppress_tokens)
    return warp(scores, plan) if plan.do_sample else scores


def warp(scores: np.ndarray, plan: Plan) -> np.ndarray:
    """What sampling draws from: temperature, then the `top_k` best, then as many of the best as `top_p` takes."""
    keep = len(plan.eos_token_ids) + 1 if plan.num_beams > 1 else 1
    if plan.temperature != 1.0:
        scores = scores / np.float32(plan.temperature)
    if plan.top_k:
        scores = top_k(scores, max(plan.top_k, keep))
    if plan.top_p < 1.0:
        scores = top_p(scores, plan.top_p, keep)
    return scores


def repetition_penalty(scores: np.ndarray, history: History, penalty: float) -> np.ndarray:
    """Scores of tokens in the history are divided by the penalty, negative ones multiplied."""
    scores = scores.copy()
    for row, ids in zip(scores, history, strict=True):
        seen = np.unique([token for token in ids if token < len(row)]).astype(np.int64)
        row[seen] = np.where(row[seen] < 0, row[seen] * np.float32(penalty), row[seen] / np.float32(penalty))
    return scores


def no_repeat_ngrams(scores: np.ndarray, history: History, size: int) -> np.ndarray:
    """A token that would complete an n-gram of the history cannot come."""
    scores = scores.copy()
    for row, ids in zip(scores, history, strict=True):
        if len(ids) < size:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(np.array(ids, dtype=np.int64), size)
        start = np.array(ids[len(ids) + 1 - size :], dtype=np.int64)
        last = windows[(windows[:, :-1] == start).all(axis=1), -1]
        row[last[last < len(row)]] = _NEVER
    return scores


def without(scores: np.ndarray, token_ids: Sequence[int]) -> np.ndarray:
    """None of these tokens can come."""
    scores = scores.copy()
    scores[:, _scored(token_ids, scores)] = _NEVER
    return scores


def only(scores: np.ndarray, token_ids: Sequence[int]) -> np.ndarray:
    """Nothing but these tokens can come, each as well as the others."""
    forced = np.full_like(scores, _NEVER)
    forced[:, _scored(token_ids, scores)] = 0
    return forced


def _scored(token_ids: Sequence[int], scores: np.ndarray) -> list[int]:
    """Those that have a score: a file may name tokens that the model has not."""
    return [token for token in token_ids if 0 <= token < scores.shape[1]]


def bad_words(scores: np.ndarray, history: History, plan: Plan) -> np.ndarray:
    """The last token of a bad word cannot come behind the others; an end alone is no bad word."""
    scores = scores.copy()
    for *before, last in plan.bad_words_ids:
        if not before and last in plan.eos_token_ids:
            continue
        for row, ids in zip(scores, history, strict=True):
            if last < len(row) and (not before or list(ids[-len(before) :]) == before):
                row[last] = _NEVER
    return scores


def top_k(scores: np.ndarray, count: int) -> np.ndarray:
    """The `count` best, and those equal to the last of them."""
    count = min(count, scores.shape[1])
    least = np.partition(scores, -count, axis=1)[:, -count, None]
    return np.where(scores < least, _NEVER, scores)


def top_p(scores: np.ndarray, share: float, keep: int = 1) -> np.ndarray:
    """The best whose probabilities together reach `share`; never fewer than `keep`."""
    order = np.argsort(scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1)
    dropped = np.cumsum(softmax(ranked), axis=1) <= np.float32(1 - share)
    dropped[:, -keep:] = False
    found = np.empty_like(dropped)
    np.put_along_axis(found, order, dropped, axis=1)
    return np.where(found, _NEVER, scores)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities along the last axis."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
