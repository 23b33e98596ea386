"""Fixtures shared by the tests."""

from __future__ import annotations

import gc
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported, here and in every process that tests start: threads that wait for each other on busy cores
# take many times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import vlm_export  # noqa: F401 (before any test imports onnxruntime, which then reports to nobody)

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


LONG = ("test_trained", "test_wheel")
# By marker, the files whose every test has it. Slow are those that take more than ten seconds alone.
MARKED = {
    "browser": "accessibility browser demo_page serve_page",
    "node": "accessibility beginnings bench browser card_snippets chat_families cli contract convert demo_page "
    "docs_run encoder_decoder env examples js matrix node_runtime quick_start serve_page wheel",
    "slow": "accessibility adapter_names adapters attention bench browser card card_snippets chat_families cli "
    "companions convert demo_page docs_run doctor documents encoder_decoder examples export generation_rules "
    "graph_cache init inspect js kills matrix merge own_files planted_collapse proof push quick_start ranges "
    "remote_code repeat_layers report_page rewrites runtime_chat runtime_generate serve serve_page "
    "shapes_captioner stages sweep telemetry trained trial_run verify wheel",
}


def pytest_collection_finish() -> None:
    """Python's collector leaves alone what was imported, and comes seldom: a few hundredths of what a trace takes."""
    gc.set_threshold(100_000, 50, 100)
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long begin first, so that none is left to one worker while the other has nothing to do."""
    items.sort(key=lambda item: item.path.stem not in LONG)
    for marker, files in MARKED.items():
        stems = {f"test_{name}" for name in files.split()}
        for item in items:
            if item.path.stem in stems:
                item.add_marker(marker)


@pytest.fixture(scope="session", autouse=True)
def _shared_graph_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What tests trace is kept apart from the user's, and traced once for all of them, side by side as they run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "graph_cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_EXPORT_STRUCTURES", str(folder))
        yield folder


@pytest.fixture
def own_graph_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where one test alone finds and keeps what it traced."""
    folder = tmp_path_factory.mktemp("graph_cache") / "kept"
    monkeypatch.setenv("VLM_EXPORT_STRUCTURES", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _trace_alone(request: pytest.FixtureRequest) -> None:
    """A test that changes code as it runs traces for itself: no fault that it plants is hidden, or left to others."""
    function = getattr(request, "function", None)
    if function is not None and "monkeypatch" in inspect.signature(function).parameters:
        request.getfixturevalue("own_graph_cache")


@pytest.fixture(autouse=True)
def _small_thread_pools() -> Iterator[None]:
    """Tests run side by side; one thread each is faster than fighting over cores."""
    import torch

    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="session", autouse=True)
def _verify_on_one_thread() -> Iterator[None]:
    """ONNX Runtime's threads spin while they wait, on the cores that other tests run on."""
    from vlm_export.runtime.sessions import Sessions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sessions.__init__, "__defaults__", (1,))
        yield


@pytest.fixture(scope="session", autouse=True)
def _tracing_leaves_no_mark() -> Iterator[None]:
    """Whatever a test traces: a model that a trace changed would be another for the components that come after it."""
    from vlm_export.graph.graph_cache import GraphCache, describe

    trace = GraphCache.trace

    def watched(cache: GraphCache, component: Any, *onnxsim: Any) -> Any:
        before = describe(cache.model)
        traced = trace(cache, component, *onnxsim)
        assert describe(cache.model) == before, f"tracing {component.name} left a mark on the model"
        return traced

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphCache, "trace", watched)
        yield


@pytest.fixture(scope="session")
def default_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled default, merged and exported in fp32 and q8; nothing in it may be changed."""
    from vlm_export import pipeline
    from vlm_export.files import Work
    from vlm_export.recipe import find_recipe
    from vlm_export.wanted import parse

    recipe = find_recipe("shapes-captioner")
    work = Work(tmp_path_factory.mktemp("default") / "build" / recipe.name)
    pipeline.run_merge(recipe, work, lambda what, done, total: None)
    pipeline.run_export(recipe, work, lambda what, done, total: None, wanted=parse(["q8"], "dtypes"))
    return work.repo


@pytest.fixture(autouse=True)
def _verifies_what_it_says(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test marked `verifies` for ONNX Runtime or Node lets `verify` make those very checks."""
    marks = [mark for mark in request.node.iter_markers("verifies") if mark.kwargs.keys() & {"ort", "node"}]
    if not marks:
        yield
        return
    from vlm_export.verify import verify
    from vlm_export.verify.report import Report

    made: set[tuple[str, str, str, str]] = set()
    run = verify.verify

    def recorded(repo: Any, merged: Any, *arguments: Any, **options: Any) -> Report:
        report = run(repo, merged, *arguments, **options)
        found = (merged.family.model_type, report.layout)
        made.update((*found, check.runtime, check.dtype) for check in report.checks if check.verdict != "fail")
        return report

    monkeypatch.setattr(verify, "verify", recorded)
    yield
    said = {
        (model_type, layout, runtime, dtype)
        for mark in marks
        for model_type in mark.args[0].split()
        for layout in mark.args[1].split()
        for runtime, dtypes in mark.kwargs.items()
        for dtype in dtypes.split()
    }
    subjects = {check[:2] for check in made}
    assert subjects, "marked `verifies`, but verified nothing"
    assert subjects <= {claim[:2] for claim in said}, "verified what its mark does not say"
    missing = {claim for claim in said if claim[:2] in subjects} - made
    assert not missing, f"not verified, though its mark says so: {missing}"
