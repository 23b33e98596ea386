"""Drivers: each runs a layout's graphs in its client's order. Generation and `verify` both use them.

The clients are transformers.js 4.3.1's: `src/models/modeling_utils.js` says how ids and features become embeddings
(`default_merge_input_ids_with_image_features`), which positions and cache a decoder is fed (`decoder_forward`), and
what of its outputs is kept (`getPastKeyValues`). Which driver a repo takes follows from its `config.json` and its
graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from vlm_export.contract import (
    GRID_TYPES,
    MODEL_TYPES,
    NUMBERED_FROM_ONE,
    PREFIX,
    SINGLE_GRAPH,
    SINGLE_TYPE,
    WHOLE_PROMPT_TYPES,
)
from vlm_export.errors import InputError
from vlm_export.runtime.positions import grid_positions
from vlm_export.runtime.sessions import Arrays, Cache, DecoderRun, GraphError, Inputs, Sessions, cache_length

_DECODER = "decoder_model_merged"
_CROSS_CACHE = ".encoder."


@dataclass(frozen=True)
class Observed:
    """An output of the encoder side, and the name of the golden array that it is compared with."""

    component: str
    output: str
    golden_name: str
    value: np.ndarray


class Driver(Protocol):
    """A repo's graphs, driven as the client drives them.

    `inputs` are what the client is fed, and for the decoder also what the encoder gave, by golden name: `pixel_values`
    `[batch, …] float32`, `input_ids` `[batch, tokens] int64`, an `attention_mask` of the same shape where rows are
    padded, and `image_features` `[…, rows, hidden]` or `encoder_hidden_states` `[batch, rows, width]`, float32.

    Attributes:
        components: the graphs that it runs, by name.
        of_images: those of `inputs` that the decoder's side needs of each image beside its features, `[images, …]`
            each.
    """

    components: tuple[str, ...]
    of_images: tuple[str, ...]

    def encode(self, inputs: Inputs) -> list[Observed]:
        """Run the encoder side: each of its outputs, float32, with its golden name."""

    def prefill(self, inputs: Inputs) -> DecoderRun:
        """Run the decoder on prompt and image.

        Its logits are `[batch, kept, vocabulary] float32`, the last kept position's those of the first new token; its
        cache holds every position, `[batch, kv_heads, positions, head_dim]` an entry.
        """

    def step(self, token_ids: np.ndarray, cache: Cache, inputs: Inputs) -> DecoderRun:
        """Run the decoder on `[batch, tokens] int64` after the cache; `inputs` are the prompt's, or of them `per_step`.

        Its logits are `[batch, kept, vocabulary] float32`, the last kept position's those of the token after them; its
        cache has their positions appended.
        """

    def per_step(self, inputs: Inputs) -> Arrays:
        """What every step needs of a prompt's inputs, `[batch, …]` each."""

    def token_history(self, inputs: Inputs) -> list[list[int]]:
        """For each row, the ids that rules on repetition look back on at the first token."""


class ChatDriver:
    """`vision_encoder`, `embed_tokens` and `decoder_model_merged`: features are written over the rows of image tokens.

    Without images there is no `image_features` among the inputs. Tokens are numbered from `first` on; `whole_prompt`
    says that each of a prompt's sees all of them, so that none may be added to those in a cache.
    """

    components: tuple[str, ...] = ("vision_encoder", "embed_tokens", _DECODER)
    of_images: tuple[str, ...] = ()

    def __init__(self, sessions: Sessions, image_token_id: int, *, first: int = 0, whole_prompt: bool = False):
        self.sessions = sessions
        self.image_token_id = image_token_id
        self.first, self.whole_prompt = first, whole_prompt

    def encode(self, inputs: Inputs) -> list[Observed]:
        """`image_features` of the images: `[images or tiles, rows, hidden]`, or `[rows of all, hidden]`, float32."""
        outputs = self.sessions.run("vision_encoder", inputs)
        return [Observed("vision_encoder", "image_features", "image_features", outputs["image_features"])]

    def prefill(self, inputs: Inputs) -> DecoderRun:
        """Run the decoder on the embeddings of the prompt, with an empty cache."""
        ids = self.ids(inputs)
        return self._decode(self.embed(ids, inputs), self.sessions.empty_cache(_DECODER, len(ids)), inputs)

    def extend(self, cache: Cache, inputs: Inputs, before: np.ndarray) -> DecoderRun:
        """Run the decoder on a further part of a prompt, after a cache.

        `inputs` are those of the part alone, but for what is `of_images`, and `before` `[1, tokens] int64` the ids in
        the cache.
        """
        return self._decode(self.embed(inputs["input_ids"], inputs), cache, inputs)

    def step(self, token_ids: np.ndarray, cache: Cache, inputs: Inputs) -> DecoderRun:
        """Run the decoder on the embeddings of `[batch, tokens] int64`; no image is put among them."""
        return self._decode(self.embed(token_ids, {}), cache, inputs)

    def per_step(self, inputs: Inputs) -> Arrays:
        """The mask of the prompt, where rows are padded."""
        return _those(inputs, "attention_mask")

    def ids(self, inputs: Inputs) -> np.ndarray:
        """The ids of the prompt `[batch, tokens] int64`, with as many image tokens as there are features."""
        return inputs["input_ids"]

    def token_history(self, inputs: Inputs) -> list[list[int]]:
        """The ids of the prompt, without what pads the rows on their left."""
        ids = self.ids(inputs)
        mask = inputs.get("attention_mask", np.ones_like(ids))
        return [row[kept != 0].tolist() for row, kept in zip(ids, mask, strict=True)]

    def embed(self, token_ids: np.ndarray, inputs: Inputs) -> np.ndarray:
        """`[batch, tokens] int64` → `[batch, tokens, hidden] float32`, with the images' features in their places.

        Features may be narrower than embeddings: what is behind them stays as `embed_tokens` wrote it.
        """
        embeds = self.sessions.run("embed_tokens", {"input_ids": token_ids})["inputs_embeds"]
        if "image_features" in inputs:
            width = inputs["image_features"].shape[-1]
            if width > embeds.shape[-1]:
                raise GraphError(f"image_features are {width} wide, and inputs_embeds {embeds.shape[-1]}")
            embeds[token_ids == self.image_token_id, :width] = inputs["image_features"].reshape(-1, width)
        return embeds

    def _decode(self, embeds: np.ndarray, cache: Cache, inputs: Inputs, places: np.ndarray | None = None) -> DecoderRun:
        """Run the decoder; `places` are those of the tokens, where they are not what the mask says."""
        batch, length = embeds.shape[:2]
        total = cache_length(cache) + length
        mask = _mask(inputs, batch, total)
        positions = _counted(mask, self.first)[:, -length:] if places is None else places
        feeds = {
            "inputs_embeds": embeds,
            "attention_mask": mask,
            "position_ids": np.ascontiguousarray(positions),
            "num_logits_to_keep": np.array(1, dtype=np.int64),
            **_use_cache(total > length),
        }
        return self.sessions.decode(_DECODER, feeds, cache)


class GridDriver(ChatDriver):
    """A chat whose images come as patches with a grid, one a run, and whose tokens have places in three axes.

    `merge` is the number of lines, and of columns, of patches that become one row of features.
    """

    of_images: tuple[str, ...] = ("image_grid_thw",)

    def __init__(self, sessions: Sessions, image_token_id: int, merge: int):
        super().__init__(sessions, image_token_id)
        self.merge = merge

    def encode(self, inputs: Inputs) -> list[Observed]:
        """`image_features` `[cells of all images, hidden] float32`, of `pixel_values` `[patches of all images, …]`."""
        grids = inputs["image_grid_thw"]
        ends = grids.prod(axis=1).cumsum()
        images = np.split(inputs["pixel_values"], ends[:-1])
        made = [self._encode_one(*image) for image in zip(images, grids, strict=True)]
        return [Observed("vision_encoder", "image_features", "image_features", np.concatenate(made))]

    def _encode_one(self, patches: np.ndarray, grid: np.ndarray) -> np.ndarray:
        fed = {"pixel_values": patches} | dict.fromkeys(("grid_thw", "image_grid_thw"), grid[None])
        return self.sessions.run("vision_encoder", fed)["image_features"]

    def prefill(self, inputs: Inputs) -> DecoderRun:
        """Run the decoder on the embeddings of the prompt, each token in its place."""
        ids = self.ids(inputs)
        cache = self.sessions.empty_cache(_DECODER, len(ids))
        return self._decode(self.embed(ids, inputs), cache, inputs, self._places(inputs)[0])

    def extend(self, cache: Cache, inputs: Inputs, before: np.ndarray) -> DecoderRun:
        """As of `ChatDriver`: where a token is depends on all images before it."""
        ids = inputs["input_ids"]
        whole = {**inputs, "input_ids": np.concatenate([before, ids], axis=1)}
        places, _ = self._places(whole)
        return self._decode(self.embed(ids, inputs), cache, inputs, places[..., before.shape[1] :])

    def step(self, token_ids: np.ndarray, cache: Cache, inputs: Inputs) -> DecoderRun:
        """Run the decoder on further tokens, which count on from the prompt's last place in all axes."""
        batch, length = token_ids.shape
        counted = _counted(_mask(inputs, batch, cache_length(cache) + length))[:, -length:]
        places = np.broadcast_to(counted + self.per_step(inputs)["rope_deltas"], (3, batch, length))
        return self._decode(self.embed(token_ids, {}), cache, inputs, places)

    def per_step(self, inputs: Inputs) -> Arrays:
        """The mask where rows are padded, and `rope_deltas` `[batch, 1] int64`: see `grid_positions`."""
        if "rope_deltas" in inputs:
            return _those(inputs, "attention_mask", "rope_deltas")
        return super().per_step(inputs) | {"rope_deltas": self._places(inputs)[1]}

    def _places(self, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        ids = self.ids(inputs)
        mask = inputs.get("attention_mask", np.ones_like(ids))
        grids = inputs.get("image_grid_thw", np.zeros((0, 3), dtype=np.int64))
        return grid_positions(ids, mask, grids, self.image_token_id, self.merge)


class PrefixChatDriver(ChatDriver):
    """A llava made up around a captioner that has no image tokens: where none are given, they are in front of the ids.

    The PyTorch model generates from embeddings, so that rules on repetition look back on what is generated alone.
    """

    def ids(self, inputs: Inputs) -> np.ndarray:
        """The ids of the prompt, with the image tokens in front of them if there are none among them."""
        ids = inputs["input_ids"]
        if (ids == self.image_token_id).any():
            return ids
        batch, rows = inputs["image_features"].shape[:2]
        return np.concatenate([np.full((batch, rows), self.image_token_id, dtype=np.int64), ids], axis=1)

    def token_history(self, inputs: Inputs) -> list[list[int]]:
        """Nothing, for each row."""
        return [[] for _ in inputs["input_ids"]]


class EncoderDecoderDriver:
    """`encoder_model` and `decoder_model_merged`; ids begin with the start token.

    A cache of cross-attention comes out of the first run, and is kept for the runs after it.
    """

    components: tuple[str, ...] = ("encoder_model", _DECODER)
    of_images: tuple[str, ...] = ()
    golden_name = "encoder_hidden_states"

    def __init__(self, sessions: Sessions):
        self.sessions = sessions

    def encode(self, inputs: Inputs) -> list[Observed]:
        """The encoder's `last_hidden_state` `[batch, rows, width] float32`, under the driver's `golden_name`."""
        states = self.sessions.run("encoder_model", inputs)["last_hidden_state"]
        return [Observed("encoder_model", "last_hidden_state", self.golden_name, states)]

    def prefill(self, inputs: Inputs) -> DecoderRun:
        """Run the decoder on the start token and the ids after it, with an empty cache of both kinds."""
        ids = inputs["input_ids"]
        return self.run(ids, self.sessions.empty_cache(_DECODER, len(ids)), inputs, first=True)

    def step(self, token_ids: np.ndarray, cache: Cache, inputs: Inputs) -> DecoderRun:
        """Run the decoder after a cache; what it gives for cross-attention is ignored, and the cache's kept."""
        return with_first_states(self.run(token_ids, cache, inputs, first=False), cache)

    def per_step(self, inputs: Inputs) -> Arrays:
        """What the encoder gave."""
        return _those(inputs, self.golden_name)

    def token_history(self, inputs: Inputs) -> list[list[int]]:
        """All ids, the start token included."""
        return inputs["input_ids"].tolist()

    def run(self, token_ids: np.ndarray, cache: Cache, inputs: Inputs, *, first: bool) -> DecoderRun:
        """One run of the decoder, `token_ids` `[batch, tokens] int64`; `first` says that nothing is cached."""
        feeds = {
            "input_ids": token_ids,
            "encoder_hidden_states": inputs[self.golden_name],
            **_use_cache(not first),
        }
        return self.sessions.decode(_DECODER, feeds, cache)


class PrefixCaptionerDriver(EncoderDecoderDriver):
    """A `vision-encoder-decoder` made up around a captioner: the graph puts the prefix in the start token's place."""

    golden_name = "image_features"

    def __init__(self, sessions: Sessions, start_token_id: int):
        super().__init__(sessions)
        self.start_token_id = start_token_id

    def prefill(self, inputs: Inputs) -> DecoderRun:
        """Run the decoder on the start token, whose place the prefix takes, and the ids of the prompt after it."""
        prompt = inputs["input_ids"]
        start = np.full((len(prompt), 1), self.start_token_id, dtype=np.int64)
        ids = np.concatenate([start, prompt], axis=1)
        return self.run(ids, self.sessions.empty_cache(_DECODER, len(ids)), inputs, first=True)

    def token_history(self, inputs: Inputs) -> list[list[int]]:
        """Nothing, for each row: the PyTorch model generates from embeddings."""
        return [[] for _ in inputs["input_ids"]]


class TaskDriver:
    """`vision_encoder`, `embed_tokens`, `encoder_model` and `decoder_model_merged`: features in front of a prompt's
    embeddings go through a text encoder, whose states a decoder looks at that is fed embeddings.

    `input_ids` are the prompt's, `decoder_input_ids` `[batch, tokens] int64` the start token, or an answer's beginning.
    An `attention_mask` `[batch, tokens] int64` is of the prompt. A cache of cross-attention comes out of the first run.
    """

    components: tuple[str, ...] = ("vision_encoder", "embed_tokens", "encoder_model", _DECODER)
    of_images: tuple[str, ...] = ()

    def __init__(self, sessions: Sessions):
        self.sessions = sessions

    def encode(self, inputs: Inputs) -> list[Observed]:
        """`image_features` `[batch, rows, hidden]`, and the encoder's states `[batch, rows + tokens, hidden]`, float32.

        Features that are among the inputs go into the encoder in the place of the graph's own.
        """
        made = self.sessions.run("vision_encoder", inputs)["image_features"]
        features = inputs.get("image_features", made)
        embeds = np.concatenate([features, self.embed(inputs["input_ids"])], axis=1)
        feeds = {"inputs_embeds": embeds, "attention_mask": _seen(embeds, inputs)}
        states = self.sessions.run("encoder_model", feeds)["last_hidden_state"]
        return [
            Observed("vision_encoder", "image_features", "image_features", made),
            Observed("encoder_model", "last_hidden_state", "encoder_hidden_states", states),
        ]

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """`[batch, tokens] int64` → `[batch, tokens, hidden] float32`."""
        return self.sessions.run("embed_tokens", {"input_ids": token_ids})["inputs_embeds"]

    def prefill(self, inputs: Inputs) -> DecoderRun:
        """Run the decoder on what the answer begins with, with an empty cache of both kinds."""
        ids = inputs["decoder_input_ids"]
        return self._decode(ids, self.sessions.empty_cache(_DECODER, len(ids)), inputs, first=True)

    def step(self, token_ids: np.ndarray, cache: Cache, inputs: Inputs) -> DecoderRun:
        """Run the decoder after a cache; what it gives for cross-attention is ignored, and the cache's kept."""
        return with_first_states(self._decode(token_ids, cache, inputs, first=False), cache)

    def per_step(self, inputs: Inputs) -> Arrays:
        """The encoder's states, and the mask of the prompt where there is one."""
        return {name: inputs[name] for name in ("encoder_hidden_states", "attention_mask") if name in inputs}

    def token_history(self, inputs: Inputs) -> list[list[int]]:
        """What the answer begins with: rules on repetition look back on nothing of the prompt."""
        return inputs["decoder_input_ids"].tolist()

    def _decode(self, token_ids: np.ndarray, cache: Cache, inputs: Inputs, *, first: bool) -> DecoderRun:
        states = inputs["encoder_hidden_states"]
        feeds = {
            "inputs_embeds": self.embed(token_ids),
            "encoder_hidden_states": states,
            "encoder_attention_mask": _seen(states, inputs),
            **_use_cache(not first),
        }
        return self.sessions.decode(_DECODER, feeds, cache)


def _seen(rows: np.ndarray, inputs: Inputs) -> np.ndarray:
    """`[batch, rows + tokens] int64` of `[batch, rows + tokens, hidden]`: features all, a prompt as its mask says."""
    seen = np.ones(rows.shape[:2], dtype=np.int64)
    if "attention_mask" in inputs:
        seen[:, -inputs["attention_mask"].shape[1] :] = inputs["attention_mask"]
    return seen


def with_first_states(done: DecoderRun, cache: Cache) -> DecoderRun:
    """A run whose cache of cross-attention is that of the run before: the later ones give none."""
    kept = {name: value for name, value in cache.items() if _CROSS_CACHE in name}
    return DecoderRun(done.component, done.logits, {**done.cache, **kept})


class ComponentsDriver:
    """`vision_encoder` → `projection` → `prefix_init`, then `embed_tokens` and `language_model` for each token."""

    components: tuple[str, ...] = ("vision_encoder", "projection", "prefix_init", "embed_tokens", "language_model")
    of_images: tuple[str, ...] = ()

    def __init__(self, sessions: Sessions):
        self.sessions = sessions

    def encode(self, inputs: Inputs) -> list[Observed]:
        """`vision_features` and `image_features`, `[batch, rows, hidden] float32` each in its own width."""
        features = self.sessions.run("vision_encoder", inputs)["last_hidden_state"]
        prefix = self.sessions.run("projection", {"last_hidden_state": features})["projected_prefix"]
        return [
            Observed("vision_encoder", "last_hidden_state", "vision_features", features),
            Observed("projection", "projected_prefix", "image_features", prefix),
        ]

    def prefill(self, inputs: Inputs) -> DecoderRun:
        """Run `prefix_init` on the prefix and the ids of the prompt, of which there may be none."""
        feeds = {"prefix_embeddings": inputs["image_features"], "input_ids": inputs["input_ids"]}
        return self.sessions.decode("prefix_init", feeds, {})

    def step(self, token_ids: np.ndarray, cache: Cache, inputs: Inputs) -> DecoderRun:
        """Look `[batch, tokens] int64` up in `embed_tokens`, and run `language_model` on them after the cache."""
        embeds = self.sessions.run("embed_tokens", {"input_ids": token_ids})
        return self.sessions.decode("language_model", embeds, cache)

    def per_step(self, inputs: Inputs) -> Arrays:
        """Nothing: the image is in the cache."""
        return {}

    def token_history(self, inputs: Inputs) -> list[list[int]]:
        """Nothing, for each row: the PyTorch model generates from embeddings."""
        return [[] for _ in inputs["input_ids"]]


@dataclass(frozen=True)
class DriverChoice:
    """The driver that a repo takes, before any of its graphs is opened.

    Attributes:
        components: the graphs that it runs, by name.
        on: makes the driver, on the graphs of one dtype.
    """

    components: tuple[str, ...]
    on: Callable[[Sessions], Driver]


def choose_driver(files: Mapping[str, dict[str, Any]]) -> DriverChoice:
    """The driver of a repo whose JSON files are `files`: transformers.js too goes by nothing but `model_type`.

    Raises:
        InputError: a `model_type` that none of them is for, no image token where there must be one, or no start token.
    """
    config = files["config.json"]
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise InputError(f"config.json: model_type {model_type!r} is not supported: there is {', '.join(MODEL_TYPES)}")
    match MODEL_TYPES[model_type], bool(config.get(PREFIX)):
        case "captioner", True:
            start = start_token_id(files["generation_config.json"])
            return DriverChoice(PrefixCaptionerDriver.components, partial(PrefixCaptionerDriver, start_token_id=start))
        case "captioner", False:
            return DriverChoice(EncoderDecoderDriver.components, EncoderDecoderDriver)
        case "chat", False if model_type in GRID_TYPES:
            merge = (config.get("vision_config") or {}).get("spatial_merge_size", 2)
            grid = partial(GridDriver, image_token_id=image_token_id(config), merge=merge)
            return DriverChoice(GridDriver.components, grid)
        case "chat", prefix:
            chat = PrefixChatDriver if prefix else ChatDriver
            made = partial(
                chat,
                image_token_id=image_token_id(config),
                first=int(model_type in NUMBERED_FROM_ONE),
                whole_prompt=model_type in WHOLE_PROMPT_TYPES,
            )
            return DriverChoice(chat.components, made)
        case "tasks", _:
            return DriverChoice(TaskDriver.components, TaskDriver)
    return DriverChoice(ComponentsDriver.components, ComponentsDriver)


def start_token_id(generation: Mapping[str, Any]) -> int:
    """The id that a captioner's text begins with, of a repo's `generation_config.json`.

    Raises:
        InputError: it names none, or what is no id.
    """
    found = generation.get("decoder_start_token_id")
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise InputError("generation_config.json: decoder_start_token_id: must be the id that begins a text")
    return found


def graphs_of(files: Mapping[str, dict[str, Any]]) -> tuple[str, ...]:
    """The graphs of a repo whose JSON files are `files`, by name.

    Raises:
        InputError: as of `choose_driver`.
    """
    if files["config.json"].get("model_type") == SINGLE_TYPE:
        return (SINGLE_GRAPH,)
    return choose_driver(files).components


def image_token_id(config: Mapping[str, Any]) -> int:
    """The id of the token that stands for a row of an image's features in a prompt.

    Raises:
        InputError: config.json names none.
    """
    for name in ("image_token_index", "image_token_id"):
        if isinstance(config.get(name), int):
            return config[name]
    raise InputError("config.json: image_token_id: not set, so no image could be put into a prompt")


def begun_with(inputs: Inputs) -> np.ndarray:
    """The ids `[batch, tokens] int64` that the decoder goes on from.

    They are the prompt's or, where an encoder reads that, what the answer begins with.
    """
    return inputs.get("decoder_input_ids", inputs["input_ids"])


def with_encoded(driver: Driver, inputs: Inputs) -> Arrays:
    """`inputs`, and the outputs of the encoder side for them by golden name."""
    return dict(inputs) | {observed.golden_name: observed.value for observed in driver.encode(inputs)}


def _those(inputs: Inputs, *names: str) -> Arrays:
    return {name: inputs[name] for name in names if name in inputs}


def _mask(inputs: Inputs, batch: int, total: int) -> np.ndarray:
    """`[batch, total] int64`: that of the prompts, where rows are padded, and ones behind it."""
    given = inputs.get("attention_mask", np.ones((batch, 0), dtype=np.int64))
    return np.concatenate([given, np.ones((batch, total - given.shape[1]), dtype=np.int64)], axis=1)


def _counted(mask: np.ndarray, first: int = 0) -> np.ndarray:
    """The number of each token in its row, `[batch, tokens] int64`; of what pads it 1, as transformers.js has it."""
    return np.where(mask == 0, 1, mask.cumsum(axis=1) - 1 + first)


def _use_cache(used: bool) -> Arrays:
    """The input by which graphs merged of two, with and without a past, choose one; others do not declare it."""
    return {"use_cache_branch": np.array([used])}
