"""Every row of the corpus is refused: exit status 2, one line that names the file and the key, nothing half-written."""

from __future__ import annotations

import os
import resource
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from bad import place as places
from bad.case import Case
from bad.corpus import CASES
from vlm_export.cli import main

LONGEST_LINE = 300
LONGEST_SECONDS = 20
MEMORY_BYTES = 2_000_000_000  # beyond what the process has


class Hangs(BaseException):
    """No command can catch it."""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The places that cases spoil copies of."""
    return {name: getattr(places, name)(tmp_path_factory.mktemp(name)) for name in ("captioner", "chat", "families")}


@contextmanager
def bounded() -> Iterator[None]:
    """Within, what waits, computes or allocates without end is stopped."""

    def stop(*_: object) -> None:
        raise Hangs

    held = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, held[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, held)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, and when it was written."""
    return {
        os.path.relpath(os.path.join(root, name), folder): (found.st_size, found.st_mtime_ns)
        for root, folders, files in os.walk(folder)
        for name in (*files, *folders)
        for found in [os.lstat(os.path.join(root, name))]
        if name in files or not os.listdir(os.path.join(root, name))
    }


@pytest.mark.parametrize("case", CASES, ids=[case.title for case in CASES])
def test_bad_input_is_one_line(
    case: Case, made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = places.copy(made[case.place], tmp_path_factory.mktemp("b") / "p")
    monkeypatch.setenv("BAD_OUTSIDE", str(folder.parent / "outside"))
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(folder)
    case.change.apply(Path(case.file))
    before = state(folder)
    begun = time.monotonic()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        with bounded():
            done = CliRunner().invoke(main, case.command.split(" "))
    taken = time.monotonic() - begun
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    said = done.stderr
    assert done.exit_code == 2, done.output
    assert "nobody's" not in done.output
    line, *others = said.splitlines()
    assert not others or line.startswith("Usage:"), said
    assert len(said.splitlines()[-1]) < LONGEST_LINE, said
    assert "Traceback" not in said
    for words in (case.named or "", case.said):
        assert words in said, said
    assert done.stdout == ""
    assert state(folder) == before
    assert not warned, [str(each.message) for each in warned]
    assert taken < LONGEST_SECONDS / 2, taken
