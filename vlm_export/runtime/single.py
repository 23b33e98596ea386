"""A repo of layout single in ONNX Runtime, as an engine: of a captioner, or of a chat."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_export.contract import IMAGE, MOST_SEED, SINGLE_GRAPH
from vlm_export.errors import InputError
from vlm_export.runtime.generate import FinishReason, Generated
from vlm_export.runtime.images import ImageProcessor
from vlm_export.runtime.model import (
    Answer,
    Backend,
    Cancelled,
    EngineFailed,
    Item,
    Memory,
    OnText,
    Prompt,
    answers,
)
from vlm_export.runtime.one_graph import (
    IDS,
    PIXELS,
    Row,
    image_rows,
    no_pictures,
    rows,
    together,
)
from vlm_export.runtime.options import Options, Plan, plan, searches
from vlm_export.runtime.prompts import Prompts
from vlm_export.runtime.repo import ONNX, ROW_BY_ROW, SUFFIXES, Repo, choose_dtype
from vlm_export.runtime.sessions import GRAPH_ERRORS, Arrays, Sessions
from vlm_export.runtime.single_options import as_options, begun
from vlm_export.runtime.text import Message, Text


@dataclass(frozen=True)
class _Prepared:
    """What the graph is fed for one row, and by what rules; `prompt_tokens` are there before its first."""

    inputs: Arrays
    plan: Plan
    prompt_tokens: int


class SingleEngine:
    """The one graph of a dtype.

    Raises:
        InputError: a file is missing or not understood.
        EngineFailed: ONNX Runtime cannot load the graph.
    """

    backend: Backend = "onnx"

    def __init__(self, repo: Repo, dtype: str | None, threads: int = 0):
        self.repo = repo
        self.name, self.layout, self.fed_as = repo.name, repo.layout, repo.fed_as
        self.repo_path: Path | None = repo.path
        self.dtype = choose_dtype(dtype, (SINGLE_GRAPH,), repo.graph_files, str(repo.path / ONNX), repo.failed)
        self.sessions = Sessions(repo.path / ONNX, SUFFIXES[self.dtype], threads)
        self.text = Text(repo.path)
        self.images = ImageProcessor(repo.preprocessor)
        self.prompts = Prompts(repo, self.text, self.images.cut)
        self.searches = searches(repo.generation)
        try:
            self.takes_picture = IMAGE in self.sessions.input_names(SINGLE_GRAPH)
            self.row_by_row = self.dtype in ROW_BY_ROW and not self.sessions.rows_are_independent((SINGLE_GRAPH,))
        except GRAPH_ERRORS as error:
            raise self._failed(error) from error

    def generate(
        self,
        images: Sequence[Image.Image],
        prompt: Prompt,
        options: Options,
        on_text: OnText | None = None,
        cancelled: Cancelled | None = None,
    ) -> Answer:
        """Caption one picture, or answer a prompt: a single run, so that the text comes at once and whole.

        Raises:
            InputError: as of `Model.generate`; or options that the graph does not have.
            EngineFailed: ONNX Runtime fails.
        """
        [answer] = self.generate_batch([(images, prompt)], options)
        if on_text is not None and answer.text:
            on_text(answer.text)
        return answer

    def generate_batch(self, items: Sequence[Item], options: Options) -> list[Answer]:
        """The same of several, in one run where the graph takes them together and no row changes another's tokens.

        Raises:
            InputError: as of `generate`.
            EngineFailed: ONNX Runtime fails.
        """
        started = time.perf_counter()
        prepared = [self._prepared(images, prompt, options) for images, prompt in items]
        try:
            made = self._together(prepared) or [self._alone(one) for one in prepared]
        except GRAPH_ERRORS as error:
            raise self._failed(error) from error
        ended = time.perf_counter()
        return [
            answers([generated], self.text, one.plan.stop, one.prompt_tokens, started, ended)
            for one, generated in zip(prepared, made, strict=True)
        ]

    def turn(
        self,
        memory: Memory,
        images: Sequence[Image.Image],
        messages: Sequence[Message],
        options: Options,
        on_text: OnText | None = None,
        cancelled: Cancelled | None = None,
    ) -> tuple[Answer, Memory]:
        """Answer a conversation, all of which is run anew: the cache stays in the graph.

        Raises:
            InputError: as of `generate`; or a captioner, which has no conversations.
            EngineFailed: ONNX Runtime fails.
        """
        if self.fed_as != "chat":
            raise InputError(f"{self.name}: a {self.layout} repo has no conversation: it captions a picture")
        answer = self.generate(images, messages, options, on_text, cancelled)
        return answer, Memory(tokens_fed=answer.prompt_tokens)

    def _prepared(self, images: Sequence[Image.Image], prompt: Prompt, options: Options) -> _Prepared:
        """Raises InputError as `generate` does."""
        if self.fed_as == "chat":
            return self._asked(images, prompt, options)
        if len(images) != 1:
            raise InputError(f"{self.name}: captions one image at a time, not {len(images)} together")
        before = begun(self.repo)
        return _Prepared({PIXELS: self.images(images).arrays[PIXELS]}, self._plan(options, before), before)

    def _asked(self, images: Sequence[Image.Image], prompt: Prompt, options: Options) -> _Prepared:
        """A prompt about any number of images; raises InputError as `generate` does."""
        processed = [self.images(group) for group in self.images.groups(images)] if images else []
        grids = [grid for each in processed for grid in each.grids]
        own = image_rows(self.sessions)
        rows_of = [own or self.prompts.image_tokens.rows(grid) or 0 for grid in grids]
        ids = self.prompts.ids(self.prompts.messages(images, prompt), grids, rows_of)
        if self.takes_picture and len(images) > 1:
            raise InputError(f"{self.name}: as one file it takes one picture at a time, not {len(images)} together")
        inputs = (
            together([each.arrays for each in processed], 0) if processed else no_pictures(self.sessions, self.name)
        )
        if inputs is None:
            raise InputError(f"{self.name}: as one file it takes pictures of one size together: ask of one at a time")
        positions = self.repo.positions
        room = None if positions is None else positions - len(ids) + 1  # the last token is not fed
        inputs[IDS] = np.array([ids], dtype=np.int64)
        return _Prepared(inputs, self._plan(options, len(ids), room), len(ids))

    def _alone(self, one: _Prepared) -> Generated:
        [row] = rows(self.sessions, one.inputs, self._numbers(one.plan))
        return self._generated(row, one.plan)

    def _together(self, prepared: Sequence[_Prepared]) -> list[Generated] | None:
        """All in one run; None where that is not to be."""
        shared = prepared[0].plan
        if self.takes_picture or self.row_by_row or any(one.plan != shared for one in prepared):
            return None
        inputs = together([one.inputs for one in prepared], shared.pad_token_id)
        if inputs is None:
            return None
        return [self._generated(row, shared) for row in rows(self.sessions, inputs, self._numbers(shared))]

    def _numbers(self, decided: Plan) -> list[float]:
        return as_options(decided, searches=self.searches)

    def _generated(self, row: Row, decided: Plan) -> Generated:
        """What is in a row, with the score by which a search compares texts."""
        length = len(row.token_ids)
        searched = decided.num_beams > 1 and length > 0
        score = float(row.scores.sum()) / length**decided.length_penalty if searched else None
        return Generated(row.token_ids, _reason(row, decided), score)

    def _plan(self, options: Options, prompt_tokens: int, room: int | None = None) -> Plan:
        decided = plan(options, self.repo.generation, prompt_tokens, room=room)
        asked = {
            "num_beams": decided.num_beams > 1 and not self.searches,
            "do_sample": decided.do_sample and self.searches,
            "num_return_sequences": decided.num_return_sequences > 1,
        }
        if refused := [name for name, is_asked in asked.items() if is_asked]:
            does = "searches for one text" if self.searches else "makes one text, token by token"
            raise InputError(f"{', '.join(refused)}: {self.name} is one file that {does}: leave it out")
        if decided.do_sample and decided.seed is not None and decided.seed > MOST_SEED:
            raise InputError(f"seed: {decided.seed}, but {self.name} is one file that takes at most {MOST_SEED}")
        return decided

    def _failed(self, error: Exception) -> EngineFailed:
        return EngineFailed(f"{self.repo.path / ONNX}: ONNX Runtime: {' '.join(str(error).split())}")


def _reason(row: Row, decided: Plan) -> FinishReason:
    return "stop" if row.token_ids and row.token_ids[-1] in decided.eos_token_ids else "length"
