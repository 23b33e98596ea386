"""Which part of the package imports which: what `make check` says, and that it says so."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(folder)})


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its contracts, where an import can be planted."""
    shutil.copytree(ROOT / "vlm_export", tmp_path / "vlm_export", ignore=shutil.ignore_patterns("*.js", "__pycache__"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    return tmp_path


def test_no_import_runs_up_and_there_is_no_circle(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout


PLANTED = {
    "a family imports a stage": ("families/llava.py", "from vlm_export.merging import merge", "No import runs up"),
    "lazily": ("runtime/text.py", "def late():\n    import vlm_export.apps.load", "No import runs up"),
    "one quantizes, one merges": ("quantize/folded.py", "from vlm_export.merging import low_rank", "No import runs up"),
    "a part of no layer": ("novelty.py", "", "No import runs up"),
    "a circle inside a part": ("graph/weights.py", "from vlm_export.graph import trace", "No circle"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_is_seen(planted: str, copy: Path) -> None:
    name, line, contract = PLANTED[planted]
    with (copy / "vlm_export" / name).open("a") as file:
        file.write(f"\n{line}\n")
    done = lint(copy)
    assert done.returncode == 1
    assert f"{contract} BROKEN" in done.stdout
