"""Find the first stage of an export after which a graph is wrong, and the first tensor that is.

    prompt ids, pixels → trace → each pass → onnxsim → repeat_layers → the float32 file → the file in a dtype

Each stage is a graph of its own here, with the merged weights in it, that is run on the golden cases in the place of
the repo's. Layers are traced whole: what an export makes of two of them comes as a stage of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from vlm_export.atomic import scratch_folder
from vlm_export.dtypes import DTYPES, FP32
from vlm_export.graph.graph_cache import GraphCache
from vlm_export.graph.graph_file import save_graph
from vlm_export.graph.skeleton import make_skeleton
from vlm_export.graph.stacks import find_stacks
from vlm_export.graph.weights import attach_weights
from vlm_export.machine import own_threads
from vlm_export.manifest import ONNX
from vlm_export.models.pixels import PIXELS
from vlm_export.runtime.sessions import GRAPH_ERRORS, Arrays, Cache, DecoderRun, Inputs
from vlm_export.source.checkpoint import Checkpoint
from vlm_export.spec.graph import Component
from vlm_export.verify import in_ort, limits
from vlm_export.verify.golden_sessions import GoldenSessions, as_fed
from vlm_export.verify.metrics import cosine_similarity, max_relative_error
from vlm_export.verify.report import SHAPE, Check, Fault
from vlm_export.verify.verification import Verification
from vlm_export.wanted import MIXED

_OF_FILES = {limits.PROMPT_IDS: "prompt ids", limits.PIXELS: "pixels", limits.PIXELS_IN_GRAPH: "pixels of the graph"}
_OF_GRAPHS = (limits.MAX_RELATIVE_ERROR, limits.COSINE_SIMILARITY, SHAPE)  # of golden cases
_TOGETHER = 64  # values of a graph that are returned by one run
_LAYER = re.compile(r"(?:layers?|\.h|blocks?)\.(\d+)\.|^present\.(\d+)\.")
_WHOLE = "it is bisected"


@dataclass(frozen=True)
class Stage:
    """A graph of a component, on disk, after something was done to it."""

    name: str
    path: Path


class OneGraph(GoldenSessions):
    """A repo's sessions, but for one component, whose inputs are kept, and `others`: they are other files."""

    def __init__(self, run: Verification, component: str, path: Path, others: Mapping[str, Path]):
        super().__init__(run.repo / ONNX, FP32.suffix, run.steps)
        self.component, self.files = component, {**others, component: path}
        self.fed: list[Arrays] = []

    def path(self, component: str) -> Path:
        """The file of a graph."""
        return self.files.get(component) or super().path(component)

    def run(self, component: str, feeds: Inputs) -> Arrays:
        """As of `Sessions`."""
        if component == self.component:
            self.fed.append(self._wanted(feeds))
        return super().run(component, feeds)

    def decode(self, component: str, feeds: Inputs, cache: Cache) -> DecoderRun:
        """As of `Sessions`."""
        if component == self.component:
            self.fed.append(self._wanted({**feeds, **{name: value.numpy() for name, value in cache.items()}}))
        return super().decode(component, feeds, cache)

    def _wanted(self, feeds: Inputs) -> Arrays:
        given = as_fed(feeds, self.steps)
        return {name: given[name] for name in self.input_names(self.component)}


def bisect(run: Verification, merged: Checkpoint) -> list[Fault]:
    """The first fault of each component that is wrong by itself, or of what the graphs are fed.

    `run` holds the checks that were made. What is wrong in float32 is not looked for in other dtypes.
    """
    failed = [check for check in run.checks if check.verdict == "fail"]
    for metric, stage in _OF_FILES.items():
        if found := next((check for check in failed if check.metric == metric), None):
            return [Fault(found.component, found.dtype, stage, "", found.detail, value=found.value, expected=0.0)]
    of_graphs = [check for check in failed if check.metric in _OF_GRAPHS]
    wrong = {(check.component, check.dtype): check for check in reversed(of_graphs)}
    in_fp32 = {component for component, dtype in wrong if dtype == FP32.name}
    names = [each.name for each in run.components]
    ordered = sorted(wrong, key=lambda pair: (names.index(pair[0]), pair[1] != FP32.name))
    with scratch_folder() as scratch:
        search = Search(run, merged, Path(scratch))
        return [
            search.fault(search.component(name), dtype)
            for name, dtype in ordered
            if dtype == FP32.name or name not in in_fp32
        ]


class Search:
    """The stages of a repo's components, made anew in a scratch folder."""

    def __init__(self, run: Verification, merged: Checkpoint, scratch: Path):
        self.run, self.merged, self.scratch = run, merged, scratch
        self.made_anew: dict[str, Path] = {}  # graphs in the place of the repo's, for a while
        in_graph = run.manifest.in_graph
        self.cache = GraphCache(merged, run.manifest.layout, in_graph=in_graph, keep=False)

    def component(self, name: str) -> Component:
        """A component of the layout."""
        return next(each for each in self.cache.components if each.name == name)

    def fault(self, component: Component, dtype: str) -> Fault:
        """The first stage after which the component is wrong, and where."""
        last = Stage(f"the file {self._file(component, dtype).name}", self._file(component, dtype))
        if dtype != FP32.name:
            before = Stage("the float32 file", self._file(component, FP32.name))
            return self._between(component, dtype, before, last)
        stages = [*self.stages(component), last]
        first = self._first_wrong(component, stages)
        if first == 0 and (feeding := self._wrong_before(component, stages[0])):
            return feeding
        if first == 0:
            wrong = self._wrong(component, stages[0])
            assert wrong is not None
            return self._as_in_the_check(component, dtype, stages[0].name, "", wrong)
        return self._between(component, dtype, stages[first - 1], stages[first])

    def _wrong_before(self, component: Component, stage: Stage) -> Fault | None:
        """The fault of a graph that feeds this one and is not compared itself, as `embed_tokens` is not."""
        for other in self.cache.components:
            if other.name == component.name or any(spec.name == PIXELS for spec in other.inputs):
                continue
            *_, last = self.stages(other)
            self.made_anew = {other.name: last.path}
            is_right = self._wrong(component, stage) is None
            self.made_anew = {}
            if is_right:
                file = Stage(f"the file {self._file(other, FP32.name).name}", self._file(other, FP32.name))
                differs = _different_weight(ir.load(last.path), ir.load(file.path))
                found = differs or (f"what {component.name} is fed", [], [0.0, 0.0])
                return self._fault(other, FP32.name, last, file, *found)
        return None

    def stages(self, component: Component) -> Iterator[Stage]:
        """The component's graph after each thing that is done to it, traced anew."""
        self.run.tell(f"bisecting {component.name}: tracing")
        made: list[tuple[str, ir.Model]] = []
        model = self.cache.model
        stacks, _ = find_stacks(component, model, {})
        whole = {stack.path: _WHOLE for stack in stacks}
        make_skeleton(component, model, whole, watch=lambda name, skeleton: made.append((name, skeleton.clone())))
        if stacks:
            made.append(("repeat_layers", make_skeleton(component, model)[0]))
        for place, (name, skeleton) in enumerate(made):
            folder = self.scratch / f"{component.name}.{place}"
            folder.mkdir(exist_ok=True)
            save_graph(attach_weights(skeleton, component, self.merged.tensors), folder / "model.onnx")
            yield Stage(name, folder / "model.onnx")

    def _file(self, component: Component, dtype: str) -> Path:
        own = self.run.manifest.mixed[component.name] if dtype == MIXED else dtype
        return self.run.repo / ONNX / f"{component.name}{DTYPES[own].suffix}.onnx"

    def _first_wrong(self, component: Component, stages: Sequence[Stage]) -> int:
        """The place of the first stage that is wrong; the last one is."""
        low, high = 0, len(stages) - 1
        while low < high:
            middle = (low + high) // 2
            self.run.tell(f"bisecting {component.name}: {stages[middle].name}")
            if self._wrong(component, stages[middle]):
                high = middle
            else:
                low = middle + 1
        return low

    def _wrong(self, component: Component, stage: Stage) -> Check | None:
        """The first check of the component that fails with this graph of it."""
        return self._checked(component, stage, FP32.name)[0]

    def _checked(self, component: Component, stage: Stage, dtype: str) -> tuple[Check | None, list[Arrays]]:
        """The same, and what the graph was fed."""
        run = replace(self.run, checks=[])
        sessions = OneGraph(run, component.name, stage.path, self.made_anew)
        driver = in_ort.driver_of(run, sessions)
        for case in run.golden.facts.cases:
            try:
                in_ort.check_case(run, dtype, driver, case)
            except GRAPH_ERRORS as error:
                run.fail(component.name, dtype, "ort", limits.MAX_RELATIVE_ERROR, " ".join(str(error).split()))
            for check in run.checks:
                if check.verdict == "fail" and check.component == component.name:
                    return check, sessions.fed
        return None, sessions.fed

    def _between(self, component: Component, dtype: str, right: Stage, wrong: Stage) -> Fault:
        """Where two graphs of a component part: the first weight or value, in the order of the right one."""
        if dtype == FP32.name and (differs := _different_weight(ir.load(right.path), ir.load(wrong.path))):
            return self._fault(component, dtype, right, wrong, *differs)
        check, fed = self._checked(component, wrong, dtype)
        for feeds in fed:
            try:
                found = _first_different(right.path, wrong.path, feeds, _judge(dtype))
            except GRAPH_ERRORS:
                break
            if found:
                return self._fault(component, dtype, right, wrong, *found)
        assert check is not None, f"{component.name} fails in {dtype}"
        return self._as_in_the_check(component, dtype, wrong.name, right.name, check)

    @staticmethod
    def _fault(
        component: Component, dtype: str, right: Stage, wrong: Stage, name: str, place: list[int], pair: list[float]
    ) -> Fault:
        expected, value = pair
        layer = _layer_of(ir.load(right.path).graph, name)
        return Fault(component.name, dtype, wrong.name, right.name, name, layer, place, value, expected)

    @staticmethod
    def _as_in_the_check(component: Component, dtype: str, stage: str, before: str, check: Check) -> Fault:
        """A fault that no value inside the graph shows: the output that the check is about."""
        return Fault(component.name, dtype, stage, before, check.detail, _layer(check.detail), [], check.value, 0.0)


Difference = tuple[str, list[int], list[float]]  # name, place, right and wrong value
Judge = Callable[[np.ndarray, np.ndarray], bool]  # whether a value is wrong, beside the right one


def _judge(dtype: str) -> Judge:
    """In float32 by the error, in fewer bits by the direction of rows, as `verify` judges outputs."""
    limit = limits.limit_for(limits.COSINE_SIMILARITY, [dtype])
    if dtype == FP32.name:
        return lambda value, right: not max_relative_error(value, right) <= 1e-4
    least = limit.limit if limit else 0.9
    return lambda value, right: not cosine_similarity(value, right) >= least


def _different_weight(right: ir.Model, wrong: ir.Model) -> Difference | None:
    """The first weight of one name that is not the same in both graphs."""
    others = wrong.graph.initializers
    for name, value in right.graph.initializers.items():
        other = others.get(name)
        if other is None or value.const_value is None or other.const_value is None:
            continue
        one, two = value.const_value.numpy(), other.const_value.numpy()
        if one.shape == two.shape and one.dtype == two.dtype and not np.array_equal(one, two):
            return name, *_largest(two, one)
    return None


def _first_different(right: Path, wrong: Path, feeds: Arrays, is_wrong: Judge) -> Difference | None:
    """The first value of one name, in the order of the right graph, that is wrong in the other."""
    first, second = ir.load(right), ir.load(wrong)
    there = {value.name for node in second.graph for value in node.outputs if _is_float(value)}
    names = [
        str(value.name) for node in first.graph for value in node.outputs if _is_float(value) and value.name in there
    ]
    for start in range(0, len(names), _TOGETHER):
        some = names[start : start + _TOGETHER]
        for name, one, two in zip(some, *(_values(path, some, feeds) for path in (right, wrong)), strict=True):
            if one.shape != two.shape:
                return f"{name}, of shape {list(two.shape)} and not {list(one.shape)}", [], [0.0, 0.0]
            if one.size and is_wrong(two, one):
                return name, *_largest(two, one)
    return None


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def _values(path: Path, names: Sequence[str], feeds: Arrays) -> list[np.ndarray]:
    """Values inside a graph: they are its outputs in a copy beside it, where its external data lies."""
    model = ir.load(path)
    inside = {value.name: value for node in model.graph for value in node.outputs}
    known = {value.name for value in model.graph.outputs}
    model.graph.outputs.extend(inside[name] for name in names if name not in known)
    with scratch_folder() as folder:
        copy = Path(folder, "model.onnx")
        save_graph(model, copy)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = own_threads()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(copy), options, providers=["CPUExecutionProvider"])
        wanted = {value.name for value in session.get_inputs()}
        found = session.run(list(names), {name: value for name, value in feeds.items() if name in wanted})
        return [np.asarray(value) for value in found]


def _largest(value: np.ndarray, right: np.ndarray) -> tuple[list[int], list[float]]:
    """Where two arrays differ most, and the right value and the other one there."""
    difference = np.abs(value.astype(np.float64) - right.astype(np.float64))
    place = np.unravel_index(int(np.nan_to_num(difference, nan=np.inf).argmax()), value.shape)
    return [int(each) for each in place], [float(right[place]), float(value[place])]


def _layer_of(graph: ir.Graph, name: str) -> int | None:
    """The layer of a value: by its name, or by that of the nearest weight in front of it."""
    waiting = [value for node in graph for value in node.outputs if value.name == name]
    seen = set(waiting)
    layer = _layer(name)
    while waiting and layer is None:
        node = waiting.pop(0).producer()
        values = [value for value in (node.inputs if node else ()) if value is not None and value not in seen]
        layer = next((found for value in values if (found := _layer(str(value.name))) is not None), None)
        waiting += values
        seen |= set(values)
    return layer


def _layer(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found[1] or found[2]) if found else None
