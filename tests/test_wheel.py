"""The wheel holds all that the commands need: built, installed in an empty environment, and used there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

from vlm_export.golden import load_golden

ROOT = Path(__file__).parents[1]


def test_installed_wheel_works_in_an_empty_environment(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT), cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    assert shipped(wheel, "vlm_export/js/") == expected_js()
    assert not shipped(wheel, "vlm_export/bundled/recipes/real-captioner/")
    venv.create(tmp_path / "env", with_pip=True)
    programs = tmp_path / "env" / "bin"
    constraints = str(ROOT / "constraints.txt")
    run(str(programs / "pip"), "install", "--quiet", "--constraint", constraints, str(wheel), cwd=tmp_path)
    command = str(programs / "vlm-export")
    assert "verify" in run(command, "--help", cwd=tmp_path)
    assert "shapes-captioner" in run(command, "recipes", cwd=tmp_path)
    golden = load_golden(ROOT / "golden" / "shapes-captioner", "shapes-captioner")
    photo, caption = golden.image_paths()[0], golden.facts.images[0].caption
    assert run(command, "run", str(photo), cwd=tmp_path) == f"{caption}\n"  # with PyTorch: nothing is exported yet
    run(command, "merge", cwd=tmp_path)
    run(command, "onnx", "--quantize", "int8", cwd=tmp_path)
    assert run(command, "verify", cwd=tmp_path).splitlines()[-1].startswith("pass: ")
    assert run(command, "run", "--backend", "onnx", str(photo), cwd=tmp_path) == f"{caption}\n"
    assert "written to site" in run(command, "demo", "--export", "site", cwd=tmp_path)
    assert {"app.js", "vlm-export"} <= {path.name for path in (tmp_path / "site").iterdir()}


def shipped(wheel: Path, folder: str) -> set[str]:
    return {name.removeprefix(folder) for name in ZipFile(wheel).namelist() if name.startswith(folder)}


def expected_js() -> set[str]:
    """The npm package as npm would pack it."""
    package = ROOT / "vlm_export" / "js"
    listed = json.loads((package / "package.json").read_text())["files"]
    files = {path for name in listed for path in (package / name, *(package / name).rglob("*")) if path.is_file()}
    return {str(path.relative_to(package)) for path in files} | {"package.json", "README.md", "LICENSE"}


def run(*arguments: str, cwd: Path) -> str:
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(arguments, cwd=cwd, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
