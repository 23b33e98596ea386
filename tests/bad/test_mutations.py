"""The first of the random inputs that `scripts/reliability/mutations.py` runs thousands of; and what it would see."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bad import mutated
from bad.requests import served
from vlm_export.apps import serve
from vlm_export.errors import InputError
from vlm_export.runtime import Model
from vlm_export.start import inspection

INSPECT = next(entry for entry in mutated.ENTRIES if entry.command == mutated.case.INSPECT)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return served(tmp_path_factory.mktemp("served"))


def test_what_comes_of_them(made: dict[str, Path], model: Model, tmp_path: Path) -> None:
    found = [mutated.outcome(number, 1, made, model, tmp_path) for number in range(60)]
    assert [one for one in found if not one.fine] == []
    assert {one.what for one in found} == {"done", "refused"}
    assert [mutated.outcome(number, 1, made, model, tmp_path) for number in range(3)] == found[:3]


def wait(*_: object) -> None:
    time.sleep(30)


def write(*_: object) -> None:
    Path("left").touch()
    raise InputError("half-written")


FAULTS = {
    "traceback": lambda *_: {}["x"],
    "hang": wait,
    "growth": lambda *_: bytearray(10**12),
    "left something": write,
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_seen(what: str, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "inspect", FAULTS[what])
    monkeypatch.setattr(mutated, "_SECONDS", 1)
    monkeypatch.setattr(mutated, "ENTRIES", (INSPECT,))
    numbers = (number for number in range(100) if mutated.of_file(number, 0))
    seen = mutated.outcome(next(numbers), 0, made, None, tmp_path)
    assert seen.what == what, seen


def test_a_fault_of_the_server_is_seen(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "question", FAULTS["traceback"])
    numbers = (number for number in range(100) if not mutated.of_file(number, 0))
    found = {mutated.outcome(next(numbers), 0, {}, model, Path()).what for _ in range(20)}
    assert "traceback" in found or "failure" in found
