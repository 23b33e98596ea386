"""What an export will take: sizes as they come out, and refusals and warnings where disk or memory do not suffice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import onnx
import psutil
import pytest
from click.testing import CliRunner
from exported import Exported, prepare, silent

from vlm_export import machine, pipeline
from vlm_export.cli import main
from vlm_export.dtypes import DTYPES
from vlm_export.errors import InputError
from vlm_export.manifest import Manifest, load_manifest
from vlm_export.quantize.estimate import Estimate
from vlm_export.wanted import Goal, parse

DECODER = "decoder_model_merged"


class Told(NamedTuple):
    """What a user was told of an export."""

    manifest: Manifest
    expected: Estimate
    lines: list[str]


def export(made: Exported, *dtypes: str, memory_bytes: int | None = None, goal: Goal | None = None) -> Told:
    expected: list[Estimate] = []
    lines: list[str] = []
    manifest = pipeline.run_export(
        made.recipe,
        made.work,
        silent,
        wanted=parse(dtypes, "--quantize", goal),
        memory_bytes=memory_bytes,
        notify=lines.append,
        announce=expected.append,
    )
    return Told(manifest, expected[-1], lines)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return prepare(tmp_path_factory.mktemp("estimate"))


@pytest.fixture(scope="module")
def told(made: Exported) -> Told:
    return export(made, "all")


def test_sizes_are_those_of_the_files(told: Told) -> None:
    expected = {file.file: file.size_bytes for file in told.expected.files}
    found = {graph.file: graph.size_bytes for graph in told.manifest.graphs}
    assert expected.keys() == found.keys() and len(found) == 2 * len(DTYPES)
    for file, size in found.items():
        assert expected[file] == pytest.approx(size, rel=0.01), file


def test_external_data_is_counted(made: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = made.copy(tmp_path / "copy")
    small = {"inline_bytes": 0, "chunk_bytes": 20_000}
    monkeypatch.setattr("vlm_export.graph.graph_file.save_graph.__kwdefaults__", small)
    done = export(copy, "q4")
    assert all(graph.data_chunks for graph in done.manifest.graphs)
    assert done.expected.size_bytes == pytest.approx(sum(graph.size_bytes for graph in done.manifest.graphs), rel=0.05)


def test_what_is_calibrated_is_not_called_rounded(told: Told) -> None:
    assert not told.lines
    assert not any(graph.rounded for graph in told.manifest.graphs)
    assert told.expected.calibration_memory_bytes > told.expected.memory_bytes


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], None]]:
    """Plants how much there is of something."""
    yield lambda name, count: monkeypatch.setattr(pipeline, name, lambda *_: count)


def test_disk_at_the_boundary(made: Exported, told: Told, tmp_path: Path, limit: Callable[[str, int], None]) -> None:
    copy = made.copy(tmp_path / "copy")
    limit("free_disk", told.expected.disk_bytes)
    export(copy, "all")
    before = {path: path.stat().st_mtime_ns for path in copy.work.root.rglob("*")}
    limit("free_disk", told.expected.disk_bytes - 1)
    with pytest.raises(InputError) as refused:
        export(copy, "all")
    assert refused.value.exit_code == 2 and "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"{copy.work.root}: needs ")
    assert str(refused.value).endswith("are free: leave out fp16, or free some")
    assert {path: path.stat().st_mtime_ns for path in copy.work.root.rglob("*")} == before, "nothing was touched"


def test_disk_that_float32_alone_does_not_fit(made: Exported, limit: Callable[[str, int], None]) -> None:
    limit("free_disk", 1_000_000)
    with pytest.raises(InputError, match=r"needs 3\d MB of disk, and 1 MB are free: fp32 alone needs 3\d MB: "):
        export(made, "q8")


def test_without_memory_to_calibrate_it_rounds_and_says_so(
    made: Exported, told: Told, tmp_path: Path, limit: Callable[[str, int], None]
) -> None:
    copy = made.copy(tmp_path / "copy")
    enough = export(copy, "q4", "q8").expected.calibration_memory_bytes
    limit("available_memory", enough)
    assert not export(copy, "q4", "q8").lines
    calibrated = copy.graph(f"{DECODER}_q4").read_bytes()
    limit("available_memory", enough - 1)
    done = export(copy, "q4", "q8")
    [line] = done.lines
    assert line.startswith("q4: weights are rounded to the nearest, not calibrated on images: calibration needs 7")
    assert copy.graph(f"{DECODER}_q4").read_bytes() != calibrated
    assert {graph.file for graph in load_manifest(copy.work.repo).graphs if graph.rounded} == {f"{DECODER}_q4.onnx"}
    assert done.manifest == load_manifest(copy.work.repo)
    assert done.expected.calibration_memory_bytes == 0
    assert "\n- q4: weights of few bits are rounded to the nearest, not " in (copy.work.repo / "README.md").read_text()
    copy.verify()
    assert "\n- q4: weights of few bits are rounded to the nearest, not " in (copy.work.repo / "README.md").read_text()


def test_a_budget_needs_calibration(made: Exported, told: Told) -> None:
    with pytest.raises(InputError, match=r"--quantize auto: calibration needs \d+ MB of memory, and there is \d+ MB"):
        export(made, "auto", goal=Goal(kl=0.1), memory_bytes=told.expected.calibration_memory_bytes - 1)


def test_without_memory_to_measure_float16_it_says_so(made: Exported, tmp_path: Path) -> None:
    copy = made.copy(tmp_path / "copy")
    need = export(copy, "fp16").expected.memory_bytes
    assert load_manifest(copy.work.repo).ranges
    [line] = export(copy, "fp16", memory_bytes=need).lines
    assert line.startswith("fp16: nothing is known of numbers that float16 cannot hold: it needs 7")
    assert not load_manifest(copy.work.repo).ranges


def test_without_memory_at_all_it_refuses(made: Exported) -> None:
    need = export(made, "q8").expected.memory_bytes
    export(made, "q8", memory_bytes=need)
    with pytest.raises(InputError, match=r"^needs 73\d MB of memory, and there is 73\d MB: "):
        export(made, "q8", memory_bytes=need - 1)


def test_a_plan_is_rounded_too(made: Exported, tmp_path: Path) -> None:
    copy = made.copy(tmp_path / "copy")
    least = export(copy, "auto", goal=Goal(kl=1e9)).expected.memory_bytes
    path = copy.work.repo / "quantization.yaml"
    path.write_text(path.read_text().replace("bits: 4", "bits: 8", 1))
    edited = pipeline.plans.load(path)
    pipeline.run_export(copy.recipe, copy.work, silent, wanted=parse(["q4"], ""), plan=edited, memory_bytes=least)
    assert pipeline.plans.load(path) == edited
    assert [graph.rounded for graph in load_manifest(copy.work.repo).graphs] == [False, False, False, True]
    nodes = onnx.load(copy.graph(f"{DECODER}_q4")).graph.node
    bits = [each.i for node in nodes if node.op_type == "MatMulNBits" for each in node.attribute if each.name == "bits"]
    assert sorted(bits, reverse=True)[:3] == [8, 8, 4]


def test_one_line_before_it_begins(made: Exported, told: Told) -> None:
    arguments = ["onnx", str(made.recipe.path), "--work", str(made.work.root), "--json", "--quantize", "q4"]
    done = CliRunner().invoke(main, [*arguments, "--memory", "734.2MB"])
    result = json.loads(done.stdout)
    line, rounded = sorted(done.stderr.splitlines(), reverse=True)
    assert re.fullmatch("writes 4 files, [01] MB; needs 734 MB of memory; about 1 minute", line)
    assert rounded.startswith("q4: weights are rounded to the nearest")
    sizes = {file["file"]: file["size_bytes"] for file in result["estimate"]["files"]}
    assert sizes == pytest.approx({graph["file"]: graph["size_bytes"] for graph in result["graphs"]}, abs=8)
    assert [graph["rounded"] for graph in result["graphs"]] == [False, False, False, True]


def test_a_limit_that_is_no_size(made: Exported) -> None:
    done = CliRunner().invoke(main, ["onnx", str(made.recipe.path), "--memory", "much"])
    assert done.exit_code == 2 and done.stderr == "error: --memory: 'much' is no size: write it like 115MB\n"


GIB = 1 << 30
GROUPS = {
    "v2": ("0::/a/b", "", ("memory.max", "memory.current"), "inactive_file"),
    "v1": ("4:memory:/a/b", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"),
}


@pytest.mark.parametrize("version", GROUPS)
@pytest.mark.parametrize("where", ["a/b", "a", "."])
def test_a_container_has_what_its_groups_leave(
    where: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, controller, names, files = GROUPS[version]
    group = tmp_path / "groups" / controller / where
    (tmp_path / "groups" / controller / "a" / "b").mkdir(parents=True)
    for name, value in zip(names, (4 * GIB, 3 * GIB), strict=True):
        (group / name).write_text(f"{value}\n")
    (group / "memory.stat").write_text(f"anon 5\n{files} {GIB // 2}\n")
    (tmp_path / "own").write_text(f"8:pids:/x\n{line}\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    assert machine.available_memory() == pytest.approx(1.5 * GIB + psutil.Process().memory_info().rss, rel=0.02)
    (group / names[0]).write_text("max\n" if version == "v2" else f"{2**63 - 4096}\n")
    assert machine.available_memory() > 64 * GIB, "no limit of its own"


def test_where_there_are_no_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "none")
    assert 0 < machine.available_memory() <= psutil.virtual_memory().total + psutil.Process().memory_info().rss


def test_an_estimate_is_json(told: Told) -> None:
    assert json.loads(json.dumps(asdict(told.expected)))["files"][0]["file"] == "encoder_model.onnx"
