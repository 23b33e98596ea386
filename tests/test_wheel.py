"""The wheel holds all that the commands need: built, installed in an environment of its own, and used there.

The dependencies are those of the tests' environment, linked in; what is imported must be among the declared ones.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vlm_export.verify.golden import load_golden

ROOT = Path(__file__).parents[1]


def test_installed_wheel_works_in_an_environment_of_its_own(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT), cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    assert shipped(wheel, "vlm_export/js/") == expected_js()
    packages = {"package.json", "package-lock.json"}
    scripts = {"caption.mjs", "client.mjs", "onnxruntime-web.mjs", "prompts.mjs", "single.mjs"}
    assert shipped(wheel, "vlm_export/node/") == packages | scripts
    assert {"sweep-page.html", "sweep-page.css", "sweep-page.js"} <= shipped(wheel, "vlm_export/sweep/")
    assert shipped(wheel, "vlm_export/browser/") == packages | {"drive.mjs", "page.html", "page.mjs"}
    assert not shipped(wheel, "vlm_export/bundled/recipes/real-captioner/")
    venv.create(tmp_path / "env", with_pip=True)
    programs = tmp_path / "env" / "bin"
    [packages] = (tmp_path / "env" / "lib").glob("*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    run(str(programs / "pip"), "install", "--quiet", "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    command = str(programs / "vlm-export")
    assert "vlm_export/__init__.py" in run(str(programs / "python"), "-c", WHERE, cwd=tmp_path).removeprefix(
        str(packages)
    )
    assert "verify" in run(command, "--help", cwd=tmp_path)
    assert "shapes-captioner" in run(command, "recipes", cwd=tmp_path)
    golden = load_golden(ROOT / "golden" / "shapes-captioner")
    photo, caption = golden.image_paths()[0], golden.facts.images[0].caption
    assert run(command, "run", str(photo), cwd=tmp_path) == f"{caption}\n"  # with PyTorch: nothing is exported yet
    imported = {name for stage in ("merge", "onnx") for name in imports(programs, stage, cwd=tmp_path)}
    assert "torch" in imported
    assert imported - declared("vlm-export") <= OPTIONAL, "not among the dependencies in pyproject.toml"
    run(command, "onnx", "--quantize", "int8", cwd=tmp_path)
    verified = run(command, "verify", cwd=tmp_path)
    assert "\npass: " in verified
    [page] = [line.removeprefix("to look at: ") for line in verified.splitlines() if line.startswith("to look at: ")]
    assert caption in (tmp_path / page).read_text(encoding="utf-8")
    assert run(command, "run", "--backend", "onnx", str(photo), cwd=tmp_path) == f"{caption}\n"
    assert "written to site" in run(command, "demo", "--export", "site", cwd=tmp_path)
    assert {"app.js", "vlm-export"} <= {path.name for path in (tmp_path / "site").iterdir()}


OPTIONAL = {"sniffio"}  # which httpcore2 asks for its backend, if it is there
WHERE = "import vlm_export; print(vlm_export.__file__)"


def imports(programs: Path, *arguments: str, cwd: Path) -> set[str]:
    """The distributions of everything that a command imports."""
    command = [str(programs / "python"), "-X", "importtime", str(programs / "vlm-export"), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=True)
    modules = set(re.findall(r"^import time:.*\| +(\w+)", done.stderr, re.MULTILINE))
    known = packages_distributions()
    return {canonicalize_name(name) for module in modules for name in known.get(module, ())}


def declared(distribution: str) -> set[str]:
    """A distribution and all that it requires, however far, without extras."""
    found, waiting = set[str](), [distribution]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found:
            found.add(name)
            needed = (Requirement(line) for line in requires(name) or ())
            waiting += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def shipped(wheel: Path, folder: str) -> set[str]:
    return {name.removeprefix(folder) for name in ZipFile(wheel).namelist() if name.startswith(folder)}


def expected_js() -> set[str]:
    """The npm package as npm would pack it."""
    package = ROOT / "vlm_export" / "js"
    listed = json.loads((package / "package.json").read_text())["files"]
    files = {path for name in listed for path in (*package.glob(name), *(package / name).rglob("*")) if path.is_file()}
    return {str(path.relative_to(package)) for path in files} | {"package.json", "README.md", "LICENSE"}


def run(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(arguments, cwd=cwd, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
