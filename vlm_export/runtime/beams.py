"""Beam search, with the results of transformers 5's `_beam_search`, its rules of when to stop included.

Those are not the textbook's. With `early_stopping` false, a prompt is done when its best running beam, divided by its
present length to the power of `length_penalty`, is below its worst finished one; with "never", by the longest possible
length where that favours it; with true, when it has `num_beams` finished ones. Prompts do not see each other.

Source: transformers 5.23, `generation/utils.py`: `_beam_search`, and the functions that it calls at each token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vlm_export.runtime import logits
from vlm_export.runtime.generate import Decoder, FinishReason, Generated, Watch
from vlm_export.runtime.options import Plan

# Added to what must not be chosen; transformers' number, which float32 rounds to the same.
_EXCLUDED_SCORE = np.float32(-1e9)


def search(
    decoder: Decoder, plan: Plan, *, watch: Watch | None = None, cancelled: Callable[[], bool] | None = None
) -> list[Generated]:
    """Run the search from a decoder that has run its prompts: `plan.num_return_sequences` for each row, best first."""
    prompts = [_Prompt(plan, row) for row in range(len(decoder.history))]
    width = plan.num_beams
    decoder.take(np.repeat(np.arange(len(prompts)), width))
    for count in range(plan.max_new_tokens):
        scores = logits.process(logits.log_softmax(decoder.scores), decoder.history, count, plan)
        rows, tokens = [], []
        for index, prompt in enumerate(prompts):
            beams, chosen = prompt.advance(scores[index * width : (index + 1) * width], watch)
            rows += [index * width + beam for beam in beams]
            tokens += chosen
        if all(prompt.done for prompt in prompts):
            break
        if cancelled and cancelled():
            return [beam for prompt in prompts for beam in (prompt.best() if prompt.done else prompt.unfinished())]
        decoder.take(np.array(rows))
        decoder.step(tokens)
    return [beam for prompt in prompts for beam in prompt.best()]


class _Prompt:
    """The running and the finished beams of one prompt."""

    def __init__(self, plan: Plan, row: int):
        self.plan = plan
        self.random = np.random.default_rng(None if plan.seed is None else [plan.seed, 0])
        self.running: list[list[int]] = [[] for _ in range(plan.num_beams)]
        self.scores = np.full(plan.num_beams, _EXCLUDED_SCORE)
        self.scores[0] = 0  # only one of them at first, or all would be the same
        self.finished: list[list[int]] = [[] for _ in range(plan.num_beams)]
        self.finished_scores = np.full(plan.num_beams, _EXCLUDED_SCORE)
        self.is_finished = np.zeros(plan.num_beams, dtype=bool)
        self.improvable = True
        self.done = False

    def advance(self, scores: np.ndarray, watch: Watch | None) -> tuple[list[int], list[int]]:
        """Log probabilities `[beams, vocabulary] float32` of the next token → the beams to go on with, and tokens.

        One turn of the loop in `_beam_search`; it takes as many candidates as `_get_top_k_continuations`.
        """
        plan, width = self.plan, self.plan.num_beams
        if self.done:
            return list(range(width)), [plan.pad_token_id] * width
        total = (scores + self.scores[:, None]).ravel()
        places = self._chosen(total, max(2, 1 + len(plan.eos_token_ids)) * width)
        beams, tokens = np.divmod(places, scores.shape[1])
        sequences = [[*self.running[beam], int(token)] for beam, token in zip(beams, tokens, strict=True)]
        ends = self._ends(sequences, watch)
        self._finish(sequences, total[places], ends)
        running = total[places] + ends * _EXCLUDED_SCORE
        best = np.argsort(-running, kind="stable")[:width]
        self.running, self.scores = [sequences[place] for place in best], running[best]
        self._decide(len(sequences[0]), ends)
        return [int(beam) for beam in beams[best]], [int(token) for token in tokens[best]]

    def best(self) -> list[Generated]:
        """The best finished beams, as many as the plan returns, best first, with their scores."""
        count = self.plan.num_return_sequences
        return [
            Generated(ids, self._reason(ids), float(score))
            for ids, score in zip(self.finished[:count], self.finished_scores[:count], strict=True)
        ]

    def unfinished(self) -> list[Generated]:
        """What is returned when the search is broken off: the best running beams."""
        return [Generated(ids, "cancelled") for ids in self.running[: self.plan.num_return_sequences]]

    def _chosen(self, total: np.ndarray, count: int) -> np.ndarray:
        """Places of the `count` best in `[beams · vocabulary]`, best first; or of as many drawn, none twice."""
        if self.plan.do_sample:  # the largest of log probabilities with Gumbel noise are such a draw
            total = total + self.random.gumbel(size=total.shape)
        count = min(count, len(total))
        places = np.argpartition(-total, count - 1)[:count]
        return places[np.lexsort((places, -total[places]))]

    def _ends(self, sequences: Sequence[list[int]], watch: Watch | None) -> np.ndarray:
        full = len(sequences[0]) == self.plan.max_new_tokens
        stopped = watch(sequences) if watch else [False] * len(sequences)
        return np.array(
            [full or ids[-1] in self.plan.eos_token_ids or stop for ids, stop in zip(sequences, stopped, strict=True)]
        )

    def _finish(self, sequences: list[list[int]], scores: np.ndarray, ends: np.ndarray) -> None:
        """Keep the best of what was finished before and of those of the first `num_beams` that end now.

        `_update_finished_beams`; scores are divided by the length to the power of `length_penalty`.
        """
        width, plan = self.plan.num_beams, self.plan
        just = ends & (np.arange(len(ends)) < width)
        scores = scores / np.float32(len(sequences[0]) ** plan.length_penalty)
        if (self.is_finished.all() and plan.early_stopping is True) or not self.improvable:
            scores = scores + _EXCLUDED_SCORE
        scores = scores + ~just * _EXCLUDED_SCORE
        merged = np.concatenate([self.finished_scores, scores])
        best = np.argsort(-merged, kind="stable")[:width]
        everything = [*self.finished, *sequences]
        self.finished, self.finished_scores = [everything[place] for place in best], merged[best]
        self.is_finished = np.concatenate([self.is_finished, just])[best]

    def _decide(self, length: int, ends: np.ndarray) -> None:
        """Set `done` once no running beam can become one of the best, or none may go on.

        `_check_early_stop_heuristic` and `_beam_search_has_unfinished_sequences`.
        """
        plan = self.plan
        hypothetical = length
        if plan.early_stopping == "never" and plan.length_penalty > 0:
            hypothetical = plan.max_new_tokens
        possible = self.scores[0] / np.float32(hypothetical**plan.length_penalty)
        worst = np.where(self.is_finished, self.finished_scores.min(), _EXCLUDED_SCORE)
        self.improvable = self.improvable and bool((possible > worst).any())
        is_open = not (self.is_finished.all() and plan.early_stopping is True)
        self.done = not (self.improvable and is_open and not ends.all())

    def _reason(self, ids: Sequence[int]) -> FinishReason:
        full = len(ids) == self.plan.max_new_tokens and ids[-1] not in self.plan.eos_token_ids
        return "length" if full else "stop"
