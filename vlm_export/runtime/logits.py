"""What is done to a decoder's scores before a token is taken from them, in transformers' order and with its results.

Written by hand: transformers has these for torch alone, onnxruntime-genai has its own inside a runtime with its own
format of models, and no kept library was found that has them for numpy. `scores` are `[rows, vocabulary] float32`, and
every function returns others of that shape; `history` holds for each row the ids that rules on repetition look back on.

Source: transformers 5.23, the classes of `generation/logits_process.py` that each function names; their order is that
of `_get_logits_processor` in `generation/utils.py`. What must not be chosen has the score -inf.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm_export.runtime.options import Plan

History = Sequence[Sequence[int]]
_EXCLUDED_SCORE = np.float32(-np.inf)


def process(scores: np.ndarray, history: History, new_tokens: int, plan: Plan) -> np.ndarray:
    """Apply every rule of `plan` to the scores of the next token; `new_tokens` were generated so far.

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
    """The scores that sampling draws from: divided by the temperature, then cut by `top_k`, then by `top_p`.

    `TemperatureLogitsWarper`. Beams keep at least a token more than there are that end a text.
    """
    keep = len(plan.eos_token_ids) + 1 if plan.num_beams > 1 else 1
    if plan.temperature != 1.0:
        scores = scores / np.float32(plan.temperature)
    if plan.top_k:
        scores = top_k(scores, max(plan.top_k, keep))
    if plan.top_p < 1.0:
        scores = top_p(scores, plan.top_p, keep)
    return scores


def repetition_penalty(scores: np.ndarray, history: History, penalty: float) -> np.ndarray:
    """Divide the scores of tokens in the history by the penalty, and multiply negative ones by it.

    `RepetitionPenaltyLogitsProcessor`.
    """
    scores = scores.copy()
    for row, ids in zip(scores, history, strict=True):
        seen = np.unique([token for token in ids if token < len(row)]).astype(np.int64)
        row[seen] = np.where(row[seen] < 0, row[seen] * np.float32(penalty), row[seen] / np.float32(penalty))
    return scores


def no_repeat_ngrams(scores: np.ndarray, history: History, size: int) -> np.ndarray:
    """Exclude each token that would complete an n-gram of the history: `NoRepeatNGramLogitsProcessor`."""
    scores = scores.copy()
    for row, ids in zip(scores, history, strict=True):
        if len(ids) < size:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(np.array(ids, dtype=np.int64), size)
        start = np.array(ids[len(ids) + 1 - size :], dtype=np.int64)
        last = windows[(windows[:, :-1] == start).all(axis=1), -1]
        row[last[last < len(row)]] = _EXCLUDED_SCORE
    return scores


def without(scores: np.ndarray, token_ids: Sequence[int]) -> np.ndarray:
    """Exclude these tokens.

    `SuppressTokensLogitsProcessor` and `SuppressTokensAtBeginLogitsProcessor`, and what
    `MinNewTokensLengthLogitsProcessor` does to end tokens.
    """
    scores = scores.copy()
    scores[:, _scored(token_ids, scores)] = _EXCLUDED_SCORE
    return scores


def only(scores: np.ndarray, token_ids: Sequence[int]) -> np.ndarray:
    """Exclude all but these tokens, whose scores become 0.

    `ForcedBOSTokenLogitsProcessor` and `ForcedEOSTokenLogitsProcessor`.
    """
    forced = np.full_like(scores, _EXCLUDED_SCORE)
    forced[:, _scored(token_ids, scores)] = 0
    return forced


def _scored(token_ids: Sequence[int], scores: np.ndarray) -> list[int]:
    """Those of the tokens that have a score: a file may name tokens that the model lacks."""
    return [token for token in token_ids if 0 <= token < scores.shape[1]]


def bad_words(scores: np.ndarray, history: History, plan: Plan) -> np.ndarray:
    """Exclude the last token of a bad word where the history ends in the others: `NoBadWordsLogitsProcessor`.

    A word that is nothing but an end token is none.
    """
    scores = scores.copy()
    for *before, last in plan.bad_words_ids:
        if not before and last in plan.eos_token_ids:
            continue
        for row, ids in zip(scores, history, strict=True):
            if last < len(row) and (not before or list(ids[-len(before) :]) == before):
                row[last] = _EXCLUDED_SCORE
    return scores


def top_k(scores: np.ndarray, count: int) -> np.ndarray:
    """Exclude all but the `count` best, and those equal to the last of them: `TopKLogitsWarper`."""
    count = min(count, scores.shape[1])
    least = np.partition(scores, -count, axis=1)[:, -count, None]
    return np.where(scores < least, _EXCLUDED_SCORE, scores)


def top_p(scores: np.ndarray, share: float, keep: int = 1) -> np.ndarray:
    """Exclude all but the best whose probabilities together reach `share`, at least `keep`: `TopPLogitsWarper`."""
    order = np.argsort(scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1)
    dropped = np.cumsum(softmax(ranked), axis=1) <= np.float32(1 - share)
    dropped[:, -keep:] = False
    found = np.empty_like(dropped)
    np.put_along_axis(found, order, dropped, axis=1)
    return np.where(found, _EXCLUDED_SCORE, scores)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Scores → probabilities, along the last axis."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Scores → logarithms of probabilities, along the last axis."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
