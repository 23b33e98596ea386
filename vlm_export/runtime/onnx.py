"""An exported repo in ONNX Runtime: turns images and a prompt into the drivers' inputs, and tokens into an answer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_export.errors import InputError
from vlm_export.runtime import beams, generate
from vlm_export.runtime.drivers import ChatDriver, choose_driver
from vlm_export.runtime.generate import Decoder, Generated
from vlm_export.runtime.images import Grid, ImageProcessor
from vlm_export.runtime.model import (
    Answer,
    Backend,
    Cancelled,
    EngineFailed,
    Item,
    Memory,
    OnText,
    Prompt,
    Watcher,
    answers,
    finish,
)
from vlm_export.runtime.options import Options, Plan, plan
from vlm_export.runtime.prompts import Prompts
from vlm_export.runtime.repo import ONNX, ROW_BY_ROW, SUFFIXES, Repo, choose_dtype
from vlm_export.runtime.sessions import GRAPH_ERRORS, Arrays, Cache, Sessions, is_cuttable, keep_positions
from vlm_export.runtime.tasks import Tasks
from vlm_export.runtime.text import Message, Text, check_rows, left_padded


@dataclass(frozen=True)
class Encoded:
    """What the encoder graphs make of images: arrays by golden name, each image's rows of features, how it was cut."""

    values: Arrays
    rows: tuple[int, ...]
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class Prepared:
    """One prompt, ready: its ids, and its images."""

    ids: list[int]
    encoded: Encoded
    plan: Plan


@dataclass(frozen=True)
class OnnxMemory(Memory):
    """What a conversation has run: its images, and the ids in the cache.

    `prompt` is the last turn's, and its cache: what is gone back to where a later cache cannot be cut.
    """

    encoded: Encoded = field(default_factory=lambda: Encoded({}, (), ()))
    ids: list[int] = field(default_factory=list)
    cache: Cache = field(default_factory=dict)
    prompt: tuple[list[int], Cache] = field(default_factory=lambda: ([], {}))

    def holding(self, ids: Sequence[int]) -> tuple[int, Cache]:
        """How many of these ids are run, and the cache of them."""
        common = _common(ids, self.ids)
        if common == len(self.ids):
            return common, self.cache
        if is_cuttable(self.cache):
            return common, keep_positions(self.cache, common)
        earlier, cache = self.prompt
        return (len(earlier), cache) if _common(ids, earlier) == len(earlier) else (0, {})


class OnnxEngine:
    """The graphs of one dtype.

    Raises:
        InputError: a file is missing or not understood.
        EngineFailed: ONNX Runtime cannot load a graph.
    """

    backend: Backend = "onnx"

    def __init__(self, repo: Repo, dtype: str | None, threads: int = 0):
        self.repo = repo
        self.name, self.layout, self.fed_as = repo.name, repo.layout, repo.fed_as
        self.repo_path: Path | None = repo.path
        choice = choose_driver(repo.files)
        components = choice.components
        try:
            self.dtype = choose_dtype(dtype, components, repo.graph_files, str(repo.path / ONNX), repo.failed)
        except InputError as error:
            of_dtype = (f"{component}{SUFFIXES.get(dtype or '')}.onnx" for component in components)
            if dtype is None or repo.graph_files.intersection(of_dtype):  # not merely a dtype that is not there
                raise EngineFailed(str(error)) from error
            raise
        self.sessions = Sessions(repo.path / ONNX, SUFFIXES[self.dtype], threads)
        self.driver = choice.on(self.sessions)
        self.text = Text(repo.path)
        self.images = ImageProcessor(repo.preprocessor)
        self.prompts = Prompts(repo, self.text, self.images.cut)
        with self.failures():
            for component in components:
                self.sessions.session(component)
            self.row_by_row = self.dtype in ROW_BY_ROW and not self.sessions.rows_are_independent(components)

    def generate(
        self,
        images: Sequence[Image.Image],
        prompt: Prompt,
        options: Options,
        on_text: OnText | None = None,
        cancelled: Cancelled | None = None,
    ) -> Answer:
        """Encode the images, write the prompt, and generate; the arguments are those of `Model.generate`.

        Raises:
            InputError: as of `Model.generate`.
            EngineFailed: ONNX Runtime fails.
        """
        started = time.perf_counter()
        with self.failures():
            prepared = self.prepare(images, prompt, options)
            watcher = Watcher(self.text, prepared.plan.stop, on_text if prepared.plan.num_beams == 1 else None)
            decoder = Decoder(self.driver, self.inputs([prepared]))
            made = self.run(decoder, prepared.plan, watcher, cancelled)
        answer = answers(made, self.text, prepared.plan.stop, len(prepared.ids), started, decoder.first_token)
        finish(answer, watcher, on_text)
        return answer

    def generate_batch(self, items: Sequence[Item], options: Options) -> list[Answer]:
        """Generate for all items at once, or one by one where plans differ or a row could change another's tokens.

        Raises:
            InputError: as of `Model.generate`.
            EngineFailed: ONNX Runtime fails.
        """
        started = time.perf_counter()
        with self.failures():
            prepared = [self.prepare(images, prompt, options) for images, prompt in items]
            if self.row_by_row or any(one.plan != prepared[0].plan for one in prepared):
                return [self._alone(one) for one in prepared]
            made_by, decoder = self._together(prepared)
        return [
            answers(made, self.text, one.plan.stop, len(one.ids), started, decoder.first_token)
            for made, one in zip(made_by, prepared, strict=True)
        ]

    def run(
        self, decoder: Decoder, plan: Plan, watcher: Watcher | None = None, cancelled: Cancelled | None = None
    ) -> list[Generated]:
        """Generate as the plan says: by beam search, greedily, or by sampling."""
        watch = watcher if watcher is not None and (watcher.stop or watcher.stream) else None
        search = beams.search if plan.num_beams > 1 else generate.generate
        return search(decoder, plan, watch=watch, cancelled=cancelled)

    def _alone(self, prepared: Prepared) -> Answer:
        started = time.perf_counter()
        decoder = Decoder(self.driver, self.inputs([prepared]))
        made = self.run(decoder, prepared.plan, Watcher(self.text, prepared.plan.stop, None))
        return answers(made, self.text, prepared.plan.stop, len(prepared.ids), started, decoder.first_token)

    def _together(self, prepared: Sequence[Prepared]) -> tuple[list[list[Generated]], Decoder]:
        shared = prepared[0].plan
        decoder = Decoder(self.driver, self.inputs(prepared))
        made = self.run(decoder, shared, Watcher(self.text, shared.stop, None))
        count = shared.num_return_sequences
        return [made[place : place + count] for place in range(0, len(made), count)], decoder

    def prepare(self, images: Sequence[Image.Image], prompt: Prompt, options: Options) -> Prepared:
        """Encode the images and write the prompt.

        Raises:
            InputError: the model takes another number of images, or the prompt has no place for them.
        """
        if self.layout == "tasks":
            return self._asked(images, prompt, options)
        if self.repo.has_prefix or self.layout == "captioner":
            self._check_one(images)
        encoded = self.encode(images)
        ids = (
            self.prompt_ids(self.prompts.messages(images, prompt), encoded) if self.layout == "chat" else self._start()
        )
        return Prepared(ids, encoded, self._plan(options, ids, encoded))

    def _asked(self, images: Sequence[Image.Image], prompt: Prompt, options: Options) -> Prepared:
        """A task about one image, which an encoder reads with it."""
        try:
            tasks = Tasks.of(self.repo.preprocessor)
            sentence = tasks.sentence(tasks.asked(prompt))
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error
        self._check_one(images)
        ids = self.text.encode(sentence, add_special_tokens=True)
        check_rows(ids, self.repo.rows, self.text.token, f"{self.name}: the prompt")
        rows, positions = self.sessions.session("vision_encoder").get_outputs()[0].shape[1], self.repo.positions
        if positions is not None and isinstance(rows, int) and rows + len(ids) > positions:
            room = positions - rows
            raise InputError(f"{self.name}: the prompt has {len(ids)} tokens, and there are positions for {room}")
        processed = self.images(images)
        values = self._encoded([processed.arrays | {"input_ids": np.array([ids], dtype=np.int64)}])
        encoded = Encoded(values, (), processed.grids)
        return Prepared(ids, encoded, self._plan(options, self._start(), encoded))

    def _plan(self, options: Options, ids: Sequence[int], encoded: Encoded) -> Plan:
        """Raises InputError for options that are out of range, or more new tokens than there are positions for."""
        return plan(options, self.repo.generation, len(ids), room=self.room(ids, encoded))

    def room(self, ids: Sequence[int], encoded: Encoded) -> int | None:
        """For how many new tokens after a prompt the model has positions; None where it may have any number."""
        before = len(ids) or sum(encoded.rows)  # a captioner's image stands before its text, and has no ids
        positions = self.repo.positions
        return None if positions is None else positions - before + 1  # the last token is not fed

    def _check_one(self, images: Sequence[Image.Image]) -> None:
        if len(images) != 1:
            raise InputError(f"{self.name}: captions one image at a time, not {len(images)} together")

    def _start(self) -> list[int]:
        """The ids that a captioner begins with."""
        if self.repo.has_prefix:
            return []
        for name in ("decoder_start_token_id", "bos_token_id"):
            if isinstance(self.repo.generation.get(name), int):
                return [self.repo.generation[name]]
        raise InputError(f"{self.repo.path / 'generation_config.json'}: decoder_start_token_id: not set")

    def turn(
        self,
        memory: Memory,
        images: Sequence[Image.Image],
        messages: Sequence[Message],
        options: Options,
        on_text: OnText | None = None,
        cancelled: Cancelled | None = None,
    ) -> tuple[Answer, Memory]:
        """Answer a conversation: only images and ids that `memory` does not hold yet are run.

        Of beams or several samples, what is kept is the prompt's.

        Raises:
            InputError: as of `Model.generate`.
            EngineFailed: ONNX Runtime fails.
        """
        started = time.perf_counter()
        known = memory if isinstance(memory, OnnxMemory) else OnnxMemory()
        with self.failures():
            encoded = _joined(known.encoded, self.encode(images[len(known.encoded.grids) :]))
            ids = self.prompt_ids(messages, encoded)
            decided = self._plan(options, ids, encoded)
            decoder, tokens_fed = self._resumed(known, ids, encoded)
            prompt_cache = decoder.cache
            watcher = Watcher(self.text, decided.stop, on_text if decided.num_beams == 1 else None)
            made = self.run(decoder, decided, watcher, cancelled)
        answer = answers(made, self.text, decided.stop, len(ids), started, decoder.first_token)
        finish(answer, watcher, on_text)
        if len(made) > 1 or decided.num_beams > 1:
            return answer, OnnxMemory(tokens_fed, encoded, ids, prompt_cache)
        prompt = ([], {}) if is_cuttable(prompt_cache) else (ids, prompt_cache)
        return answer, OnnxMemory(tokens_fed, encoded, [*ids, *answer.token_ids[:-1]], decoder.cache, prompt)

    def _resumed(self, memory: OnnxMemory, ids: list[int], encoded: Encoded) -> tuple[Decoder, int]:
        """A decoder that has run `ids`, and how many of them it had to."""
        driver = self.driver
        assert isinstance(driver, ChatDriver), "only a chat has turns"
        # The last must be run, or there were no logits.
        common, cache = (0, memory.cache) if driver.whole_prompt else memory.holding(ids[:-1])
        whole = {name: encoded.values[name] for name in driver.of_images if name in encoded.values}
        whole["input_ids"] = np.array([ids], dtype=np.int64)
        inputs = {**whole, "input_ids": whole["input_ids"][:, common:]}
        if "image_features" in encoded.values:
            features = encoded.values["image_features"]
            rows = features.reshape(-1, features.shape[-1])
            inputs["image_features"] = rows[ids[:common].count(driver.image_token_id) :]
        if not common:
            return Decoder(driver, inputs), len(ids)
        run = driver.extend(cache, inputs, whole["input_ids"][:, :common])
        return Decoder(driver, whole, run), len(ids) - common

    def encode(self, images: Sequence[Image.Image]) -> Encoded:
        """Run the encoder side on the images of one prompt."""
        if not images:
            return Encoded({}, (), ())
        processed = [self.images(group) for group in self.images.groups(images)]
        values = self._encoded([each.arrays for each in processed])
        grids = tuple(grid for each in processed for grid in each.grids)
        return Encoded(values, self._rows(values.get("image_features"), grids), grids)

    def _rows(self, features: np.ndarray | None, grids: Sequence[Grid]) -> tuple[int, ...]:
        """Rows of features of each image, or of each of its tiles."""
        known = [self.prompts.image_tokens.rows(grid) for grid in grids] if self.layout == "chat" else []
        if known and None not in known:
            return tuple(known)  # type: ignore[arg-type]
        if features is None:
            return ()
        rows = features.shape[-2] if features.ndim == 3 else len(features) // max(1, sum(map(_count, grids)))
        return (rows,) * len(grids)

    def _encoded(self, groups: Sequence[Arrays]) -> Arrays:
        """What the encoder side gives for pictures that are run a group at a time, together, by golden name."""
        runs = [{each.golden_name: each.value for each in self.driver.encode(group)} for group in groups]
        joined = {name: _concatenated([run[name] for run in runs]) for name in runs[0]}
        beside = (name for name in groups[0] if name in self.driver.of_images)
        return joined | {name: np.concatenate([group[name] for group in groups]) for name in beside}

    def prompt_ids(self, messages: Sequence[Message], encoded: Encoded) -> list[int]:
        """The ids of a conversation up to where the answer begins, with those of its images."""
        return self.prompts.ids(messages, encoded.grids, encoded.rows)

    def inputs(self, prepared: Sequence[Prepared]) -> Arrays:
        """The decoder's inputs for these prompts together: `input_ids` `[prompts, longest] int64`, and the features.

        An `attention_mask` of the same shape is among it where prompts are padded on their left.
        """
        values = [one.encoded.values for one in prepared]
        if self.layout == "tasks":
            return self._read_by_encoder(prepared)
        names = dict.fromkeys(name for each in values for name in each)
        inputs = {name: _concatenated([each[name] for each in values if name in each]) for name in names}
        inputs["input_ids"], mask = left_padded([one.ids for one in prepared], prepared[0].plan.pad_token_id)
        if not mask.all():
            inputs["attention_mask"] = mask
        return inputs

    def _read_by_encoder(self, prepared: Sequence[Prepared]) -> Arrays:
        """What the decoder looks at and begins with: states of shorter prompts are padded on their right, as
        `attention_mask` `[prompts, longest] int64` says.
        """
        states = [one.encoded.values["encoder_hidden_states"][0] for one in prepared]
        longest = max(map(len, states))
        lengths, width = [len(one.ids) for one in prepared], max(len(one.ids) for one in prepared)
        mask = np.array([[1] * length + [0] * (width - length) for length in lengths], dtype=np.int64)
        return {
            "encoder_hidden_states": np.stack([np.pad(each, ((0, longest - len(each)), (0, 0))) for each in states]),
            "attention_mask": mask,
            "decoder_input_ids": np.array([self._start()] * len(prepared), dtype=np.int64),
        }

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Raise EngineFailed for what ONNX Runtime raises in the block."""
        try:
            yield
        except GRAPH_ERRORS as error:
            raise EngineFailed(f"{self.repo.path / ONNX}: ONNX Runtime: {' '.join(str(error).split())}") from error


def _joined(first: Encoded, second: Encoded) -> Encoded:
    """The images of two parts of a conversation, as those of one prompt."""
    both = [one.values for one in (first, second) if one.values]
    joined = {name: _concatenated([each[name] for each in both]) for name in (both[0] if both else ())}
    return Encoded(joined, first.rows + second.rows, first.grids + second.grids)


def _common(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(ids), len(others)))


def _concatenated(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Along the first axis; `[images, rows, width]` of unequal rows become `[rows of all, width]`."""
    if len({array.shape[1:] for array in arrays}) > 1:
        arrays = [array.reshape(-1, array.shape[-1]) for array in arrays]
    return np.concatenate(arrays)


def _count(tiles: Grid) -> int:
    return tiles.rows * tiles.columns + 1 if tiles.rows else 1
