"""Every row of the corpus is refused: exit status 2, one line that names the file and the key, nothing half-written."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner

from bad import place as places
from bad.case import Case
from bad.corpus import CASES
from bad.limits import LONGEST_LINE, LONGEST_SECONDS, bounded, state
from vlm_export.cli import main


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
