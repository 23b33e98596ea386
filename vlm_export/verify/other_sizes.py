"""The float32 graphs at other sizes than the golden has: every dynamic axis by itself, against PyTorch.

A graph may have kept a size that its tracer saw. So each axis takes sizes that no tracer saw, while the others stay as
they are, and every output is compared with what the merged checkpoint gives in transformers' own forward. Padded rows
are compared with the same rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from vlm_export.dtypes import FP32
from vlm_export.models.pixels import PIXELS
from vlm_export.runtime.drivers import ChatDriver, Driver, GridDriver, PrefixChatDriver, TaskDriver
from vlm_export.runtime.repo import open_repo
from vlm_export.runtime.sessions import (
    GRAPH_ERRORS,
    Arrays,
    Cache,
    DecoderRun,
    cache_length,
    keep_positions,
)
from vlm_export.spec.cache import golden_of, has_positions, present_of
from vlm_export.spec.family import Reference
from vlm_export.spec.graph import TensorSpec
from vlm_export.verify import limits
from vlm_export.verify.golden_sessions import GoldenSessions
from vlm_export.verify.metrics import max_relative_error
from vlm_export.verify.recording import as_tensors, cache_tensors
from vlm_export.verify.verification import Verification

BATCHES, LENGTHS, IMAGES = (1, 2, 3), (1, 2, 7, 33), (1, 2, 13)
PADDED = (7, 2, 4)  # tokens of the rows of a padded batch
_EDGES = (128, 192)  # pixels, where a tower takes images of any size
_CELLS = (1, 2, 5, 13)  # lines and columns of cells, where it takes patches
_USUAL_CELLS = {"lines": 2, "columns": 3}
_GRID, _SHAPES, _MASK = "image_grid_thw", "spatial_shapes", "pixel_attention_mask"
_PADDING = 3  # patches behind those of a tile
_SEED = 0
_OF_IMAGE = ".encoder."  # in the name of a cache of cross-attention


@dataclass(frozen=True)
class Sizes:
    """Sizes of one run: rows, images or tiles of each, tokens of text behind them.

    Where an encoder reads a prompt, `tokens` are the decoder's, and the prompt has `read`.
    """

    batch: int = 1
    images: int = 1
    tokens: int = 7
    read: int = 7


@dataclass(frozen=True)
class Fed:
    """What the PyTorch model is fed, and what its encoder side makes of it, by golden name: the graphs get both."""

    inputs: Arrays
    encoded: Arrays

    @property
    def to_graphs(self) -> Arrays:
        """The graphs' inputs."""
        return self.inputs | self.encoded


@dataclass(frozen=True)
class Start:
    """Both sides after a prompt."""

    fed: Fed
    ours: DecoderRun
    theirs: Any

    def past(self) -> Any:
        """PyTorch's cache, to be run on: a copy, since every run appends to it."""
        return deepcopy(self.theirs.past_key_values)


@dataclass(frozen=True)
class Found:
    """One output at one size: how far it is from PyTorch's, or why there is none."""

    component: str
    output: str
    error: float
    failure: str = ""


@dataclass(frozen=True)
class Axis:
    """An axis, the sizes that it takes, and what is found at each of them."""

    name: str
    sizes: Sequence[int]
    find: Callable[[int], Iterator[Found]]


def check_other_sizes(run: Verification, driver: Driver, sessions: GoldenSessions, reference: Reference) -> None:
    """Add a check for each dynamic axis of each graph that it reaches.

    `driver` runs the graphs on `sessions`, `reference` the model that they were made of.
    """
    both = Both(run, driver, reference)
    for axis in both.axes():
        run.tell(f"{FP32.name}: other sizes, {axis.name}")
        _check(run, axis.name, [(size, _found(axis, size, sessions)) for size in axis.sizes])


def _found(axis: Axis, size: int, sessions: GoldenSessions) -> list[Found]:
    found: list[Found] = []
    try:
        found.extend(axis.find(size))
    except GRAPH_ERRORS as error:
        found.append(Found(sessions.last, "", math.inf, f"ONNX Runtime: {' '.join(str(error).split())}"))
    return found


def _check(run: Verification, axis: str, by_size: Sequence[tuple[int, list[Found]]]) -> None:
    """A check for each graph: the largest error at any size, and at which sizes it is wrong."""
    for component in dict.fromkeys(each.component for _, found in by_size for each in found):
        own = [(size, each) for size, found in by_size for each in found if each.component == component]
        size, worst = next(((s, f) for s, f in own if _is_wrong(f)), max(own, key=lambda pair: pair[1].error))
        detail = f"{axis} {', '.join(str(size) for size in dict.fromkeys(size for size, _ in own))}"
        if _is_wrong(worst):
            right = [other for other, found in by_size if not any(map(_is_wrong, found)) and found]
            says = worst.failure or f"{worst.output} is not PyTorch's"
            detail = f"{axis} {size}: {says}; right with {', '.join(map(str, right)) or 'none'}"
        run.add(component, FP32.name, "ort", limits.OTHER_SIZES, worst.error, detail)


def _is_wrong(found: Found) -> bool:
    limit = limits.limit_for(limits.OTHER_SIZES, [FP32.name])
    assert limit is not None
    return not limit.holds(found.error)


class Both:
    """The graphs and the PyTorch model, run on the same random inputs."""

    def __init__(self, run: Verification, driver: Driver, reference: Reference):
        self.driver, self.reference = driver, reference
        self.random = np.random.default_rng(_SEED)
        self._starts: dict[tuple[Sizes, bool], Start] = {}
        encoder = next(each for each in run.components if any(i.name == PIXELS for i in each.inputs))
        # Of a graph that prepares pictures itself PyTorch gets what is made of them: see `GoldenSessions`.
        self.images = (
            tuple(replace(spec, name=PIXELS) for spec in encoder.traced_inputs) if run.steps else encoder.inputs
        )
        named = {spec.name for spec in self.images}
        self.takes_grids, self.takes_shapes = not named.isdisjoint(("grid_thw", _GRID)), _SHAPES in named
        self.steps = run.steps
        repo = open_repo(run.repo)
        self.positions = repo.positions
        self.factor = int(repo.config.get("downsample_factor", 1))  # of the sides of a tile, where it has a shape
        self.image_token = int(repo.config.get("image_token_id", -1))
        self.decoder = next(each for each in reversed(run.components) if each.has_cache)
        self.vocabulary = int(next(spec for spec in self.decoder.outputs if spec.name == "logits").shape[-1])

    @property
    def takes_patches(self) -> bool:
        """Whether a picture is fed as its patches, of which it has any number."""
        return self.takes_grids or self.takes_shapes

    @property
    def takes_text_alone(self) -> bool:
        """Whether a prompt needs no image."""
        return isinstance(self.driver, ChatDriver) and not isinstance(self.driver, PrefixChatDriver)

    def axes(self) -> Iterator[Axis]:
        """Every dynamic axis that a client can feed at several sizes."""
        for symbol, sizes in self._axes_of_images().items():
            yield Axis(symbol, sizes, partial(self.encoded_at, symbol))
        yield Axis("batch_size", BATCHES, lambda size: self.generated(Sizes(batch=size)))
        if "num_images" in self._axes_of_images() or self.takes_patches:
            yield Axis("num_images", IMAGES[:2], lambda size: self.generated(Sizes(images=size)))
        if isinstance(self.driver, TaskDriver):
            yield Axis("encoder_sequence_length", LENGTHS, lambda size: self.read(Sizes(batch=2, read=size)))
        length, default = self._length_symbol(), Sizes()
        rows = self._image_rows()
        behind = {"": rows + 1, " after a past of 1": 1, " after a past": rows + default.tokens}
        lengths = {name: self._that_fit(positions) for name, positions in behind.items()}
        yield Axis(length, lengths[""], lambda size: self.generated(Sizes(tokens=size)))
        for name, past in ((" after a past of 1", 1), (" after a past", None)):
            yield Axis(length + name, lengths[name], partial(self.continued, past=past))
        yield Axis("batch_size after a past of 1", BATCHES, lambda size: self.continued(1, past=1, batch=size))
        if isinstance(self.driver, ChatDriver):
            yield Axis("batch_size, rows padded", (len(PADDED),), lambda _: self.padded(PADDED))
        if isinstance(self.driver, TaskDriver):
            yield Axis("batch_size, rows padded", (len(PADDED),), lambda _: self.read_padded(PADDED))

    def _axes_of_images(self) -> dict[str, tuple[int, ...]]:
        """The dynamic axes of what the encoder side is fed, and the sizes that they take."""
        if self.takes_patches:
            return dict.fromkeys(_USUAL_CELLS, _CELLS)
        pixels = next(spec for spec in self.images if spec.name == PIXELS)
        others = tuple(dict.fromkeys((*BATCHES, *IMAGES)))
        return {symbol: _EDGES if symbol in ("height", "width") else others for symbol in _symbols([pixels])}

    def _image_rows(self) -> int:
        """Positions that an image takes in the decoder."""
        if isinstance(self.driver, TaskDriver):
            return 0
        fed = self.prompt(Sizes())
        features = fed.encoded.get("image_features")
        return 0 if features is None else features.size // features.shape[-1]

    def _that_fit(self, others: int) -> tuple[int, ...]:
        """The lengths that the model has positions for, beside so many others."""
        return tuple(length for length in LENGTHS if self.positions is None or length + others <= self.positions)

    def _length_symbol(self) -> str:
        ids = next(spec for spec in self.decoder.inputs if spec.name in ("input_ids", "inputs_embeds"))
        return str(ids.shape[1])

    # What is found

    def encoded_at(self, symbol: str, size: int) -> Iterator[Found]:
        """The outputs of the encoder side, at this size of one axis of its inputs."""
        arrays = self.pixels({symbol: size})
        arrays |= self.texts(Sizes(len(arrays.get(_GRID, arrays[PIXELS])), tokens=1))
        expected = self.encoded(arrays)
        for made in self.driver.encode(arrays):
            yield compared(made.component, made.output, made.value, expected[made.golden_name])

    def read(self, sizes: Sizes) -> Iterator[Found]:
        """What an encoder makes of a prompt, and what the decoder says that looks at it."""
        fed = self.prompt(sizes)
        for made in self.driver.encode(fed.inputs):
            yield compared(made.component, made.output, made.value, fed.encoded[made.golden_name])
        yield from self.generated(sizes)

    def generated(self, sizes: Sizes) -> Iterator[Found]:
        """A prompt, and a token behind it."""
        start = self.start(sizes, short=False)
        yield from self.outputs(start.ours, start.theirs)
        yield from self.outputs(*self.step(self.ids(sizes.batch, 1), start.ours.cache, start.past(), start.fed))

    def continued(self, tokens: int, *, past: int | None, batch: int = 1) -> Iterator[Found]:
        """Several tokens in one run, after a cache of so many positions, or of a whole prompt."""
        start = self.start(Sizes(batch), short=past is not None)
        cache, reference = start.ours.cache, start.past()
        if past is not None and cache_length(cache) > past:
            cache = cut(cache, past)
            reference.crop(past - cache_length(start.ours.cache))  # how many to drop, as a negative number
        yield from self.outputs(*self.step(self.ids(batch, tokens), cache, reference, start.fed))

    def start(self, sizes: Sizes, *, short: bool) -> Start:
        """Both after a prompt of these sizes, or after the shortest; run once."""
        if (sizes, short) not in self._starts:
            fed = self.shortest_prompt(sizes.batch) if short else self.prompt(sizes)
            self._starts[sizes, short] = Start(fed, self.driver.prefill(fed.to_graphs), self.in_pytorch_first(fed))
        return self._starts[sizes, short]

    def padded(self, lengths: Sequence[int]) -> Iterator[Found]:
        """Rows of several lengths, padded on their left, and a token behind them; each as it is alone."""
        assert isinstance(self.driver, ChatDriver)
        rows = [self.prompt(Sizes(tokens=length)) for length in lengths]
        ids = [self.driver.ids(row.to_graphs)[0] for row in rows]
        width = max(map(len, ids))
        fed = {
            "input_ids": np.stack([np.pad(row, (width - len(row), 0)) for row in ids]),
            "attention_mask": np.array([[0] * (width - len(row)) + [1] * len(row) for row in ids], dtype=np.int64),
            "image_features": np.concatenate([row.encoded["image_features"] for row in rows]),
            **{name: np.concatenate([row.inputs[name] for row in rows]) for name in self.driver.of_images},
        }
        alone = [self.in_pytorch_first(row) for row in rows]
        ours = self.driver.prefill(fed)
        yield from self.rows(ours, alone, [len(row) for row in ids])
        token = self.ids(len(rows), 1)
        behind = zip(rows, alone, token, strict=True)
        after = [self.in_pytorch_next(one[None], past.past_key_values, row) for row, past, one in behind]
        yield from self.rows(self.driver.step(token, ours.cache, fed), after, [len(row) + 1 for row in ids])

    def read_padded(self, lengths: Sequence[int]) -> Iterator[Found]:
        """Prompts of several lengths that an encoder reads, padded on their right, and a token of each answer; each row
        as it is alone.
        """
        rows = [self.prompt(Sizes(tokens=1, read=length)) for length in lengths]
        width = max(lengths)
        joined = {name: np.concatenate([row.inputs[name] for row in rows]) for name in (PIXELS, "decoder_input_ids")}
        ids = [row.inputs["input_ids"][0] for row in rows]
        joined["input_ids"] = np.stack([np.pad(row, (0, width - len(row))) for row in ids])
        joined["attention_mask"] = np.array([[1] * len(row) + [0] * (width - len(row)) for row in ids], dtype=np.int64)
        made = {each.golden_name: each for each in self.driver.encode(joined)}
        for place, row in enumerate(rows):
            for name, each in made.items():
                whole = row.encoded[name]
                value = each.value[place : place + 1, : whole.shape[1]]
                yield compared(each.component, f"{each.output} of row {place + 1}", value, whole)
        states = [row.encoded["encoder_hidden_states"][0] for row in rows]
        longest = max(map(len, states))
        padded = np.stack([np.pad(each, ((0, longest - len(each)), (0, 0))) for each in states])
        fed = joined | {"encoder_hidden_states": padded}
        alone = [self.in_pytorch_first(row) for row in rows]
        ours = self.driver.prefill(fed)
        own = {name: value for name, value in ours.cache.items() if _OF_IMAGE not in name}
        yield from self.rows(replace(ours, cache=own), alone, [1] * len(rows))
        token = self.ids(len(rows), 1)
        behind = zip(rows, alone, token, strict=True)
        after = [self.in_pytorch_next(one[None], past.past_key_values, row) for row, past, one in behind]
        ours = self.driver.step(token, ours.cache, fed)
        own = {name: value for name, value in ours.cache.items() if _OF_IMAGE not in name}
        yield from self.rows(replace(ours, cache=own), after, [2] * len(rows))

    # How both are run

    def step(self, token_ids: np.ndarray, cache: Cache, past: Any, fed: Fed) -> tuple[DecoderRun, Any]:
        """Run both on tokens after a cache of their own: the graphs' outputs and PyTorch's."""
        return self.driver.step(token_ids, cache, fed.to_graphs), self.in_pytorch_next(token_ids, past, fed)

    @torch.inference_mode()
    def encoded(self, inputs: Arrays) -> Arrays:
        """What PyTorch's encoder side gives, by golden name."""
        return {name: value.numpy() for name, value in self.reference.encode(as_tensors(inputs)).items()}

    @torch.inference_mode()
    def in_pytorch_first(self, fed: Fed) -> Any:
        """PyTorch's output for a prompt; of its logits the last position's, since the others are never compared."""
        made = self.reference.prefill(as_tensors(fed.inputs))
        made.logits = made.logits[:, -1:].clone()
        return made

    @torch.inference_mode()
    def in_pytorch_next(self, token_ids: np.ndarray, past: Any, fed: Fed) -> Any:
        """PyTorch's output for tokens after its cache `past`."""
        return self.reference.step(torch.from_numpy(token_ids), past, as_tensors(fed.inputs))

    # What they are compared in

    def outputs(self, ours: DecoderRun, theirs: Any) -> Iterator[Found]:
        """The cache, then the last position's logits."""
        reference = cache_tensors(theirs.past_key_values)
        for name, held in ours.cache.items():
            # transformers' own cache of a windowed layer forgets what is outside it.
            value, whole = held.numpy(), reference[golden_of(name)].numpy()
            value = value if _OF_IMAGE in name else _last(value, whole, name)
            yield compared(ours.component, present_of(name), value, whole)
        yield compared(ours.component, "logits", ours.logits[:, -1], theirs.logits[:, -1].numpy())

    def rows(self, ours: DecoderRun, alone: Sequence[Any], lengths: Sequence[int]) -> Iterator[Found]:
        """Each row's own positions, beside those of the row alone."""
        for place, (one, length) in enumerate(zip(alone, lengths, strict=True)):
            taken = slice(place, place + 1)
            rows = {name: value.numpy()[taken] for name, value in ours.cache.items()}
            cache = {name: row[:, :, -length:] if has_positions(name) else row for name, row in rows.items()}
            reference = cache_tensors(one.past_key_values)
            for name, value in cache.items():
                output = f"{present_of(name)} of row {place + 1}"
                whole = reference[golden_of(name)].numpy()
                yield compared(ours.component, output, _last(value, whole, name), whole)
            output = f"logits of row {place + 1}"
            yield compared(ours.component, output, ours.logits[taken, -1], one.logits[:, -1].numpy())

    # What they are fed

    def prompt(self, sizes: Sizes) -> Fed:
        """Images and text as one prompt a row."""
        arrays = self.pixels({"batch_size": sizes.batch, "num_images": sizes.images})
        if len(arrays[PIXELS]) != sizes.batch:  # images of all rows, one after the other
            arrays = self.pixels({"num_images": sizes.batch * sizes.images})
        arrays |= self.texts(sizes)
        encoded = self.encoded(arrays)
        if self.takes_text_alone:
            places = self._places(encoded["image_features"], sizes)
            arrays["input_ids"] = np.concatenate([*places, arrays["input_ids"]], axis=1)
        return Fed(arrays, encoded)

    def _places(self, features: np.ndarray, sizes: Sizes) -> Iterator[np.ndarray]:
        """The ids `[batch, tokens]` of each image of a row, with a token of text between two."""
        assert isinstance(self.driver, ChatDriver)
        rows = features.size // features.shape[-1] // sizes.batch
        images = sizes.images if rows % sizes.images == 0 else 1
        for image in range(images):
            if image:
                yield self.ids(sizes.batch, 1)
            yield np.full((sizes.batch, rows // images), self.driver.image_token_id, dtype=np.int64)

    def shortest_prompt(self, batch: int) -> Fed:
        """A token alone, where the model needs no image."""
        if self.takes_text_alone:
            return Fed({"input_ids": self.ids(batch, 1)}, {})
        return self.prompt(Sizes(batch, tokens=1))

    def texts(self, sizes: Sizes) -> Arrays:
        """Ids `[batch, tokens] int64` of what the decoder is fed, and of a prompt that an encoder reads."""
        if isinstance(self.driver, TaskDriver):
            names = {"input_ids": sizes.read, "decoder_input_ids": sizes.tokens}
            return {name: self.ids(sizes.batch, tokens) for name, tokens in names.items()}
        return {"input_ids": self.ids(sizes.batch, sizes.tokens)}

    def pixels(self, sizes: Mapping[str, int]) -> Arrays:
        """Noise, and masks of ones, as the encoder's graph takes them; an axis without a size has 1.

        Of patches, as the client is fed them: those of all images, and their grids.
        """
        if self.takes_grids:
            return self._patches({**_USUAL_CELLS, **sizes})
        if self.takes_shapes:
            return self._tiles({**_USUAL_CELLS, **sizes})
        return {spec.name: self._noise(spec, sizes) for spec in self.images}

    def _patches(self, sizes: Mapping[str, int]) -> Arrays:
        assert isinstance(self.driver, GridDriver)
        merge, images = self.driver.merge, sizes.get("batch_size", 1) * sizes.get("num_images", 1)
        grid = [1, sizes["lines"] * merge, sizes["columns"] * merge]
        numbers = int(next(spec for spec in self.images if spec.name == PIXELS).shape[-1])
        patches = self.random.uniform(-1, 1, (images * grid[1] * grid[2], numbers)).astype(np.float32)
        return {PIXELS: patches, _GRID: np.array([grid] * images, dtype=np.int64)}

    def _tiles(self, sizes: Mapping[str, int]) -> Arrays:
        """A tile an image, with padding behind its patches."""
        tiles = sizes.get("batch_size", 1) * sizes.get("num_images", 1)
        shape = [sizes["lines"] * self.factor, sizes["columns"] * self.factor]
        count = math.prod(shape)
        numbers = int(next(spec for spec in self.images if spec.name == PIXELS).shape[-1])
        patches = self.random.uniform(-1, 1, (tiles, count + _PADDING, numbers)).astype(np.float32)
        mask = np.array([[1] * count + [0] * _PADDING] * tiles, dtype=np.int64)
        return {PIXELS: patches, _MASK: mask, _SHAPES: np.array([shape] * tiles, dtype=np.int64)}

    def _noise(self, spec: TensorSpec, sizes: Mapping[str, int]) -> np.ndarray:
        default = {"height": _EDGES[0], "width": _EDGES[0]}
        shape = [size if isinstance(size, int) else sizes.get(size, default.get(size, 1)) for size in spec.shape]
        if spec.dtype != "float32":
            return np.ones(shape, dtype=np.dtype(spec.dtype))
        if self.steps is not None:
            return self.steps.normalized(self.random.integers(0, 256, shape))
        return self.random.uniform(-1, 1, shape).astype(np.float32)

    def ids(self, batch: int, tokens: int) -> np.ndarray:
        """`[batch, tokens] int64` of any tokens, but for the one that stands for an image."""
        image = self.driver.image_token_id if isinstance(self.driver, ChatDriver) else self.image_token
        ids = self.random.integers(0, self.vocabulary - 1, (batch, tokens), dtype=np.int64)
        return ids + (ids >= image) if 0 <= image < self.vocabulary else ids


def compared(component: str, output: str, value: np.ndarray, reference: np.ndarray) -> Found:
    """An output beside PyTorch's."""
    if value.shape != reference.shape:
        sizes = f"{list(value.shape)}, not {list(reference.shape)}"
        return Found(component, output, math.inf, f"{output} has shape {sizes}")
    return Found(component, output, max_relative_error(value, reference))


def _last(value: np.ndarray, reference: np.ndarray, name: str) -> np.ndarray:
    """As many of a cache's last positions as PyTorch's has; a state as it is."""
    return value[:, :, -reference.shape[2] :] if has_positions(name) else value


def cut(cache: Cache, positions: int) -> Cache:
    """The first positions of self-attention's cache; that of cross-attention as it is."""
    own = {name: value for name, value in cache.items() if _OF_IMAGE not in name}
    return cache | keep_positions(own, positions)


def _symbols(specs: Iterable[TensorSpec]) -> list[str]:
    return list(dict.fromkeys(size for spec in specs for size in spec.shape if isinstance(size, str)))
