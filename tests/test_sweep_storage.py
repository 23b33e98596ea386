"""Where a sweep copies what is finished: what is whole there is not copied again, and what is not, is."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from vlm_export.errors import InputError
from vlm_export.sweep.storage import SUMS, Storage

FILES = {"repo/config.json": "{}", "repo/onnx/model.onnx": "weights", "report/report.json": "[]"}
URL = "memory://bucket/sweep"
PLACE = "/bucket/sweep/north/captioner"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def there() -> Iterator[fsspec.AbstractFileSystem]:
    """Object storage of this process, empty."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield memory
    memory.store.clear()


def stored(folder: Path, files: tuple[str, ...] = tuple(FILES)) -> list[str]:
    return Storage(URL).store(folder, files, "north/captioner")


def held(there: fsspec.AbstractFileSystem) -> dict[str, bytes]:
    return {path.removeprefix(f"{PLACE}/"): there.cat_file(path) for path in there.find(PLACE)}


def test_what_is_whole_there_is_not_copied_again(folder: Path, there: fsspec.AbstractFileSystem) -> None:
    assert (stored(folder), stored(folder)) == (sorted(FILES), [])
    found = held(there)
    sums = found.pop(SUMS).decode()
    assert found == {name: text.encode() for name, text in FILES.items()}
    assert [line.split("  ")[1] for line in sums.splitlines()] == sorted(FILES)


@pytest.mark.parametrize("lost", [*FILES, SUMS])
def test_what_is_lost_or_cut_there_is_copied_again(lost: str, folder: Path, there: fsspec.AbstractFileSystem) -> None:
    stored(folder)
    whole = held(there)
    there.rm_file(f"{PLACE}/{lost}")
    assert stored(folder) and held(there) == whole
    there.pipe_file(f"{PLACE}/{lost}", b"-")
    assert stored(folder) and held(there) == whole and not stored(folder)


def test_only_what_changed_is_sent_and_what_is_gone_is_deleted(
    folder: Path, there: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(folder)
    sent: list[str] = []
    put = type(there).put_file
    monkeypatch.setattr(type(there), "put_file", lambda files, *names: sent.append(names[1]) or put(files, *names))
    (folder / "repo/config.json").write_text('{"changed": 1}')
    assert stored(folder, ("repo/config.json", "repo/onnx/model.onnx"))
    assert sent == [f"{PLACE}/repo/config.json"]
    assert held(there).keys() == {"repo/config.json", "repo/onnx/model.onnx", SUMS}


def test_what_is_broken_off_has_no_sums_and_is_gone_on_with(
    folder: Path, there: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(folder)
    whole = held(there)
    for name in FILES:
        (folder / name).write_text("new")
    put = type(there).put_file

    def broken(files: fsspec.AbstractFileSystem, local: str, path: str) -> None:
        if path.endswith("model.onnx"):
            raise ConnectionResetError("reset by peer")
        put(files, local, path)

    with monkeypatch.context() as patch:
        patch.setattr(type(there), "put_file", broken)
        with pytest.raises(InputError, match=f"^{re.escape(URL)}: cannot be written: reset by peer$"):
            stored(folder)
    assert SUMS not in held(there)
    assert stored(folder) and held(there).keys() == whole.keys() and held(there)["repo/config.json"] == b"new"


def test_what_cannot_be_opened_or_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^nowhere://a/b: cannot be opened: Protocol not known: nowhere$"):
        Storage("nowhere://a/b")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"needs a package for it, which goes in by `pip install 'vlm-export\[s3\]'`"):
        Storage("s3://bucket/prefix")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/out: cannot be written: "):
        Storage(str(tmp_path / "file" / "out")).check()


def test_a_check_leaves_nothing(there: fsspec.AbstractFileSystem) -> None:
    Storage(URL).check()
    assert there.find("/") == []
