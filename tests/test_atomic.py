"""Results appear whole or not at all: whatever is in their way, whoever is at work, wherever a run is killed."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vlm_export import atomic, news
from vlm_export.atomic import alone, atomic_folder, changed_folder, new_folder, scratch_folder, write_text
from vlm_export.errors import InputError

PROCESSES = multiprocessing.get_context("fork")


def made(target: Path, text: str = "new") -> None:
    """A folder with two files of one text."""
    with atomic_folder(target) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(text)


def texts(folder: Path) -> set[str]:
    return {(folder / name).read_text() for name in ("a", "b")}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(act: Callable[[], None]) -> None:
    """A process that did this, in which it was killed."""
    process = PROCESSES.Process(target=act)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(params=["in one step", "in two steps"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a folder is replaced: as Linux can, and as every system can."""
    if request.param == "in two steps":
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    return str(request.param)


# What is in the way


def test_a_link_stays_and_its_folder_is_replaced(tmp_path: Path, swap: str) -> None:
    disk = tmp_path / "disk"
    made(disk / "repo", "old")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "repo").symlink_to("../disk/repo")
    for text in ("new", "newer"):
        made(tmp_path / "work" / "repo", text)
        assert (tmp_path / "work" / "repo").is_symlink() and texts(disk / "repo") == {text}
        assert names(tmp_path / "work") == names(disk) == ["repo"]


def test_a_link_to_a_folder_that_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "repo").symlink_to(tmp_path / "other")
    made(tmp_path / "repo")
    assert (tmp_path / "repo").is_symlink() and texts(tmp_path / "other") == {"new"}


@pytest.mark.parametrize("kind", ["a file", "a pipe", "a link to a file", "a link to nowhere", "a link to itself"])
def test_what_is_no_folder_is_told_before_the_work(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "repo"
    if kind == "a file":
        target.write_text("mine")
    elif kind == "a pipe":
        os.mkfifo(target)
    else:
        (tmp_path / "file").write_text("mine")
        target.symlink_to({"a link to a file": "file", "a link to nowhere": "no/where"}.get(kind, "repo"))
    before = names(tmp_path)
    for _ in range(2):
        with pytest.raises(InputError, match=rf"{target}: is .*(move it away|delete)"), atomic_folder(target):
            raise AssertionError("the work began")
        assert names(tmp_path) == before


def test_a_mounted_disk_is_told_before_the_work() -> None:
    with pytest.raises(InputError, match=r"^/: is where a disk is mounted"), atomic_folder(Path("/")):
        raise AssertionError("the work began")


@pytest.mark.parametrize("kind", ["a folder", "a link", "a file"])
def test_what_older_versions_left_does_not_stick(kind: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    made(tmp_path / "repo", "old")
    previous = tmp_path / ".repo-previous"
    {"a folder": previous.mkdir, "a link": lambda: previous.symlink_to("elsewhere"), "a file": previous.touch}[kind]()
    made(tmp_path / "repo")
    assert names(tmp_path) == ["elsewhere", "repo"] and texts(tmp_path / "repo") == {"new"}


def test_hidden_files_of_others_stay(tmp_path: Path) -> None:
    mine = [".repo-of-mine", ".repo", ".other-abcd1234", "repo-abcd1234", ".repo-abcd123"]
    for name in mine:
        (tmp_path / name).mkdir()
    made(tmp_path / "repo")
    assert names(tmp_path) == sorted([*mine, "repo"])


# Kills


def test_killed_while_it_is_made(tmp_path: Path) -> None:
    made(tmp_path / "repo", "old")

    def act() -> None:
        with atomic_folder(tmp_path / "repo") as folder:
            (folder / "a").write_text("half")
            die()

    killed(act)
    assert texts(tmp_path / "repo") == {"old"} and len(names(tmp_path)) == 3
    made(tmp_path / "repo")
    assert texts(tmp_path / "repo") == {"new"} and names(tmp_path) == ["repo"]


@pytest.mark.parametrize("step", ["rename", "rmtree"])
def test_killed_while_it_is_moved(step: str, tmp_path: Path, swap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the second of two renames nothing is at its place; the next run brings back what was there."""
    made(tmp_path / "repo", "old")

    def act() -> None:
        rename = Path.rename

        def last_rename(one: Path, other: Path) -> None:
            rename(one, other)
            die()

        monkeypatch.setattr(*((Path, "rename", last_rename) if step == "rename" else (atomic.shutil, "rmtree", die)))
        made(tmp_path / "repo")

    if swap == "in one step" and step == "rename":  # there is none
        act()
    else:
        killed(act)
    atomic.remove_left_overs(tmp_path / "repo")
    assert texts(tmp_path / "repo") == {"old" if swap == "in two steps" and step == "rename" else "new"}
    assert names(tmp_path) == ["repo"]


def test_killed_while_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "README.md", "old")

    def act() -> None:
        monkeypatch.setattr(os, "replace", die)
        write_text(tmp_path / "README.md", "new")

    killed(act)
    assert (tmp_path / "README.md").read_text() == "old"
    write_text(tmp_path / "README.md", "new")
    assert names(tmp_path) == ["README.md"] and (tmp_path / "README.md").read_text() == "new"


def test_scratch_of_killed_runs_is_removed_and_of_others_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "vlm-export-notes").mkdir()

    def act() -> None:
        with scratch_folder() as folder:
            (folder / "large").write_text("x")
            die()

    with scratch_folder() as alive:
        killed(act)
        assert len(names(tmp_path)) == 3
        with scratch_folder() as folder:
            assert names(folder) == [] and alive.is_dir() and len(names(tmp_path)) == 3
    assert names(tmp_path) == ["vlm-export-notes"]


# Others at work


@pytest.fixture
def at_work(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Another process that makes `repo`; the function lets it end."""
    began, end = PROCESSES.Event(), PROCESSES.Event()

    def act() -> None:
        with alone(tmp_path / ".lock", tmp_path), atomic_folder(tmp_path / "repo") as folder:
            (folder / "a").write_text("theirs")
            (folder / "b").write_text("theirs")
            began.set()
            end.wait(30)

    process = PROCESSES.Process(target=act)
    process.start()
    assert began.wait(30)
    yield end.set
    end.set()
    process.join(30)


def test_a_second_run_says_so_and_waits(tmp_path: Path, at_work: Callable[[], None]) -> None:
    told: list[str] = []

    def hear(line: str) -> None:
        told.append(line)
        assert any(name.startswith(".repo-") for name in names(tmp_path))
        at_work()

    with news.told_to(hear), alone(tmp_path / ".lock", tmp_path):
        assert texts(tmp_path / "repo") == {"theirs"}
    assert len(told) == 1 and told[0].startswith(f"{tmp_path}: another vlm-export, process ")
    assert names(tmp_path) == ["repo"]


def test_nothing_of_a_run_that_is_alive_is_removed(tmp_path: Path, at_work: Callable[[], None]) -> None:
    before = names(tmp_path)
    atomic.remove_left_overs(tmp_path / "repo")
    assert names(tmp_path) == before and len(before) == 3


def test_what_another_process_made_meanwhile_is_not_made_again(tmp_path: Path, at_work: Callable[[], None]) -> None:
    with news.told_to(lambda line: at_work()), new_folder(tmp_path / "repo") as folder:
        assert folder is None
    assert texts(tmp_path / "repo") == {"theirs"}


# Changes


def test_a_change_takes_effect_as_a_whole(tmp_path: Path, swap: str) -> None:
    made(tmp_path / "repo", "old")
    graph = (tmp_path / "repo" / "a").stat().st_ino
    with changed_folder(tmp_path / "repo") as folder:
        write_text(folder / "b", "new")
        assert texts(tmp_path / "repo") == {"old"}
    assert texts(tmp_path / "repo") == {"old", "new"} and (tmp_path / "repo" / "a").stat().st_ino == graph


def test_a_change_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    made(tmp_path / "repo", "old")
    with changed_folder(tmp_path / "repo") as folder:
        write_text(folder / "b", "new")
    assert texts(tmp_path / "repo") == {"old", "new"}


def test_a_change_without_hard_links_on_a_full_disk_names_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path, **_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))

    (tmp_path / "repo" / "onnx").mkdir(parents=True)
    made(tmp_path / "repo" / "onnx", "old")
    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(OSError) as raised, changed_folder(tmp_path / "repo"):
        pass
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename in {f"{tmp_path}/repo/onnx/{name}" for name in ("a", "b")}


def test_a_change_that_fails_changes_nothing(tmp_path: Path) -> None:
    made(tmp_path / "repo", "old")
    with (
        pytest.raises(InputError, match=rf"^{tmp_path}/repo/b: is wrong$"),
        changed_folder(tmp_path / "repo") as folder,
    ):
        write_text(folder / "a", "new")
        raise InputError(f"{folder / 'b'}: is wrong")
    assert texts(tmp_path / "repo") == {"old"} and names(tmp_path) == ["repo"]


# What the system refuses


@pytest.mark.parametrize("wrong", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_names_what_was_made(wrong: int, tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised, atomic_folder(tmp_path / "new" / "repo"):
        raise OSError(wrong, os.strerror(wrong))
    assert raised.value.filename == str(tmp_path / "new" / "repo") and names(tmp_path) == []


def test_an_error_about_a_file_names_the_file_as_it_will_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised, atomic_folder(tmp_path / "repo") as folder:
        (folder / "missing").read_text()
    assert raised.value.filename == str(tmp_path / "repo" / "missing")


def test_a_folder_in_the_way_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    with pytest.raises(OSError) as raised:
        write_text(tmp_path / "README.md", "new")
    assert raised.value.filename == str(tmp_path / "README.md") and names(tmp_path) == ["README.md"]


def test_a_file_in_place_of_the_work_folder(tmp_path: Path) -> None:
    (tmp_path / "work").touch()
    with pytest.raises(NotADirectoryError, match="move it away"), alone(tmp_path / "work" / ".lock", tmp_path / "work"):
        raise AssertionError("the work began")
