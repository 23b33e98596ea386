"""A repo of layout single in ONNX Runtime: pictures go in, tokens come out, the loop between them is the graph's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_export.contract import IMAGE, OPTIONS, SINGLE_GRAPH, SINGLE_OPTIONS, TEXTS_BETWEEN
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
from vlm_export.runtime.options import Options, Plan, plan
from vlm_export.runtime.repo import ONNX, ROW_BY_ROW, SUFFIXES, Repo, choose_dtype
from vlm_export.runtime.run_limit import limited
from vlm_export.runtime.sessions import GRAPH_ERRORS, Arrays, Inputs, Sessions
from vlm_export.runtime.text import Message, Text

_PIXELS = "pixel_values"
_NUMBERS, _TEXTS = ("sequences", "lengths", "scores"), "texts"


@dataclass(frozen=True)
class Row:
    """What was generated of one picture: ids up to the one that ends it, and the logarithm of each's probability."""

    token_ids: list[int]
    scores: np.ndarray


def caption(sessions: Sessions, pictures: Inputs, options: Sequence[float] = ()) -> list[Row]:
    """Run the graph on `pixel_values` `[batch, 3, H, W] float32`; `options` are those of `SINGLE_OPTIONS`, in order.

    A graph that prepares pictures is fed them as they are, in 0…255, and one at a time.
    """
    made = _run(sessions, pictures, options, _NUMBERS)
    rows = zip(made["sequences"], made["lengths"], made["scores"], strict=True)
    return [Row(ids[:length].tolist(), scores[:length]) for ids, length, scores in rows]


def gives_texts(sessions: Sessions) -> bool:
    """Whether the graph itself makes texts of its tokens."""
    return _TEXTS in [value.name for value in sessions.session(SINGLE_GRAPH).get_outputs()]


def texts(sessions: Sessions, pictures: Inputs) -> list[str]:
    """The texts that the graph itself gives, one a picture.

    Raises:
        UnicodeDecodeError: they are no UTF-8.
    """
    made = _run(sessions, pictures, (), (_TEXTS,))[_TEXTS]
    return bytes(made).decode().split(TEXTS_BETWEEN)


def _run(sessions: Sessions, pictures: Inputs, options: Sequence[float], outputs: Sequence[str]) -> Arrays:
    feeds: Arrays = {OPTIONS: np.array(options, dtype=np.float32)}
    if IMAGE in sessions.input_names(SINGLE_GRAPH):
        feeds[IMAGE] = np.ascontiguousarray(np.moveaxis(pictures[_PIXELS][0], 0, -1).astype(np.uint8))
    else:
        feeds[_PIXELS] = pictures[_PIXELS]
    with limited(SINGLE_GRAPH, sessions.run_seconds) as run:
        made = sessions.session(SINGLE_GRAPH).run(list(outputs), feeds, run)
    return dict(zip(outputs, map(np.asarray, made), strict=True))


def as_options(decided: Plan) -> list[float]:
    """The numbers of `SINGLE_OPTIONS` in a plan."""
    return [float(getattr(decided, name)) for name in SINGLE_OPTIONS]


class SingleEngine:
    """The one graph of a dtype.

    Raises:
        InputError: a file is missing or not understood.
        EngineFailed: ONNX Runtime cannot load the graph.
    """

    backend: Backend = "onnx"

    def __init__(self, repo: Repo, dtype: str | None, threads: int = 0):
        self.repo = repo
        self.name, self.layout = repo.name, repo.layout
        self.repo_path: Path | None = repo.path
        self.dtype = choose_dtype(dtype, (SINGLE_GRAPH,), repo.graph_files, str(repo.path / ONNX), repo.failed)
        self.sessions = Sessions(repo.path / ONNX, SUFFIXES[self.dtype], threads)
        self.text = Text(repo.path)
        self.images = ImageProcessor(repo.preprocessor)
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
        """Caption one picture: a single run, so that the text comes at once, and nothing can be cancelled.

        Raises:
            InputError: as of `Model.generate`; or options that the graph does not have.
            EngineFailed: ONNX Runtime fails.
        """
        [answer] = self.generate_batch([(images, prompt)], options)
        if on_text is not None and answer.text:
            on_text(answer.text)
        return answer

    def generate_batch(self, items: Sequence[Item], options: Options) -> list[Answer]:
        """Caption pictures, in one run where the graph takes several and no row changes another's tokens.

        Raises:
            InputError: as of `generate`.
            EngineFailed: ONNX Runtime fails.
        """
        started = time.perf_counter()
        for images, _ in items:
            if len(images) != 1:
                raise InputError(f"{self.name}: captions one image at a time, not {len(images)} together")
        decided = self._plan(options)
        pixels = [self.images(images).arrays[_PIXELS] for images, _ in items]
        one_by_one = self.takes_picture or self.row_by_row
        groups = pixels if one_by_one else [np.concatenate(pixels)]
        try:
            rows = [row for group in groups for row in caption(self.sessions, {_PIXELS: group}, as_options(decided))]
        except GRAPH_ERRORS as error:
            raise self._failed(error) from error
        made = [[Generated(row.token_ids, _reason(row, decided))] for row in rows]
        ended = time.perf_counter()
        return [answers(each, self.text, decided.stop, self._begun, started, ended) for each in made]

    def turn(
        self,
        memory: Memory,
        images: Sequence[Image.Image],
        messages: Sequence[Message],
        options: Options,
        on_text: OnText | None = None,
        cancelled: Cancelled | None = None,
    ) -> tuple[Answer, Memory]:
        """Raises InputError: a captioner has no conversations."""
        raise InputError(f"{self.name}: a {self.layout} repo has no conversation: it captions a picture")

    @property
    def _begun(self) -> int:
        """How many ids a text begins with: a prefix has none."""
        return 0 if self.repo.has_prefix else 1

    def _plan(self, options: Options) -> Plan:
        decided = plan(options, self.repo.generation, self._begun)
        asked = {
            "num_beams": decided.num_beams > 1,
            "do_sample": decided.do_sample,
            "num_return_sequences": decided.num_return_sequences > 1,
        }
        if refused := [name for name, is_asked in asked.items() if is_asked]:
            raise InputError(f"{', '.join(refused)}: {self.name} is one file that generates greedily: leave it out")
        return decided

    def _failed(self, error: Exception) -> EngineFailed:
        return EngineFailed(f"{self.repo.path / ONNX}: ONNX Runtime: {' '.join(str(error).split())}")


def _reason(row: Row, decided: Plan) -> FinishReason:
    return "stop" if row.token_ids and row.token_ids[-1] in decided.eos_token_ids else "length"
