"""`vlm-export sweep`: the file, the cells, the order, one failure among others, and what is done not done again."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pico
import psutil
import pytest
import yaml
from click.testing import CliRunner, Result
from exported import TOLERANCES, write_images
from hub_server import TOKEN, HubServer, configure

from vlm_export import files, hub
from vlm_export.cli import main
from vlm_export.errors import InputError
from vlm_export.files import file_hashes
from vlm_export.recipe import load_recipe
from vlm_export.sweep import plan as plans
from vlm_export.sweep import stages
from vlm_export.sweep.cells import adapted
from vlm_export.sweep.jobs import Need, Outcome
from vlm_export.sweep.order import Order
from vlm_export.sweep.page import write_page
from vlm_export.sweep.results import CellResult, SweepResult, best, budgets
from vlm_export.sweep.sweep_file import load_sweep
from vlm_export.verify.report import DtypeRow
from vlm_export.web.chromium import WASM, drive
from vlm_export.web.site_server import ISOLATION, SiteServer, files_under

ADAPTERS = ("north", "south")
LAYOUTS = ("captioner", "single")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters of it, one that fits no model, a recipe and a sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    pico.write_checkpoint(folder / "base", lora=False)
    for seed, name in enumerate(ADAPTERS):
        pico.write_peft_adapter(folder / "adapters" / name, pico.config(), seed=seed + 1)
    pico.write_peft_adapter(folder / "adapters" / "torn", pico.config(layers=1))
    write_images(folder / "images")
    recipe = {
        "name": "pico",
        "model": "base",
        "generation": {"max_new_tokens": 4},
        "golden": {"images": ["images/*.png"]},
        "tolerances": TOLERANCES,
        "hub": {"license": "mit"},
    }
    (folder / "pico.yaml").write_text(yaml.safe_dump(recipe))
    write_sweep(folder / "sweep.yaml", adapters=["adapters"], dtypes=["q8"])
    return folder


@pytest.fixture
def own_graph_cache(_shared_graph_cache: Path) -> Path:
    """What is changed here is nothing that is traced."""
    return _shared_graph_cache


def write_sweep(path: Path, **values: Any) -> Path:
    given = {"name": "towns", "recipes": ["pico.yaml"], "runtimes": ["ort"], **values}
    path.write_text(yaml.safe_dump({key: value for key, value in given.items() if value is not None}))
    return path


def swept(folder: Path, *options: str, file: str = "sweep.yaml") -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return CliRunner().invoke(main, ["sweep", file, *options])


# The file


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"adaptors": ["a"]}, "adaptors: unknown key (did you mean 'adapters'?)"),
        ({"adapters": [{"pathh": "a"}]}, "adapters.0.pathh: unknown key (did you mean 'path'?)"),
        ({"recipes": []}, "recipes: tuple should have at least 1 item"),
        ({"recipes": None}, "recipes: field required"),
        ({"dtypes": ["q9"]}, "dtypes: no dtype 'q9'"),
        ({"layouts": ["caption"]}, "layouts.0: input should be 'captioner'"),
        ({"name": "../up"}, "name: '../up' names a folder"),
        ({"adapters": [{"path": "a", "author": "org"}]}, "adapters.0: write either a path or an author of the Hub"),
        ({"adapters": [{"path": "a", "search": "lora"}]}, "adapters.0.search: goes with author"),
        ({"adapters": [{"author": "org", "revision": "v1"}]}, "adapters.0.revision: goes with a path"),
        ({"bench": {"rounds": 0}}, "bench.rounds: input should be greater than or equal to 1"),
        ({"push": {"repo_id": "org/one"}}, "push.repo_id: 'org/one': write it like org/{name}-onnx"),
        (
            {"push": {"repo_id": "org/{name}"}, "layouts": ["captioner", "single"]},
            "push.repo_id: 'org/{name}': write it like org/{name}-{layout}-onnx",
        ),
        ({"output": "sftp://me:secret@there/repos"}, "output: holds a password: keep it in the environment"),
        ({"output": "hf://org/name"}, "output: the Hub has repos, not folders of them: write push: in its place"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = write_sweep(tmp_path / "s.yaml", **values)
    with pytest.raises(InputError, match=re.escape(f"{path}: {said}")):
        load_sweep(path)


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("name: a\nrecipes: [a.yaml]\nname: b\n")
    with pytest.raises(InputError, match="name: is there twice, in lines 1 and 3"):
        load_sweep(path)


def test_no_such_file(tmp_path: Path) -> None:
    done = swept(tmp_path)
    assert (done.exit_code, done.stderr) == (
        2,
        "error: sweep.yaml: no such sweep file; docs/sweeps.md has one to begin with\n",
    )


# The cells


@pytest.mark.parametrize(
    "adapters",
    [
        ["adapters"],
        ["adapters/*"],
        ["adapters/north", "adapters/south", "adapters/torn"],
        ["adapters/north", "adapters", "adapters/t*"],
    ],
)
def test_adapters_are_a_list_a_folder_or_a_pattern_and_each_is_taken_once(adapters: list[str], place: Path) -> None:
    found = adapted(load_sweep(write_sweep(place / "some.yaml", adapters=adapters)), place / "out")
    assert [(cell.name, cell.adapter) for cell in found] == [
        (f"pico-{name}", f"adapters/{name}") for name in (*ADAPTERS, "torn")
    ]


def test_names_are_as_long_as_tells_them_apart(place: Path, tmp_path: Path) -> None:
    for week in ("week-1", "week-2"):
        shutil.copytree(place / "adapters" / "north", tmp_path / week / "final")
    sweep = load_sweep(write_sweep(place / "weeks.yaml", adapters=[f"{tmp_path}/*/final"]))
    assert [cell.name for cell in adapted(sweep, place / "out")] == ["pico-week-1-final", "pico-week-2-final"]


def test_a_cell_is_a_recipe_that_the_ordinary_commands_take(place: Path, tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(place / "one.yaml", adapters=["adapters/south"], dtypes=["q8", "int8"]))
    [cell] = adapted(sweep, tmp_path / "out")
    cell.write()
    recipe = load_recipe(tmp_path / "out" / "pico-south" / "recipe.yaml")
    assert recipe.recipe == cell.recipe.recipe
    assert recipe.local(recipe.recipe.model) == (place / "base").resolve()
    assert recipe.local(recipe.recipe.adapters[0].path) == (place / "adapters" / "south").resolve()
    assert recipe.recipe.dtypes == ("q8", "int8")
    from vlm_export import ready

    assert [path.parent for path in ready.images(recipe)] == [(place / "images").resolve()] * 3


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"adapters": ["nowhere/at/all"]}, "some.yaml: adapters.0: no such folder: nowhere/at/all"),
        ({"adapters": ["images"]}, "some.yaml: adapters.0: no adapter_config.json in images, nor in a folder in it"),
        ({"adapters": ["adapters/*x"]}, "some.yaml: adapters.0: no adapter_config.json in adapters/*x"),
        ({"recipes": ["pico.yaml", "pico.yaml"]}, "some.yaml: two cells are called pico"),
        ({"recipes": ["other.yaml"]}, "other.yaml: no such recipe file"),
        ({"layouts": ["tasks"]}, "pico: prefix_conditioning_vlm has no layout 'tasks'"),
    ],
)
def test_what_a_plan_can_know_is_told_before_anything_is_done(values: dict[str, Any], said: str, place: Path) -> None:
    write_sweep(place / "some.yaml", **values)
    done = swept(place, "--work", "never", file="some.yaml")
    assert done.exit_code == 2 and said in done.stderr, done.stderr
    assert not (place / "never").exists()


def test_adapters_of_an_author_are_pinned(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer(tmp_path / "hub") as server:
        configure(monkeypatch, server.url, tmp_path / "home", TOKEN)
        for name in ("lora-2", "lora-1", "whole"):
            hub.push_folder(f"acme/{name}", place / "adapters" / "north", message="week")
        choice = {"author": "acme", "search": "lora"}
        cells = adapted(load_sweep(write_sweep(place / "hub.yaml", adapters=[choice])), place / "out")
        found = [(cell.name, cell.recipe.recipe.adapters[0]) for cell in cells]
        assert [(name, adapter.path) for name, adapter in found] == [
            ("pico-lora-1", "acme/lora-1"),
            ("pico-lora-2", "acme/lora-2"),
        ]
        assert all(re.fullmatch("[0-9a-f]{40}", str(adapter.revision)) for _, adapter in found)
        write_sweep(place / "hub.yaml", adapters=[{"author": "acme", "search": "nothing"}])
        with pytest.raises(InputError, match=r"adapters\.0: acme has no such repo on the Hub"):
            adapted(load_sweep(place / "hub.yaml"), place / "out")


def test_a_dry_run_tells_the_plan_and_writes_nothing(place: Path) -> None:
    done = swept(place, "--dry-run", "--work", "dry")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "towns: 3 adapted models, 3 repos, in dry:"
    assert [line.split()[:2] for line in lines[2:6]] == [[s, "3"] for s in ("golden", "merge", "onnx", "verify")]
    assert lines[6].startswith("in all under a minute of one core, and tracing once; ") and lines[7:] == [
        "nothing was done"
    ]
    assert not (place / "dry").exists()
    told = json.loads(swept(place, "--dry-run", "--json").stdout)
    assert [repo["cell"] for repo in told["repos"]] == ["pico-north", "pico-south", "pico-torn"]
    assert len(told["jobs"]) == 12 and all(job["memory_bytes"] > 700e6 for job in told["jobs"])


# What is shared


def test_layouts_share_one_merged_checkpoint(tmp_path: Path) -> None:
    merged, other = tmp_path / "captioner" / "merged", tmp_path / "components" / "merged"
    merged.mkdir(parents=True)
    (merged / "model.safetensors").write_text("weights")
    for _ in range(2):
        stages.link_folder(merged, other)
        assert (other / "model.safetensors").samefile(merged / "model.safetensors")
    (merged / "model.safetensors").unlink()
    (merged / "model.safetensors").write_text("merged anew")
    stages.link_folder(merged, other)
    assert (other / "model.safetensors").read_text() == "merged anew"


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("1")
    other.write_text("2")
    whole = files._read_sha256
    monkeypatch.setattr(files, "_read_sha256", lambda path: read.append(path) or whole(path))
    known: files.Digests = {}
    with files.digests_kept(known):
        first = files.sha256(one)
        assert (files.sha256(one), files.sha256(other)) == (first, whole(other))
    with files.digests_kept(known):
        assert files.sha256(one) == first and read == [one, other]
        other.replace(one)
        assert files.sha256(one) == whole(one) != first
    files.sha256(one)
    assert len(read) == 4  # outside nothing is kept


# The order


def jobs_of(place: Path, **values: Any) -> list[Any]:
    sweep = load_sweep(write_sweep(place / "order.yaml", adapters=["adapters"], **values))
    return list(plans.plan(sweep, place / "out", place / "graphs", 1, lambda line: None).jobs)


DONE, FAILED = Outcome("done"), Outcome("failed", "because")


def test_one_traces_for_all_that_share_an_architecture(place: Path) -> None:
    order = Order(jobs_of(place))
    begun = order.take(9)
    assert {job.stage for job in begun} == {"golden"} and len(begun) == 3
    for job in begun:
        order.end(job, DONE)
    for job in order.take(9):
        assert job.stage == "merge"
        order.end(job, DONE)
    [first] = order.take(9)
    assert first.stage == "onnx"
    assert order.take(9) == []
    assert [job.stage for job in order.end(first, FAILED)] == ["verify"]
    [second] = order.take(9)  # the next one traces
    order.end(second, DONE)
    assert sorted(job.stage for job in order.take(9)) == ["onnx", "verify"]


def test_a_failure_ends_all_layouts_of_its_cell_and_nothing_else(place: Path) -> None:
    order = Order(jobs_of(place, layouts=["captioner", "components"]))
    golden, *others = order.take(9)
    dropped = order.end(golden, FAILED)
    assert [(job.stage, job.layout) for job in dropped] == [
        ("merge", "captioner"),
        ("onnx", "captioner"),
        ("onnx", "components"),
        ("verify", "captioner"),
        ("verify", "components"),
    ]
    assert len(others) == 2 and order


def test_of_a_repo_that_fails_a_check_only_the_push_is_left_out(place: Path) -> None:
    push = {"repo_id": "org/{name}-onnx"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        order = Order([job for job in jobs_of(place, push=push, output="out") if job.cell == "pico-north"])
    for stage in ("golden", "merge", "onnx"):
        [job] = order.take(9)
        assert (job.stage, order.end(job, DONE)) == (stage, [])
    [verify] = order.take(9)
    assert [job.stage for job in order.end(verify, replace(DONE, failure="verify: 1 check failed"))] == ["push"]
    assert [job.stage for job in order.take(9)] == ["store"] and not order


def test_later_stages_come_first(place: Path) -> None:
    order = Order(jobs_of(place))
    [golden] = order.take(1)
    order.end(golden, DONE)
    [job] = order.take(1)
    assert (job.cell, job.stage) == (golden.cell, "merge")


# What a budget buys


def test_the_best_that_a_budget_buys() -> None:
    rows = [
        DtypeRow("q4", {}, 40_100_000, kl=0.01, top1=0.98, verdict="pass"),
        DtypeRow("int8", {}, 71_000_000, kl=0.0001, top1=1.0, verdict="pass"),
        DtypeRow("q8", {}, 71_500_000, kl=0.0002, top1=1.0, verdict="fail"),
        DtypeRow("fp32", {}, 280_000_000, top1=1.0, verdict="pass"),
    ]
    cell = CellResult("a", "a", "", "captioner", "a", "pass", table=rows)
    found = budgets(SweepResult("s", [cell], 0))
    assert found == [41_000_000, 71_000_000, 280_000_000]
    assert [choice.row and choice.row.dtype for choice in (best(cell, budget) for budget in (1, *found))] == [
        None,
        "q4",
        "int8",
        "fp32",
    ]


@pytest.mark.browser
def test_the_table_is_sorted_and_filtered_in_a_browser(tmp_path: Path) -> None:
    def cell(name: str, kl: float | None) -> CellResult:
        rows = [
            DtypeRow("int8", {}, 71_000_000, kl=kl, top1=0.99, verdict="pass"),
            DtypeRow("fp32", {}, 280_000_000, top1=1.0, verdict="pass"),
        ]
        return CellResult(name, "a", "", "captioner", name, "pass", table=rows if kl is not None else [])

    write_page(SweepResult("s", [cell("b", 0.2), cell("c", None), cell("a", 0.1)], 0), tmp_path)
    names = "[...document.querySelectorAll('tbody')[0].rows].filter((row) => !row.hidden)"
    shown = ["evaluate", f"{names}.map((row) => row.cells[0].textContent.trim() + row.cells[2].textContent.trim())"]
    kl = ["click", ".sortable th:nth-child(6) button"]
    wide = ["setViewportSize", {"width": 1300, "height": 800}]
    steps = [
        wide,
        shown,
        kl,
        shown,
        kl,
        shown,
        ["fill", "#budget", "100"],
        shown,
        ["fill", "#filter", "int8 0.2"],
        shown,
        ["fill", "#filter", ""],
        ["setViewportSize", {"width": 400, "height": 800}],
        ["selectOption", "#by", "repo"],
        shown,
        ["selectOption", "#by", ""],
        shown,
    ]
    with SiteServer(files_under({"/": tmp_path}), ISOLATION) as server:
        seen = drive(f"{server.url}/index.html", steps, WASM)
    assert seen.console == [] and seen.foreign == []
    assert seen.answers == [
        ["bint8", "bfp32", "c–", "aint8", "afp32"],
        ["bfp32", "afp32", "aint8", "bint8", "c–"],
        ["bint8", "aint8", "bfp32", "afp32", "c–"],
        ["bint8", "aint8", "c–"],
        ["bint8"],
        ["aint8", "bint8", "c–"],
        ["bint8", "c–", "aint8"],
    ]


# All of it


@pytest.fixture(scope="module")
def first(place: Path) -> Result:
    """Swept in this process; one adapter fits no model."""
    return swept(place, "--in-process")


def test_one_that_fails_stops_no_other(first: Result, place: Path) -> None:
    assert first.exit_code == 1, first.stderr
    assert "FAILED pico-torn captioner: " in first.stdout
    assert "2 of 3 repos pass every check" in first.stdout
    told = re.compile(
        r"^\[..../12\] pico-torn captioner: golden FAILED: .*; left out after it: merge, onnx, verify$", re.MULTILINE
    )
    assert told.search(re.sub(r"\[ *(\d+)/", lambda found: f"[{found[1]:>4}/", first.stderr)), first.stderr
    found = json.loads((place / "build" / "towns" / "sweep.json").read_text())
    assert {(cell["cell"], cell["status"]) for cell in found["cells"]} == {
        ("pico-north", "pass"),
        ("pico-south", "pass"),
        ("pico-torn", "failed"),
    }
    assert found["left"] == 0


def test_the_table_has_a_line_for_each_dtype_and_each_failure(first: Result, place: Path) -> None:
    rows = list(csv.DictReader((place / "build" / "towns" / "sweep.csv").read_text().splitlines()))
    assert [(row["cell"], row["layout"], row["dtype"], row["verdict"]) for row in rows] == [
        *((f"pico-{name}", "captioner", dtype, "pass") for name in ADAPTERS for dtype in ("q8", "fp32")),
        ("pico-torn", "captioner", "", "failed"),
    ]
    assert all(row["failure"] for row in rows if row["verdict"] == "failed")


def test_the_page_needs_nothing_from_elsewhere(first: Result, place: Path) -> None:
    page = (place / "build" / "towns" / "index.html").read_text()
    assert "<h1>Of 3 repos 2 pass every check, 1 came to no end.</h1>" in page
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page)
    linked = re.findall(r'href="([^"#d][^"]*)"', page)
    assert linked and all((place / "build" / "towns" / name).is_file() for name in linked)


def test_what_is_done_is_not_done_again(first: Result, place: Path) -> None:
    repos = place / "build" / "towns"
    before = file_hashes(repos / "pico-north" / "captioner" / "repo")
    again = swept(place, "--in-process")
    told = [line for line in again.stderr.splitlines() if line.startswith("[")]
    assert [re.sub(r"^\[ *\d+/12\] ", "", line).split(" FAILED")[0] for line in told] == ["pico-torn captioner: golden"]
    assert file_hashes(repos / "pico-north" / "captioner" / "repo") == before


def test_a_repo_is_what_convert_makes_of_its_recipe(first: Result, place: Path, tmp_path: Path) -> None:
    recipe = place / "build" / "towns" / "pico-south" / "recipe.yaml"
    done = CliRunner().invoke(main, ["convert", str(recipe), "--runtime", "ort", "--work", str(tmp_path / "work")])
    assert done.exit_code == 0, done.stderr
    assert file_hashes(tmp_path / "work" / "repo") == file_hashes(recipe.parent / "captioner" / "repo")


def test_a_full_disk_is_one_line_and_ends_its_cell_alone(
    first: Result, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_export.merging import merge

    write = merge.write_tensors

    def full(path: Path, entries: Any) -> None:
        if "pico-south" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, entries)

    monkeypatch.setattr(merge, "write_tensors", full)
    write_sweep(place / "full.yaml", adapters=["adapters/north", "adapters/south"])
    done = swept(place, "--in-process", "--work", str(tmp_path / "full"), file="full.yaml")
    assert done.exit_code == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert line.startswith("FAILED pico-south captioner: ") and line.endswith(": No space left on device")
    assert "1 of 2 repos pass every check" in done.stdout


def test_what_should_not_happen_is_told_and_its_traceback_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_export import pipeline

    monkeypatch.setattr(pipeline, "run_golden", lambda *_: {}["gone"])
    write_sweep(place / "torn.yaml", adapters=["adapters/north"])
    done = swept(place, "--in-process", "--work", str(tmp_path / "torn"), file="torn.yaml")
    assert done.exit_code == 1
    assert "golden: KeyError: 'gone' is missing: see " in done.stdout
    [kept] = (tmp_path / "torn").rglob("golden-failure.txt")
    assert "Traceback" in kept.read_text()


def test_ctrl_c_says_that_what_is_done_is_kept(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_export import pipeline

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_golden", stopped)
    write_sweep(place / "stopped.yaml", adapters=["adapters/north"])
    done = swept(place, "--in-process", "--work", str(tmp_path / "stopped"), file="stopped.yaml")
    assert done.exit_code == 1
    assert "what is done is kept; the same command goes on from there" in done.stderr


def test_both_layouts_of_an_adapter_are_measured_copied_and_pushed_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(
        place / "pushed.yaml",
        adapters=["adapters/north"],
        layouts=["captioner", "single"],
        dtypes=["fp32"],
        bench={"rounds": 1, "new_tokens": 4},
        output=str(tmp_path / "copied"),
        push={"repo_id": "acme/{name}-{layout}-onnx"},
    )
    with HubServer(tmp_path / "hub") as server:
        configure(monkeypatch, server.url, tmp_path / "home", TOKEN)
        options = ("--in-process", "--work", str(tmp_path / "out"))
        done = swept(place, *options, file="pushed.yaml")
        assert done.exit_code == 0, done.stdout + done.stderr
        told = re.findall(r"^\[[ \d]+/12\] pico-north (.*) done in", done.stderr, re.MULTILINE)
        each = [f"{layout}: {stage}" for layout in LAYOUTS for stage in ("onnx", "verify", "bench", "store", "push")]
        assert sorted(told) == sorted(["captioner: golden", "captioner: merge", *each])
        assert "onnx/encoder_model.onnx" in hub.list_files("acme/pico-north-captioner-onnx")
        assert "onnx/model.onnx" in hub.list_files("acme/pico-north-single-onnx")
        again = swept(place, *options, file="pushed.yaml")
        assert (again.exit_code, [line for line in again.stderr.splitlines() if line.startswith("[")]) == (0, [])
    cell, copied = tmp_path / "out" / "pico-north", tmp_path / "copied" / "pico-north"
    assert (cell / "single/merged/model.safetensors").samefile(cell / "captioner/merged/model.safetensors")
    for layout in LAYOUTS:
        sums = dict(line.split("  ")[::-1] for line in (copied / layout / "SHA256SUMS").read_text().splitlines())
        for part in ("repo", "report"):
            hashes = file_hashes(cell / layout / part)
            assert hashes and hashes == file_hashes(copied / layout / part)
            assert {f"{part}/{name}": digest for name, digest in hashes.items()}.items() <= sums.items()
    for name in ("sweep.json", "sweep.csv", "index.html"):
        assert (tmp_path / "copied" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    rows = list(csv.DictReader((tmp_path / "copied" / "sweep.csv").read_text().splitlines()))
    assert [row["layout"] for row in rows] == list(LAYOUTS)
    assert all(float(row["ort_tokens_per_second"]) > 0 and row["verdict"] == "pass" for row in rows)


# On Ray


def test_without_ray_the_error_says_what_to_install(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_export.sweep import on_ray

    monkeypatch.setattr(on_ray, "find_spec", lambda name: None)
    done = swept(place)
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == (
        "error: Ray is not installed: `pip install 'vlm-export[sweep]'`, or do without it by --in-process"
    )


def test_who_hands_jobs_over_loads_no_libraries() -> None:
    looked = "[name for name in ('torch', 'transformers', 'onnx') if name in sys.modules]"
    code = f"import sys, vlm_export.sweep.on_ray, vlm_export.sweep.sweep; print({looked})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_ray_makes_the_same_bytes_and_listens_to_this_machine_alone(first: Result, place: Path) -> None:
    from vlm_export.files import graph_cache_folder
    from vlm_export.sweep.on_ray import on_ray
    from vlm_export.sweep.sweep import sweep

    file = load_sweep(write_sweep(place / "ray.yaml", name="ray", adapters=["adapters/north"], dtypes=["q8"]))
    with on_ray(None, 1) as engine:
        [job, *_] = plans.plan(file, place / "ray", graph_cache_folder(), 1, lambda line: None).jobs
        engine.begin(replace(job, need=Need(10**15, 1.0)))
        _, outcome = engine.next()
        assert re.fullmatch(
            r"golden: needs 1000000\.0 GB of memory, and no node has more than [\d.]+ GB", str(outcome.failure)
        )
        begun = psutil.Process().children(recursive=True)
        listening = {c.laddr.ip for p in begun for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        assert listening and {socket.inet_pton(socket.AF_INET, ip.removeprefix("::ffff:"))[0] for ip in listening} == {
            127
        }
        found = sweep(
            plans.plan(file, place / "ray", graph_cache_folder(), 1, lambda line: None), engine, lambda line: None
        )
    assert found.passed, found.cells
    made, expected = place / "ray" / "pico-north", place / "build" / "towns" / "pico-north"
    assert file_hashes(made / "captioner" / "repo") == file_hashes(expected / "captioner" / "repo")
