"""What a command tells to type next can be pasted: it names what the user named, `--work` and paths included."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pico
import pytest
from click.testing import CliRunner, Result
from exported import TOLERANCES, write_images
from yaml import safe_dump

from vlm_export.cli import main


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in a folder whose name a shell would split, seen from elsewhere."""
    folder = tmp_path / "my models"
    pico.write_checkpoint(folder / "checkpoint")
    write_images(folder / "images")
    values = {
        "name": "pico",
        "model": "checkpoint",
        "generation": {"max_new_tokens": 6},
        "golden": {"images": ["images/*.png"]},
        "tolerances": TOLERANCES,
        "hub": {"license": "apache-2.0"},
    }
    (folder / "pico.yaml").write_text(safe_dump(values))
    monkeypatch.chdir(tmp_path)
    return Path("my models/pico.yaml")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_each_command_leads_to_the_next(recipe: Path) -> None:
    """Only what was printed is typed, from the first command to the push."""
    typed, named = ["golden", str(recipe), "--work", "my work"], []
    while typed[0] != "push":
        done = run(*typed, *(["--runtime", "ort"] if typed[0] == "verify" else []))
        assert done.exit_code == 0, done.output
        [line] = [line for line in done.stdout.splitlines() if line.startswith("next: ")]
        program, *typed = shlex.split(line.removeprefix("next: "))
        assert program == "vlm-export"
        named.append(typed[0])
    assert named == ["merge", "onnx", "verify", "push"]
    dry = run(*typed, "--dry-run")
    assert dry.exit_code == 2 and "token" in dry.stderr


def test_errors_name_what_was_typed(recipe: Path) -> None:
    for command, missing in (("onnx", "merge"), ("verify", "onnx")):
        done = run(command, str(recipe), "--work", "my work")
        assert done.exit_code == 2
        [told] = re.findall(r"`(vlm-export .*?)`", done.stderr)
        assert shlex.split(told) == ["vlm-export", missing, str(recipe), "--work", "my work"]


def test_the_recipe_of_the_current_folder_needs_no_name(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    os.rename("pico.yaml", "vlm-export.yaml")
    done = run("golden")
    assert done.stdout.splitlines()[-1] == "next: vlm-export merge"


def test_quiet(recipe: Path) -> None:
    done = run("golden", str(recipe), "--quiet")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "next:" not in done.stdout and "written to" in done.stdout
    wrong = run("golden", "none.yaml", "-q")
    assert wrong.exit_code == 2 and wrong.stderr.startswith("error: none.yaml: no such recipe file")


@pytest.mark.parametrize("line", ["golden", "merge", "onnx", "verify"])
def test_what_is_missing_is_told_before_torch_is_imported(recipe: Path, line: str) -> None:
    shutil.rmtree(recipe.parent / "checkpoint")
    (recipe.parent / "checkpont").mkdir()
    script = f"""
import sys
from vlm_export.cli import main
try:
    main([{line!r}, {str(recipe)!r}])
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (2, "False"), done.stderr
    if line in ("golden", "merge"):
        meant = recipe.parent / "checkpont"
        assert done.stderr == f"error: {recipe}: model: no such folder: checkpoint; did you mean {meant}?\n"
