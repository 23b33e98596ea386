"""The graph cache: a graph is found when nothing changed that its trace depends on, and never when something did."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pico
import pico_chat
import pytest
import torch
from click.testing import CliRunner
from exported import Exported, prepare, record, silent
from torch import nn

from vlm_export import pipeline
from vlm_export.atomic import write_bytes
from vlm_export.cli import main
from vlm_export.files import sha256
from vlm_export.graph import graph_cache, skeleton
from vlm_export.graph.graph_cache import UNUSED_DAYS, GraphCache, describe, files_digest, graph_cache_folder
from vlm_export.graph.simplify import simplify
from vlm_export.source.checkpoint import Checkpoint, build_empty, open_checkpoint
from vlm_export.spec.graph import Component, TensorSpec
from vlm_export.wanted import parse

pytestmark = pytest.mark.usefixtures("own_graph_cache")
ONLY_TRACING = ("onnxscript", "torch.onnx._internal.exporter._core", "vlm_export.graph.trace")
_EXPORT = """
import sys
from vlm_export.cli import main
main(["onnx", *sys.argv[2:]], standalone_mode=False)
print([name for name in sys.argv[1].split() if name in sys.modules])
"""
_TRACE = """
import sys
from pathlib import Path
from vlm_export.source.checkpoint import open_checkpoint
from vlm_export.graph.graph_cache import GraphCache
cache = GraphCache(open_checkpoint(Path(sys.argv[1])), "components")
cache.trace(cache.components[1])
"""


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint(tmp_path_factory.mktemp("merged"), pico.config())


def checkpoint(folder: Path, settings: dict[str, Any], **options: Any) -> Checkpoint:
    return open_checkpoint(pico.write_checkpoint(folder, settings, lora=False, **options))


def projection(cache: GraphCache) -> Component:
    """The component that is traced fastest."""
    return next(component for component in cache.components if component.name == "projection")


def key(merged: Checkpoint, layout: str = "components", component: int = -1) -> str:
    cache = GraphCache(merged, layout)
    return cache.path(cache.components[component]).name


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


def never(*_: Any, **options: Any) -> Any:
    raise AssertionError("traced")


def captioner(folder: Path) -> Exported:
    return prepare(folder, pico.config(layers=3))


def llava(folder: Path) -> Exported:
    pico_chat.write_llava(folder / "checkpoint")
    golden = {"images": ["images/*.png"], "prompts": [pico_chat.CONVERSATION]}
    return record(folder, layout="chat", golden=golden)


@pytest.mark.parametrize(("make", "layout"), [(captioner, "captioner"), (llava, "chat")])
def test_the_next_export_traces_nothing_and_writes_the_same_files(
    make: Callable[[Path], Exported], layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(tmp_path)
    said: list[str] = []

    def export(**options: Any) -> dict[str, str]:
        said.clear()
        options |= {"wanted": parse(["fp16", "q8"], "dtypes"), "layout": layout}
        pipeline.run_export(made.recipe, made.work, lambda what, done, total: said.append(what), **options)
        return contents(made.work.repo)

    first = export()
    names = [component.name for component in GraphCache(open_checkpoint(made.work.merged), layout).components]
    assert [line for line in said if "trac" in line] == [f"tracing {name}" for name in names]
    with monkeypatch.context() as patch:
        patch.setattr(skeleton, "make_skeleton", never)
        assert export() == first
        assert [line for line in said if "trac" in line] == [f"{name} as traced before" for name in names]
        with pytest.raises(AssertionError, match="traced"):
            export(retrace=True)
    if layout == "captioner":
        assert export(retrace=True) == first
    assert made.verify("ort").verdict == "pass"


def test_tracing_that_left_a_mark_would_be_seen(merged: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """`conftest.py` watches every trace that any test makes."""
    make = skeleton.make_skeleton

    def marking(component: Component, model: Any, **options: Any) -> Any:
        change_attribute(model)
        return make(component, model, **options)

    monkeypatch.setattr(skeleton, "make_skeleton", marking)
    cache = GraphCache(merged, "components")
    with pytest.raises(AssertionError, match="tracing projection left a mark on the model"):
        cache.trace(projection(cache))


def test_what_only_tracing_needs_is_not_imported(tmp_path: Path) -> None:
    made = captioner(tmp_path)
    made.export()
    assert all(name in sys.modules for name in ONLY_TRACING)
    arguments = [str(made.recipe.path), "--work", str(made.work.root)]
    command = [sys.executable, "-c", _EXPORT, " ".join(ONLY_TRACING), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_skeletons_hold_no_weights(merged: Checkpoint, tmp_path: Path) -> None:
    """Another checkpoint of the architecture finds them, wherever it says that it came from."""
    other = checkpoint(tmp_path, pico.config() | {"_name_or_path": "org/other", "transformers_version": "4.0"}, seed=1)
    assert key(other) == key(merged)


@pytest.mark.parametrize(
    "settings",
    [
        pico.config(tied=False),
        pico.config(projection="mlp"),
        pico.config(layers=3),
        pico.config() | {"text_config": pico.config()["text_config"] | {"rms_norm_eps": 1e-4}},
        pico.config() | {"vision_config": pico.config()["vision_config"] | {"hidden_act": "gelu"}},
        pico.config() | {"anything": "that a family may read"},
    ],
    ids=["untied", "mlp", "layers", "epsilon", "activation", "unknown"],
)
def test_another_config_is_another_key(settings: dict[str, Any], merged: Checkpoint, tmp_path: Path) -> None:
    assert key(checkpoint(tmp_path, settings)) != key(merged)


def test_every_component_of_every_layout_has_its_key(merged: Checkpoint) -> None:
    sizes = [("captioner", 2), ("chat", 3), ("components", 5)]
    keys = [key(merged, layout, index) for layout, size in sizes for index in range(size)]
    assert len(set(keys)) == len(keys)


def test_what_a_component_declares_is_in_its_key(merged: Checkpoint) -> None:
    cache = GraphCache(merged, "captioner")
    decoder = cache.components[1]
    assert decoder.front_end is not None
    more = TensorSpec("more", "float32", ("batch_size",))
    others = [
        decoder,
        replace(decoder, front_end=replace(decoder.front_end, text=decoder.front_end.text + " ")),
        *(replace(decoder, **{name: (more,)}) for name in ("inputs", "outputs", "traced_inputs")),
    ]
    assert len({cache.path(one) for one in others}) == len(others)


def untie(model: Any) -> None:
    head = model.language_model.lm_head
    head.weight = nn.Parameter(torch.empty_like(head.weight))


def change_buffer(model: Any) -> None:
    model.language_model.model.rotary_emb.inv_freq[0] += 1e-3


def change_buffer_type(model: Any) -> None:
    rotary = model.language_model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.double()


def change_attribute(model: Any) -> None:
    model.language_model.model.layers[1].self_attn.scaling *= 2


def change_tensor(model: Any) -> None:
    model.language_model.table = torch.zeros(2)


def change_shape(model: Any) -> None:
    model.projection.projection = nn.Linear(24, 32, bias=False)


def change_class(model: Any) -> None:
    model.vision_encoder.encoder.layers[0].mlp.activation_fn = nn.SiLU()


def change_config(model: Any) -> None:
    model.language_model.config._attn_implementation = "eager"


CHANGES = (
    untie,
    change_buffer,
    change_buffer_type,
    change_attribute,
    change_tensor,
    change_shape,
    change_class,
    change_config,
)


def test_the_model_as_it_is_traced_is_in_the_key(merged: Checkpoint) -> None:
    descriptions = [describe(build_empty(merged))]
    assert describe(build_empty(merged)) == descriptions[0]
    for change in CHANGES:
        model = build_empty(merged)
        change(model)
        assert describe(model) not in descriptions, change.__name__
        descriptions.append(describe(model))


def test_the_packages_files_are_in_the_key(merged: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "vlm_export"
    shutil.copytree(graph_cache.PACKAGE, package, ignore=shutil.ignore_patterns("js", "node", "__pycache__"))
    monkeypatch.setattr(graph_cache, "PACKAGE", package)
    keys = [key(merged)]
    assert keys[0] == key(merged)
    rewrite = package / "graph" / "rewrites" / "gelu.py"
    rewrite.write_text(rewrite.read_text() + "\n")
    keys.append(key(merged))
    rewrite.rename(rewrite.with_name("gelus.py"))
    keys.append(key(merged))
    assert len(set(keys)) == 3


def test_the_models_own_code_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "__init__.py": "",
        "layers.py": "from torch import nn\nfrom odd_package.deep.turn import turn\nclass Layer(nn.Module): ...\n",
        "beside.py": "",
        "deep/__init__.py": "",
        "deep/turn.py": "def turn(): ...\n",
    }
    for name, text in files.items():
        (tmp_path / "odd_package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "odd_package" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    model = nn.Sequential(importlib.import_module("odd_package.layers").Layer())
    sources = graph_cache._sources(model)
    assert set(sources) == {f"odd_package/{name}" for name in files}
    digests = [files_digest(sources)]
    for path in sources.values():
        path.write_text(path.read_text() + "# edited\n")
        digests.append(files_digest(graph_cache._sources(model)))
    assert len(set(digests)) == len(digests)


def test_transformers_files_are_among_the_models_code(merged: Checkpoint) -> None:
    sources = graph_cache._sources(build_empty(merged))
    for name in ("models/llama/modeling_llama", "models/siglip/modeling_siglip", "masking_utils", "cache_utils"):
        assert f"transformers/{name}.py" in sources
    assert not [name for name in sources if name.startswith(("torch/", "vlm_export/"))]


@pytest.mark.parametrize("distribution", ["torch", "onnxsim", "timm"])
def test_versions_are_in_the_key(distribution: str, merged: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    before, version = key(merged), graph_cache._version
    newer = {distribution: "99"}
    monkeypatch.setattr(graph_cache, "_version", lambda name: newer.get(name, version(name)))
    assert key(merged) != before


SPOILT: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-1],
    "garbage": lambda content: bytes(len(content)),
    "one bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "report": lambda content: content.replace(b'"applied"', b'"skipped"'),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_file_is_traced_anew_and_replaced(how: str, merged: Checkpoint) -> None:
    cache = GraphCache(merged, "components")
    component = projection(cache)
    _, report = cache.trace(component)
    path = cache.path(component)
    whole = path.read_bytes()
    path.write_bytes(SPOILT[how](whole))
    assert path.read_bytes() != whole
    assert cache.find(component) is None
    cache.trace(component)
    assert path.read_bytes() == whole
    found = cache.find(component)
    assert found is not None and found[1] == report


def test_a_pipe_is_not_waited_for_and_replaced(merged: Checkpoint) -> None:
    cache = GraphCache(merged, "components")
    component = projection(cache)
    cache.path(component).parent.mkdir(parents=True, exist_ok=True)
    cache.path(component).unlink(missing_ok=True)
    os.mkfifo(cache.path(component))
    assert cache.find(component) is None
    cache.trace(component)
    assert cache.find(component) is not None


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = captioner(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLM_EXPORT_STRUCTURES", str(tmp_path / "file" / "below"))
    lines: list[str] = []
    pipeline.run_export(made.recipe, made.work, silent, notify=lines.append)
    assert lines == [f"warning: {tmp_path / 'file' / 'below'}: cannot keep what was traced: Not a directory"]
    assert made.verify("ort").verdict == "pass"


def test_nothing_else_is_swallowed(merged: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **options: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(skeleton, "make_skeleton", broken)
    cache = GraphCache(merged, "components")
    with pytest.raises(ZeroDivisionError):
        cache.trace(projection(cache))
    assert not graph_cache_folder().exists()


def test_what_onnxsim_did_not_see_is_not_kept(merged: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been short of time, or killed: the next export has another chance."""
    cache = GraphCache(merged, "components")
    component = projection(cache)
    with monkeypatch.context() as patch:
        patch.setattr(skeleton, "simplify", partial(simplify, seconds=0))
        _, report = cache.trace(component)
    assert report.onnxsim == "skipped: took more than 0 s"
    assert cache.find(component) is None
    assert cache.trace(component)[1].onnxsim == "applied"
    assert cache.find(component) is not None


def test_retrace_replaces_what_is_kept(merged: Checkpoint) -> None:
    cache = GraphCache(merged, "components")
    component = projection(cache)
    cache.trace(component)
    path = cache.path(component)
    os.utime(path, (0, 0))
    again = GraphCache(merged, "components", retrace=True)
    assert again.find(component) is None
    again.trace(component)
    assert path.stat().st_mtime > 0


def test_a_model_with_code_of_its_own_is_neither_kept_nor_found(merged: Checkpoint) -> None:
    trusted, plain = GraphCache(merged, "components", keep=False), GraphCache(merged, "components")
    trusted.trace(projection(trusted))
    assert not graph_cache_folder().exists()
    plain.trace(projection(plain))
    assert trusted.find(projection(trusted)) is None


def test_what_was_not_used_for_long_is_deleted(merged: Checkpoint) -> None:
    cache = GraphCache(merged, "components")
    _, component, *others = cache.components
    cache.trace(component)
    path = cache.path(component)
    used = path.with_name("used.structure")
    unused, foreign = path.with_name(".unfinished.structure"), path.with_name("notes.txt")
    now = time.time()
    for file, days in ((path, UNUSED_DAYS + 1), (used, UNUSED_DAYS - 1), (unused, UNUSED_DAYS + 1), (foreign, 999)):
        file.touch()
        os.utime(file, (now - days * 86400,) * 2)
    assert cache.find(component) is not None
    assert path.stat().st_mtime > now - 60, "a hit is a use"
    embed_tokens = next(one for one in others if one.name == "embed_tokens")
    cache.trace(embed_tokens)
    assert set(path.parent.iterdir()) == {path, used, foreign, cache.path(embed_tokens)}


def test_two_processes_at_once(merged: Checkpoint) -> None:
    command = [sys.executable, "-c", _TRACE, str(merged.path)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    cache = GraphCache(merged, "components")
    assert cache.find(projection(cache)) is not None
    assert list(graph_cache_folder().iterdir()) == [cache.path(projection(cache))]


def test_a_reader_never_sees_half_a_file(merged: Checkpoint) -> None:
    cache = GraphCache(merged, "components")
    component = projection(cache)
    cache.trace(component)
    path = cache.path(component)
    content = path.read_bytes()
    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write_bytes, path, content, shared=True) for _ in range(200)]
        while not all(writer.done() for writer in writers):
            found = cache.find(component)
            assert found is not None and isinstance(found[0], ir.Model)
    for writer in writers:
        writer.result()


def test_retrace_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = captioner(tmp_path)
    made.export()
    monkeypatch.setattr(skeleton, "make_skeleton", never)
    arguments = ["onnx", str(made.recipe.path), "--work", str(made.work.root)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert str(CliRunner().invoke(main, [*arguments, "--retrace"]).exception) == "traced"
