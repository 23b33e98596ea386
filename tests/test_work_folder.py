"""A work folder whose parts lie elsewhere, on a disk that is full or cannot be written, or that another run is in."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from exported import Exported, prepare

from vlm_export import pipeline
from vlm_export.atomic import alone
from vlm_export.cli import main
from vlm_export.files import file_hashes

PROCESSES = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A pico captioner in float32, verified in ONNX Runtime."""
    exported = prepare(tmp_path_factory.mktemp("verified"))
    exported.export()
    assert exported.verify().verdict == "pass"
    return exported


@pytest.fixture
def place(verified: Exported, tmp_path: Path) -> Exported:
    """A copy that a test may spoil."""
    return verified.copy(tmp_path / "place")


def invoked(place: Exported, *arguments: str) -> tuple[int, str]:
    """The exit status of a command about a recipe, and what it said on stderr."""
    command, *options = arguments
    done = CliRunner().invoke(main, [command, str(place.recipe.path), "--work", str(place.work.root), *options])
    return done.exit_code, done.stderr.replace(str(place.recipe.path.parent), ".")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_every_part_may_be_a_link_to_another_disk(place: Exported) -> None:
    folder = place.recipe.path.parent
    parts = {name: place.work.root / name for name in ("merged", "repo", "report")}
    parts["golden"] = folder / "golden" / "pico"
    for name, part in parts.items():
        part.rename(folder / f"disk-{name}")
        part.symlink_to(folder / f"disk-{name}")
    for arguments in (("golden", "--again"), ("merge", "--again"), ("onnx", "--again"), ("verify", "--runtime", "ort")):
        assert invoked(place, *arguments)[0] == 0
    for name, part in parts.items():
        assert part.is_symlink() and (folder / f"disk-{name}").is_dir()
    assert names(place.work.root) == {"merged", "repo", "report", ".stages.json"}
    assert names(folder / "golden") == {"pico"} and not [name for name in names(folder) if name.startswith(".")]


@pytest.mark.parametrize(
    ("command", "part"), [("golden", "golden/pico"), ("merge", "work/merged"), ("onnx", "work/repo")]
)
def test_a_file_in_the_way_is_told_before_the_work(
    command: str, part: str, place: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in ("sources", "_merged"):
        monkeypatch.delattr(pipeline, work)
    path = place.recipe.path.parent / part
    shutil.rmtree(path)
    path.write_text("mine")
    status, said = invoked(place, command, "--again")
    assert (status, said) == (2, f"error: ./{part}: is no folder, and one belongs there: move it away or delete it\n")
    assert path.read_text() == "mine"


def with_full_disk(act: Callable[[], None], most_bytes: int) -> None:
    """In a process of its own, in which no file becomes larger: as on a disk that fills up while it is written."""

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        act()
        os._exit(0)

    process = PROCESSES.Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_verify_on_a_full_disk_leaves_what_was_there(place: Exported) -> None:
    before = file_hashes(place.work.root)

    of_repo = os.path.join(".", os.path.relpath(place.work.repo, place.recipe.path.parent), "")

    def verify() -> None:
        status, said = invoked(place, "verify", "--runtime", "ort", "--again")
        assert status == 2 and said.startswith(f"error: {of_repo}") and said.count("\n") == 1, said

    with_full_disk(verify, 1000)
    assert file_hashes(place.work.root) == before


@pytest.mark.parametrize(("command", "part"), [("golden", "golden/pico"), ("merge", "work/merged")])
def test_a_stage_on_a_full_disk_leaves_what_was_there(command: str, part: str, place: Exported) -> None:
    before = file_hashes(place.recipe.path.parent)

    def run() -> None:
        status, said = invoked(place, command, "--again")
        assert status == 2 and said.startswith(f"error: ./{part}") and said.count("\n") == 1, said

    with_full_disk(run, 3000)
    assert file_hashes(place.recipe.path.parent) == before


def test_figures_beside_a_damaged_report_are_not_written(place: Exported) -> None:
    report = place.work.report / "report.json"
    report.write_text(report.read_text()[:-100])
    before = file_hashes(place.work.root)
    status, said = invoked(place, "bench", "--card", "--runtime", "ort", "--rounds", "1", "--new-tokens", "2")
    assert status == 2 and "report.json" in said.splitlines()[-1]
    assert file_hashes(place.work.root) == before


def test_a_failed_golden_leaves_no_folder(place: Exported) -> None:
    shutil.rmtree(place.recipe.path.parent / "golden")
    (place.recipe.path.parent / "checkpoint" / "tokenizer.json").write_text("{}")
    assert invoked(place, "golden")[0] == 2
    assert not (place.recipe.path.parent / "golden").exists()


def test_a_second_command_waits_for_the_first(place: Exported) -> None:
    began, end = PROCESSES.Event(), PROCESSES.Event()

    def first() -> None:
        with alone(place.work.root / ".lock", place.work.root):
            began.set()
            end.wait(60)
        os._exit(0)

    def second() -> None:
        ran, skipped = invoked(place, "merge"), invoked(place, "merge")
        said.put([ran, skipped])

    holder = PROCESSES.Process(target=first)
    holder.start()
    assert began.wait(60)
    said = PROCESSES.Queue()
    waiting = PROCESSES.Process(target=second)
    waiting.start()
    waiting.join(1)
    assert waiting.is_alive() and said.empty()
    end.set()
    (ran, told), (again, skipped) = said.get(timeout=60)
    assert (ran, again) == (0, 0)
    assert "another vlm-export, process" in told and "waiting" in told and "skipped" in skipped
    waiting.join(60)
    holder.join(60)
