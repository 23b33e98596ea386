"""What a layout declares: its config files, and its client's feeding order, re-enacted with ONNX Runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime

Arrays = dict[str, np.ndarray]
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


@dataclass(frozen=True)
class RepoFacts:
    """What the config files of a layout are made of.

    Attributes:
        image_token_id: the id after the last row of the token table; never generated.
        image_tokens: rows of `image_features` for one image.
    """

    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    eos_token_ids: Sequence[int]
    pad_token_id: int
    image_token: str
    image_token_id: int
    image_tokens: int
    image_size: int


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

    def run(self, component: str, feeds: Mapping[str, np.ndarray]) -> Arrays:
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
    """A repo's graphs, driven as the layout's client drives them."""

    def encode(self, pixel_values: np.ndarray) -> list[Observed]:
        """`[batch, 3, H, W] float32` → the encoder side's outputs, `image_features` the last."""

    def prefill(self, image_features: np.ndarray, prompt_ids: np.ndarray) -> DecoderRun:
        """`[batch, rows, hidden]` and `[batch, tokens] int64` → the first logits and cache."""

    def step(self, token_ids: np.ndarray, cache: Arrays, image_features: np.ndarray) -> DecoderRun:
        """`[batch, tokens] int64` after the cache → logits of the last of them."""


class Layout(ABC):
    """One way to lay out a repo. `client` names what loads it: a pipeline, a class, or hand-written code."""

    name: str
    client: str
    in_transformers_js: bool = True

    @abstractmethod
    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """The JSON files that make the client load the graphs, by file name."""

    @abstractmethod
    def driver(self, sessions: Sessions, facts: Mapping[str, dict[str, Any]]) -> Driver:
        """Drive the graphs of a repo whose JSON files are `facts`."""

    @abstractmethod
    def snippet(self, repo_id: str, image_token: str) -> str:
        """JavaScript (or Python, where no library loads it) that captions an image."""


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
