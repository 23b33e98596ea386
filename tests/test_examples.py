"""The examples, built and run as they stand beside the package that npm would publish: captions are PyTorch's.

None of them asks any server but its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from test_browser import WASM, Inputs, write_inputs
from test_demo_page import Step, ask, when
from test_js import PACKAGE, ROOT

from vlm_export.web import chromium
from vlm_export.web.chromium import drive
from vlm_export.web.node_runtime import node_home
from vlm_export.web.site_server import ISOLATION, SiteServer, files_under

EXAMPLES = ROOT / "examples"
BUNDLERS = Path(__file__).parent / "bundlers"
EXTENSION = Path(__file__).parent / "browser" / "extension.mjs"
BUILD = {"vite": ["vite", "build"], "extension": ["vite", "build"], "webpack": ["webpack"]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"), count=1)


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`node_modules` as npm would fill it: our package as it is packed, what it needs, and the bundlers."""
    folder = tmp_path_factory.mktemp("npm")
    command = ["npm", "pack", "--offline", "--json", "--pack-destination", str(folder), str(PACKAGE)]
    [made] = json.loads(subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout)
    with tarfile.open(folder / made["filename"]) as packed:
        packed.extractall(folder, filter="data")
    modules = folder / "node_modules"
    modules.mkdir()
    (folder / "package").rename(modules / "vlm-export")
    for home in (node_home(), node_home(BUNDLERS)):
        for package in (home / "node_modules").iterdir():
            if not package.name.startswith(".") and not (modules / package.name).exists():
                (modules / package.name).symlink_to(package)
    return modules


@pytest.fixture
def example(request: pytest.FixtureRequest, modules: Path, default_repo: Path, tmp_path: Path) -> Path:
    """A copy of the example that a test names, with its model and what it imports."""
    folder = Path(shutil.copytree(EXAMPLES / request.param, tmp_path / request.param))
    shutil.copytree(default_repo, folder / "public" / "models" / "model")
    (folder / "node_modules").symlink_to(modules)
    return folder


def built(example: Path) -> Path:
    """The folder that the example's bundler makes."""
    name, *arguments = BUILD[example.name]
    scripts = {"vite": "vite/bin/vite.js", "webpack": "webpack-cli/bin/cli.js"}
    command = ["node", "--preserve-symlinks-main", str(example / "node_modules" / scripts[name]), *arguments]
    done = subprocess.run(command, cwd=example, env=os.environ | {"CI": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return example / "dist"


def captioned(site: Path, image: Path) -> str:
    """What the example's page says of an image, and it asked nobody else."""
    steps: list[Step] = [
        when("!$('file').disabled"),
        ["setInputFiles", "#file", str(image)],
        when("!/^(Loading|Choose)|…$/.test($('caption').textContent)"),
        ask("$('caption').textContent"),
    ]
    with SiteServer(files_under({"/": site}), ISOLATION) as server:
        seen = drive(f"{server.url}/index.html", steps, WASM)
    assert [line for line in seen.console if line.startswith("error")] == seen.foreign == []
    return str(seen.answers[0])


@pytest.mark.browser
@pytest.mark.parametrize("example", ["plain"], indirect=True)
def test_a_plain_page(example: Path, modules: Path, inputs: Inputs) -> None:
    (example / "node_modules").unlink()
    (example / "public" / "models").rename(example / "models")
    shutil.copytree(modules / "vlm-export", example / "vlm-export")
    transformers = modules / "@huggingface" / "transformers" / "dist" / "transformers.min.js"
    for place, files in {
        "transformers": [transformers],
        "onnxruntime": sorted((modules / "onnxruntime-web" / "dist").glob("ort-wasm-simd-threaded.asyncify.*")),
    }.items():
        (example / place).mkdir()
        for file in files:
            shutil.copy(file, example / place)
    assert captioned(example, inputs.folder / inputs.images[0].file) == inputs.images[0].caption


@pytest.mark.browser
@pytest.mark.parametrize("example", ["vite", "webpack"], indirect=True)
def test_built_by(example: Path, inputs: Inputs) -> None:
    site = built(example)
    if not (site / "index.html").exists():  # webpack builds the script alone
        shutil.copy(example / "index.html", site)
        shutil.copytree(example / "public", site, dirs_exist_ok=True)
    assert captioned(site, inputs.folder / inputs.images[0].file) == inputs.images[0].caption


@pytest.mark.browser
@pytest.mark.parametrize("example", ["extension"], indirect=True)
def test_an_extension(example: Path, inputs: Inputs, tmp_path: Path) -> None:
    """Loaded unpacked, in Chromium, under the policy of its manifest."""
    site = built(example)
    shutil.copy(EXTENSION, tmp_path)
    (tmp_path / "node_modules").symlink_to(node_home(chromium.SCRIPTS) / "node_modules")
    image = inputs.folder / inputs.images[0].file
    command = ["node", str(tmp_path / EXTENSION.name), chromium.find_chromium(), str(site), str(image)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"caption": inputs.images[0].caption, "foreign": []}


def test_the_readmes_code_is_the_examples() -> None:
    """What it says of bundlers, import maps and workers; its other code is generation, which `test_js` has."""
    readme = (PACKAGE / "README.md").read_text(encoding="utf-8")
    part = readme[readme.index("## Where files come from") : readme.index("## Generating")]
    blocks = re.findall(r"^```\w+\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
    files = [path.read_text(encoding="utf-8") for path in EXAMPLES.rglob("*.*") if path.is_file()]
    assert len(blocks) == 6
    assert [block for block in blocks if not any(block in text for text in files)] == []


@pytest.mark.parametrize("example", ["node"], indirect=True)
def test_in_node(example: Path, default_repo: Path, inputs: Inputs) -> None:
    command = ["node", "caption.mjs", str(default_repo), str(inputs.folder / inputs.images[0].file)]
    done = subprocess.run(command, cwd=example, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{inputs.images[0].caption}\n"), done.stderr
