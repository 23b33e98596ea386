"""What a client is: config files that make it load the graphs, and its feeding order, re-enacted with ONNX Runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnxruntime

Arrays = dict[str, np.ndarray]
Inputs = Mapping[str, np.ndarray]
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


@dataclass(frozen=True)
class RepoFacts:
    """What the config files of a repo are made of.

    Attributes:
        config: the model's, as the checkpoint has it.
        text_config: of the language model inside it, complete, with what ends a text.
        generation: the recipe's.
        stored_generation: the checkpoint's `generation_config.json`, or nothing.
        processor: the checkpoint's `processor_config.json` without what belongs in `preprocessor_config.json`.
        free_token_id: the id after the tokenizer's last.
    """

    config: Mapping[str, Any]
    text_config: Mapping[str, Any]
    generation: Mapping[str, Any]
    stored_generation: Mapping[str, Any]
    processor: Mapping[str, Any]
    eos_token_ids: Sequence[int]
    pad_token_id: int
    free_token_id: int


@dataclass(frozen=True)
class Observed:
    """One output that has a counterpart among the golden quantities."""

    component: str
    output: str
    quantity: str
    value: np.ndarray


@dataclass(frozen=True)
class DecoderRun:
    """What a decoder run gave: logits `[batch, kept, vocabulary]`, and the cache by `past_key_values.*` names."""

    component: str
    logits: np.ndarray
    cache: Arrays


class Sessions:
    """ONNX Runtime sessions of one dtype of a repo, opened when first used, fed as transformers.js feeds them."""

    def __init__(self, folder: Path, suffix: str):
        self.folder = folder
        self.suffix = suffix
        self._open: dict[str, onnxruntime.InferenceSession] = {}

    def path(self, component: str) -> Path:
        return self.folder / f"{component}{self.suffix}.onnx"

    def session(self, component: str) -> onnxruntime.InferenceSession:
        if component not in self._open:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            self._open[component] = onnxruntime.InferenceSession(
                str(self.path(component)), options, providers=["CPUExecutionProvider"]
            )
        return self._open[component]

    def run(self, component: str, feeds: Inputs) -> Arrays:
        """Run a graph on those of `feeds` that it declares; a declared input that is not among them raises."""
        session = self.session(component)
        wanted = {value.name: feeds[value.name] for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, wanted), strict=True))

    def empty_cache(self, component: str, batch: int) -> Arrays:
        """The first cache, by transformers.js's rule: the symbol `batch_size` is the batch, any other symbol 0."""
        cache = {}
        for value in self.session(component).get_inputs():
            if value.name.startswith("past_key_values."):
                sizes = [s if isinstance(s, int) else batch if s == "batch_size" else 0 for s in value.shape]
                cache[value.name] = np.zeros(sizes, dtype=_NUMPY[value.type])
        return cache


class Driver(Protocol):
    """A repo's graphs, driven as the client drives them.

    `inputs` are what the client is fed for one case, and for the decoder also what the encoder gave, by quantity.
    """

    def encode(self, inputs: Inputs) -> list[Observed]:
        """The encoder side's outputs."""

    def prefill(self, inputs: Inputs) -> DecoderRun:
        """The first logits and cache."""

    def step(self, token_ids: np.ndarray, cache: Arrays, inputs: Inputs) -> DecoderRun:
        """`[batch, tokens] int64` after the cache → logits of the last of them."""

    def seen(self, inputs: Inputs) -> list[int]:
        """The ids that rules on repetition look back on at the first token, for a batch of one."""


class Client(ABC):
    """What loads a repo: a pipeline, a class, or hand-written code.

    Attributes:
        name: how the model card calls it.
        task: the model card's `pipeline_tag`.
        node: the way in which `node/caption.mjs` runs it, or None where transformers.js cannot.
        own_token: a token that the tokenizer lacks and the repo's gets, with the id `RepoFacts.free_token_id`.
        chat_template: the template of a tokenizer that has none.
    """

    name: str
    task: str = "image-text-to-text"
    node: Literal["captioner", "chat"] | None = None
    own_token: str | None = None
    chat_template: str | None = None

    @abstractmethod
    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """The JSON files that make the client load the graphs, by file name."""

    @abstractmethod
    def driver(self, sessions: Sessions, files: Mapping[str, dict[str, Any]]) -> Driver:
        """Drive the graphs of a repo whose JSON files are `files`."""

    @abstractmethod
    def snippet(self, repo_id: str) -> str:
        """JavaScript (or Python, where no library loads it) that captions an image."""

    def prompt(self, text: str) -> str:
        """A golden's text as `node/caption.mjs` takes it."""
        return text


def decoder_run(component: str, outputs: Arrays) -> DecoderRun:
    """Sort a decoder's outputs as transformers.js does: `present` becomes the next `past_key_values`."""
    cache = {
        name.replace("present", "past_key_values", 1): value
        for name, value in outputs.items()
        if name.startswith("present")
    }
    return DecoderRun(component, outputs["logits"], cache)


def generation_config(facts: RepoFacts, **more: Any) -> dict[str, Any]:
    """`generation_config.json`: greedy, since transformers.js ignores `num_beams`, and with the ids that stop it."""
    eos = list(facts.eos_token_ids)
    return {
        **{key: value for key, value in facts.generation.items() if value not in (0, 1.0)},
        "do_sample": False,
        "num_beams": 1,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": facts.pad_token_id,
        **more,
    }
