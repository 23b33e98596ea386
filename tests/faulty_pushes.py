"""Pushes over a bad line, one after the other, to a Hub on the loopback interface; what it has afterwards is compared.

Each push is of a folder in which a few files are new, changed or gone since the last one: to main, to a branch or as a
pull request. A share of all requests meets a fault of `hub_faults.py`. What gives up is run again, as a user would.
Then every byte that the Hub has on its disk is compared with the folder, and its commits are counted.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hub_faults import RandomFaults, no_faults
from hub_server import TOKEN, HubServer, configure
from huggingface_hub import close_session
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from vlm_export.errors import VlmExportError
from vlm_export.hub import download, patience, push_folder
from vlm_export.news import told_to

REPO = "tester/soak"
PART_BYTES = 60_000  # larger files go in parts
# As the real ones are to each other, but in milliseconds.
WAITS = {
    "WAITING_SECONDS": 0.4,
    "FIRST_WAIT_SECONDS": 0.002,
    "LONGEST_WAIT_SECONDS": 0.05,
    "QUIET_SECONDS": 0.5,
    "ANSWER_SECONDS": 20.0,
}
_GRAPHS = ("onnx/a.onnx", "onnx/b.onnx", "onnx/b.onnx_data", "onnx/c_q8.onnx")
_NAMES = ("README.md", "config.json", "tokenizer.json", *_GRAPHS)
_RUNS = 20  # of one push, until it is told to have failed


@dataclass
class Figures:
    """What was done, and what went wrong in spite of it."""

    pushes: int = 0
    requests: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    run_again: int = 0
    waits_told: int = 0
    downloads: int = 0
    failed: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    token_shown: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """Everything that should not have been."""
        return [*self.failed, *self.differing, *self.twice, *self.token_shown]


def soak(place: Path, times: int, seed: int, share: float = 0.4) -> Figures:
    """Push `times` times, with faults in a share of the requests, in a folder that is empty."""
    figures, dice, files = Figures(), random.Random(seed), dict[str, bytes]()
    told, heard = list[str](), _Heard()
    with (
        pytest.MonkeyPatch.context() as patch,
        HubServer(place / "hub") as hub,
        told_to(told.append),
        heard,
    ):
        for name, value in WAITS.items():
            patch.setattr(patience, name, value)
        configure(patch, hub.url, place / "home", TOKEN)
        disable_progress_bars()
        hub.split_uploads(PART_BYTES)
        for number in range(times):
            _change(files, dice)
            target = dice.choices(("main", "branch", "pull request"), weights=(7, 2, 1))[0] if number else "main"
            _push(
                hub,
                _written(place / "folder", files),
                files,
                target,
                RandomFaults(seed * 10_007 + number, share),
                figures,
            )
            if number % 10 == 0:
                _download(hub, files if target == "main" else {}, place / f"cache {number}", patch, figures)
        enable_progress_bars()
        figures.requests = len(hub.requests)
        close_session()
    figures.waits_told = sum("waiting" in line for line in told)
    figures.token_shown = [line for line in [*told, *heard.lines, *figures.failed] if TOKEN in line]
    return figures


def _change(files: dict[str, bytes], dice: random.Random) -> None:
    """Make some files new, change some, and remove some."""
    for name in dice.sample(_NAMES, dice.randint(1, 4)):
        if name in files and name in _GRAPHS and dice.random() < 0.3:
            del files[name]
        elif name == "README.md":
            files[name] = f"---\nlicense: mit\n---\n# {dice.random()}\n".encode()
        else:
            files[name] = dice.randbytes(dice.choice((0, 1, 500, 5_000, 59_999, 60_000, 60_001, 200_000)))
    files.setdefault("config.json", b"{}")


def _written(folder: Path, files: dict[str, bytes]) -> Path:
    for path in folder.rglob("*.*"):
        path.unlink()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _push(
    hub: HubServer, folder: Path, files: dict[str, bytes], target: str, faults: RandomFaults, figures: Figures
) -> None:
    where = f"push {figures.pushes} to {target}"
    figures.pushes += 1
    store = hub.store
    before = dict(store.refs(REPO)) if store.exists(REPO) else {}
    if target == "pull request":
        faults.never("twice")  # a proxy that repeats the request that opens it opens two
    hub.faults = faults
    options = {"branch": {"revision": "next"}, "pull request": {"create_pr": True}}.get(target, {})
    message = f"Export {figures.pushes}" if target == "pull request" else "Export"
    for left in reversed(range(_RUNS)):
        try:
            done = push_folder(REPO, folder, message=message, **options)  # type: ignore[arg-type]
            break
        except VlmExportError as error:
            figures.run_again += 1
            if not left or "\n" in str(error):
                figures.failed.append(f"{where}: {error}")
                return
        finally:
            figures.faults.update(faults.counts)
            faults.counts.clear()
    hub.faults = no_faults
    refs = store.refs(REPO)
    held = store.commit(REPO, str(done.commit)).files
    found = {name: store.blob(file.etag).read_bytes() for name, file in held.items() if name != ".gitattributes"}
    kept = {name for name in found if name in files or name.startswith("onnx/")}  # others are left alone
    if {name: found[name] for name in kept} != files:
        figures.differing.append(f"{where}: the Hub has other files than were pushed")
    ref = {"main": "main", "branch": "next"}.get(target)
    started = before.get(ref or "main", before.get("main", ""))
    commits = [sha for sha, _ in store.history(REPO, str(done.commit))]
    new = commits.index(started) if started in commits else len(commits) - 1
    opened = len(refs.keys() - before.keys() - {"main", "next"})
    if new > 1 or opened > (target == "pull request"):
        figures.twice.append(f"{where}: {new} commits, {opened} pull requests")


def _download(
    hub: HubServer, files: dict[str, bytes], cache: Path, patch: pytest.MonkeyPatch, figures: Figures
) -> None:
    """Fetch what main has, with faults, into a cache that is empty."""
    if not files:
        return
    configure(patch, hub.url, cache, TOKEN)
    faults = hub.faults = RandomFaults(figures.pushes, 0.2)
    faults.never("answer cut", "answer lost")  # huggingface_hub waits for a second after each
    figures.downloads += 1
    for left in reversed(range(_RUNS)):
        try:
            folder = download(REPO, allow_patterns=["*"])
            break
        except VlmExportError as error:
            figures.run_again += 1
            if not left:
                figures.failed.append(f"download {figures.downloads}: {error}")
                return
    hub.faults = no_faults
    figures.faults.update(faults.counts)
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if files.items() - found.items():
        figures.differing.append(f"download {figures.downloads}: other files than the Hub has")


class _Heard(logging.Handler):
    """All that is logged, at any level."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> _Heard:
        self._root = logging.getLogger()
        self._level = self._root.level
        self._root.addHandler(self)
        self._root.setLevel(logging.DEBUG)
        return self

    def __exit__(self, *_: object) -> None:
        self._root.removeHandler(self)
        self._root.setLevel(self._level)
