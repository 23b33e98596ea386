"""ONNX Runtime sessions of one dtype of a repo, and the decoder's cache, which stays in ONNX Runtime between steps.

The cache goes from a run's outputs to the next one's inputs as OrtValues, so nothing is copied but where beams change
places. An IOBinding does the same and was no faster (SmolLM-135M, 2 threads, a past of 1024: 15 ms a token either way),
nor was one that writes into buffers made beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from vlm_export.dtypes import ACTIVATIONS, BY_ROW
from vlm_export.errors import InputError
from vlm_export.machine import own_threads
from vlm_export.own_files import own_file
from vlm_export.runtime.run_limit import RUN_SECONDS, limited
from vlm_export.spec.cache import first_with_positions, has_positions, is_past, is_present, past_of

Arrays = dict[str, np.ndarray]
Inputs = Mapping[str, np.ndarray]
Cache = dict[str, onnxruntime.OrtValue]
_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
_LOGITS = "logits"
MOST_STATE = 2**26  # numbers of what a layer keeps that is no attention, for a row


class GraphError(Exception):
    """Something is wrong in a graph's file."""


class UnknownInput(GraphError):
    """A graph declares an input that no client feeds."""


GRAPH_ERRORS = (  # ONNX Runtime has no common base for its own
    GraphError,
    FloatingPointError,
    UnicodeDecodeError,  # a name in the file
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoSuchFile,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)


@dataclass(frozen=True)
class DecoderRun:
    """What a decoder run gave: logits `[batch, kept, vocabulary] float32`, and the cache by the names of inputs."""

    component: str
    logits: np.ndarray
    cache: Cache


class Sessions:
    """ONNX Runtime sessions of one dtype of a repo, opened when first used, fed as transformers.js feeds them.

    `suffix` is that of the dtype's files, or by component, where each has a dtype of its own. `threads` are for each
    graph; 0 leaves their number to ONNX Runtime. `run_seconds` is what one run of a graph may take.
    """

    def __init__(
        self,
        folder: Path,
        suffix: str | Mapping[str, str],
        threads: int = 0,
        *,
        run_seconds: float = RUN_SECONDS,
    ):
        self.folder = folder
        self.suffix = suffix
        self.threads = threads
        self.run_seconds = run_seconds
        self._open: dict[str, onnxruntime.InferenceSession] = {}

    def path(self, component: str) -> Path:
        """The file of a graph in this dtype."""
        suffix = self.suffix if isinstance(self.suffix, str) else self.suffix[component]
        return self.folder / f"{component}{suffix}.onnx"

    def session(self, component: str) -> onnxruntime.InferenceSession:
        """The session of a graph, opened on the CPU at the first call and kept.

        Raises:
            InputError: its file is a link that leads out of the repo, or is none, or asks for more than any model does.
            GraphError: it holds no graph, or not all of one.
        """
        if component not in self._open:
            path = self.path(component)
            if own_file(self.folder.parent, f"{self.folder.name}/{path.name}") is not None:
                _check(path)
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4  # the error is raised too
            options.intra_op_num_threads = self.threads or own_threads()
            self._open[component] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return self._open[component]

    def rows_are_independent(self, components: Sequence[str]) -> bool:
        """Whether the graphs say that no row's activations depend on the other rows of a batch."""
        known = [self.session(name).get_modelmeta().custom_metadata_map.get(ACTIVATIONS) for name in components]
        return all(value == BY_ROW for value in known)

    def input_names(self, component: str) -> list[str]:
        """The inputs that a graph declares, cache included, in its own order."""
        return [value.name for value in self.session(component).get_inputs()]

    def run(self, component: str, feeds: Inputs) -> Arrays:
        """Run a graph on those of `feeds` that it declares.

        Raises:
            UnknownInput: it declares another.
            InputError: it takes more than `run_seconds`.
        """
        session = self.session(component)
        wanted = {name: _fed(name, feeds, component) for name in self.input_names(component)}
        names = [value.name for value in session.get_outputs()]
        with limited(component, self.run_seconds) as run:
            return dict(zip(names, session.run(names, wanted, run), strict=True))

    def decode(self, component: str, feeds: Inputs, cache: Cache) -> DecoderRun:
        """Run a decoder as `run` does. What it appends to the cache is not copied: it is fed to the next step as it is.

        What it gives of the cache goes into the next run under the names of inputs.
        """
        session = self.session(component)
        wanted = {
            name: cache[name] if name in cache else _value(_fed(name, feeds, component))
            for name in self.input_names(component)
        }
        names = [value.name for value in session.get_outputs()]
        with limited(component, self.run_seconds) as run:
            outputs = dict(zip(names, session.run_with_ort_values(names, wanted, run), strict=True))
        after = {past_of(name): value for name, value in outputs.items() if is_present(name)}
        if _LOGITS not in outputs:
            raise GraphError(f"{component} has no output {_LOGITS!r}: there is {', '.join(names)}")
        return DecoderRun(component, outputs[_LOGITS].numpy(), after)

    def empty_cache(self, component: str, batch: int) -> Cache:
        """The first cache: the symbol `batch_size` is the batch, any other symbol 0.

        transformers.js 4.3.1, `resolveCacheShape` in `src/models/modeling_utils.js`.

        Raises:
            GraphError: a cache is of a type that no client feeds, or a state larger than any model's.
        """
        cache = {}
        for value in self.session(component).get_inputs():
            if is_past(value.name):
                sizes = [s if isinstance(s, int) else batch if s == "batch_size" else 0 for s in value.shape]
                if math.prod(sizes) > MOST_STATE * batch:
                    raise GraphError(f"{component}: {value.name} is {value.shape}: a state has at most {MOST_STATE:,}")
                cache[value.name] = _value(np.zeros(sizes, dtype=_numpy_type(value, component)))
        return cache


def take_rows(cache: Cache, rows: np.ndarray) -> Cache:
    """The cache of other rows: `rows` `[new batch] int64` are places in the batch as it is."""
    return {name: _value(value.numpy()[rows]) for name, value in cache.items()}


def is_cuttable(cache: Cache) -> bool:
    """Whether the first positions of a cache can be had of it: not where a layer keeps a state of them all."""
    return all(has_positions(name) for name in cache)


def keep_positions(cache: Cache, length: int) -> Cache:
    """The first `length` positions of a cache that `is_cuttable`."""
    assert is_cuttable(cache)
    return {name: _value(np.ascontiguousarray(value.numpy()[:, :, :length])) for name, value in cache.items()}


def cache_length(cache: Cache) -> int:
    """Positions that a cache of self-attention holds.

    Raises:
        GraphError: none of its layers keeps keys.
    """
    name = first_with_positions(cache)
    if name is None:
        raise GraphError(f"a cache without keys: there is {', '.join(cache) or 'none'}")
    return cache[name].shape()[2]


def _check(path: Path) -> None:
    """Raises as `Sessions.session`."""
    from vlm_export.runtime.graph_bounds import check_graph  # imports onnx, which who only plans has no need of
    from vlm_export.tensors.graph_message import read_message

    try:
        message = read_message(path)
    except InputError as error:
        raise GraphError(str(error).replace(str(path), path.name, 1)) from error
    check_graph(path, message)


def _numpy_type(value: onnxruntime.NodeArg, component: str) -> type[np.generic]:
    """Raises GraphError for a type that no client feeds."""
    if value.type not in _NUMPY_TYPES:
        raise GraphError(f"{component}: {value.name} is a {value.type}, and there are {', '.join(_NUMPY_TYPES)}")
    return _NUMPY_TYPES[value.type]


def _fed(name: str, feeds: Inputs, component: str) -> np.ndarray:
    if name not in feeds:
        raise UnknownInput(f"{component} wants {name!r}, which is not among {', '.join(feeds)}")
    return feeds[name]


def _value(array: np.ndarray) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
