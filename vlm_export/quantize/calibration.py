"""Sample inputs of each component, from an exported repo's own images and prompts, and numbers solved for on them.

The float32 graphs are run as a client runs them. From each image and prompt several texts are drawn, with the
probabilities that the model gives them, so that what is seen is what the model may say and not only what it says first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnxruntime

from vlm_export.dtypes import FP32
from vlm_export.errors import InputError
from vlm_export.quantize.estimate import SQUARES_BYTES
from vlm_export.quantize.numbers import Quantized, Solution
from vlm_export.quantize.probe import Probe
from vlm_export.quantize.solve import solve
from vlm_export.quantize.variants import Solutions, Variant
from vlm_export.runtime.drivers import choose_driver
from vlm_export.runtime.generate import Decoder, generate
from vlm_export.runtime.images import open_image
from vlm_export.runtime.model import Prompt
from vlm_export.runtime.onnx import OnnxEngine
from vlm_export.runtime.options import Options
from vlm_export.runtime.repo import open_repo
from vlm_export.runtime.sessions import Arrays, Cache, DecoderRun, Inputs, Sessions

_SEED = 0
_ROWS = 512  # of a value that are held at a time

Item = TypeVar("Item")
Progress = Callable[[str, int, int], None]  # what, done, of how many


@dataclass(frozen=True)
class Run:
    """One run of a graph: all that it is fed, the cache too; and whether it is of a prompt or of a text after it."""

    feeds: Arrays
    is_text: bool


Samples = dict[str, list[Run]]  # by component


@dataclass(frozen=True)
class Sampling:
    """How much is read: at most so many images, texts drawn of each, and tokens of each text."""

    images: int
    texts: int
    tokens: int


# Long texts lead away from captions, to all that the model may be asked.
FOR_NUMBERS = Sampling(images=8, texts=8, tokens=128)
FOR_RANGES = Sampling(images=4, texts=1, tokens=8)


class _Recorder(Sessions):
    """Sessions, those of an engine, that keep what graphs are fed, while they are told to."""

    def __init__(self, opened: Sessions):
        super().__init__(opened.folder, opened.suffix)
        self.opened = opened
        self.kept: Samples = {}
        self.keeps: bool | None = None  # as texts, as prompts, or not

    def session(self, component: str) -> onnxruntime.InferenceSession:
        return self.opened.session(component)

    def run(self, component: str, feeds: Inputs) -> Arrays:
        self._keep(component, feeds)
        return super().run(component, feeds)

    def decode(self, component: str, feeds: Inputs, cache: Cache) -> DecoderRun:
        self._keep(component, {**feeds, **{name: value.numpy() for name, value in cache.items()}})
        return super().decode(component, feeds, cache)

    def _keep(self, component: str, feeds: Inputs) -> None:
        if self.keeps is not None:
            self.kept.setdefault(component, []).append(Run(dict(feeds), self.keeps))


def record(
    repo: Path,
    images: Sequence[Path],
    prompt: Prompt,
    sampling: Sampling = FOR_NUMBERS,
    progress: Progress = lambda what, done, total: None,
) -> Samples:
    """What each graph of an exported repo is fed for some of the images, by component.

    Args:
        repo: has all graphs in float32, and the files beside them.
        images: those that are used are spread evenly among them.
        prompt: of a chat model; a captioner has none.
        sampling: how much of it.
        progress: is told how many images are done.

    Raises:
        InputError: a prompt leaves the model no position for a text.
    """
    opened = open_repo(repo)
    engine = OnnxEngine(opened, FP32.name)
    recorder = _Recorder(engine.sessions)
    engine.sessions, engine.driver = recorder, choose_driver(opened.files).on(recorder)
    chosen = spread(images, sampling.images)
    for done, path in enumerate(chosen):
        progress("reading sample images", done, len(chosen))
        _record_one(engine, recorder, path, prompt, sampling)
    return recorder.kept


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most so many of the items, as far apart as can be."""
    places = np.linspace(0, len(items) - 1, min(count, len(items)))
    return [items[place] for place in sorted({round(place) for place in places})]


def _record_one(engine: OnnxEngine, recorder: _Recorder, path: Path, prompt: Prompt, sampling: Sampling) -> None:
    # Ends of a text do not end it: a caption is short, and what comes after it is text as well.
    options = Options(
        max_new_tokens=1,
        min_new_tokens=1,
        num_beams=1,
        num_return_sequences=sampling.texts,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        seed=_SEED,
    )
    recorder.keeps = False
    prepared = engine.prepare([open_image(path)], prompt, options)
    room = engine.room(prepared.ids, prepared.encoded)
    # A text is fed whole: a generation's last token, for which there is room too, is not.
    tokens = sampling.tokens if room is None else min(sampling.tokens, room - 1)
    if tokens < 1:
        raise InputError(f"{path}: its prompt leaves the model no position for a text: shorten golden.prompts")
    plan = replace(prepared.plan, max_new_tokens=tokens, min_new_tokens=tokens)
    inputs = engine.inputs([prepared])
    decoder = Decoder(engine.driver, inputs)
    recorder.keeps = None
    prompt_cache = decoder.cache
    texts = [made.token_ids for made in generate(decoder, plan)]
    recorder.keeps = True
    row = np.zeros(1, dtype=np.int64)
    carried = {name: value[row] for name, value in engine.driver.per_step(inputs).items()}
    for text in texts:  # one by one: GroupQueryAttention takes several tokens after a cache in one row alone
        engine.driver.step(np.array([text], dtype=np.int64), prompt_cache, carried)
    recorder.keeps = None


class Solver:
    """Numbers for weights of few bits, solved for once for all dtypes that have the same.

    They are in files of a folder, since together they are as large as a variant.
    """

    def __init__(self, samples: Samples, folder: Path, progress: Progress = lambda what, done, total: None):
        self.samples, self.folder, self.progress = samples, folder, progress
        self._solved: dict[tuple[str, Quantized], Path] = {}

    def solutions(self, variant: Variant) -> Solutions:
        """Numbers for those weights of a variant that are calibrated, by their names.

        Raises:
            KeyError: they need samples, and none was recorded of the component.
        """
        wanted = list(variant.to_solve()) if variant.is_calibrated else []
        runs = self.samples[variant.source.name] if wanted else []
        missing = [each for each in wanted if (variant.source.name, each[1]) not in self._solved]
        if missing:
            self._solve(variant, missing, runs)
        paths = {str(quantized.weight.name): self._solved[variant.source.name, quantized] for _, quantized in wanted}
        return _InFiles(paths)

    def _solve(self, variant: Variant, waiting: list[tuple[str, Quantized]], runs: Sequence[Run]) -> None:
        """Solve for the weights, each with the name of the value that it multiplies.

        The products of inputs are collected for as many weights at a time as `SQUARES_BYTES` holds; each time the
        whole graph is run.
        """
        total, done = len(waiting), 0
        probe = Probe(variant.source.model, [value for value, _ in waiting])
        while waiting:
            together = _that_fit(waiting)
            self.progress(f"{variant.title}: reading sample inputs", done, total)
            squares = collect_squares(probe, [value for value, _ in together], runs)
            for value, quantized in together:
                self.progress(f"{variant.title}: calibrating", done, total)
                path = self.folder / f"{len(self._solved)}.npz"
                np.savez(path, **vars(solve(quantized, squares[value])))
                self._solved[variant.source.name, quantized] = path
                done += 1
            waiting = waiting[len(together) :]


class _InFiles(Mapping[str, Solution]):
    """Solutions that are read when they are asked for."""

    def __init__(self, paths: Mapping[str, Path]):
        self._paths = paths

    def __getitem__(self, name: str) -> Solution:
        with np.load(self._paths[name]) as arrays:
            return Solution(**arrays)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def collect_squares(probe: Probe, values: Sequence[str], runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """XᵀX, `[width, width] float32`, of each value's rows X in all runs."""
    names = list(dict.fromkeys(values))
    found: dict[str, np.ndarray] = {}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    held = 0
    for place, run in enumerate(runs, start=1):
        for name, value in zip(names, probe.run(run.feeds, names), strict=True):
            rows[name].append(value.reshape(-1, value.shape[-1]))
        held += len(rows[names[0]][-1])
        if held >= _ROWS or place == len(runs):  # few large products are faster than many small ones
            for name, parts in rows.items():
                together = np.concatenate(parts)
                found[name] = found.get(name, np.float32(0)) + together.T @ together
                parts.clear()
            held = 0
    return found


def _that_fit(waiting: Sequence[tuple[str, Quantized]]) -> list[tuple[str, Quantized]]:
    """The first of them whose inputs' products fit together; at least one."""
    held: dict[str, int] = {}
    for place, (value, quantized) in enumerate(waiting):
        held[value] = 4 * quantized.inputs**2
        if place and sum(held.values()) > SQUARES_BYTES:
            return list(islice(waiting, place))
    return list(waiting)
