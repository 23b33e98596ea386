"""Checks all JavaScript: style by Biome, types by TypeScript. `--fix` mends what of the style can be mended.

The packages of `scripts/js/package-lock.json`, and those that the JavaScript imports, are installed once into the
user's cache. Exit status 1 when something is found, 2 when Node is missing or the packages cannot be installed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from vlm_export.errors import InputError
from vlm_export.web import chromium
from vlm_export.web.node_runtime import SCRIPTS, node_home

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "scripts" / "js"
PROJECT = "tsconfig.json"
CHECKED = ("benchmarks", "examples", "scripts/js", "tests/types", "vlm_export")
# What is put beside these files before they run, under the names by which they import it.
BESIDE = {
    "vlm_export/demo/transformers/transformers.min.d.ts": "@huggingface/transformers",
    "vlm_export/demo/vlm-export/index.d.ts": "../../js/index.js",
    "vlm_export/demo/vlm-export/src/contract.d.ts": "../../../js/src/contract.js",
    "vlm_export/demo/onnxruntime/ort.webgpu.min.d.mts": "onnxruntime-web",
    "node_modules/vlm-export/index.d.ts": "../../vlm_export/js/index.js",
    "node_modules/vlm-export/remote.d.ts": "../../vlm_export/js/remote.js",
    "node_modules/vlm-export/worker.d.ts": "../../vlm_export/js/worker.js",
    "benchmarks/js/index.d.ts": "../../vlm_export/js/index.js",
    "vlm_export/node/contract.d.mts": "../js/src/contract.js",
}


def main(arguments: list[str]) -> int:
    try:
        packages = [node_home(scripts, instead="") / "node_modules" for scripts in (TOOLS, SCRIPTS, chromium.SCRIPTS)]
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tools = packages[0]
    style = subprocess.run(
        ["node", tools / "@biomejs/biome/bin/biome", "check", "--error-on-warnings", *arguments], cwd=ROOT
    )
    with tempfile.TemporaryDirectory(prefix="vlm-export-js-") as folder:
        lay_out(Path(folder), packages)
        found = list(type_errors(Path(folder), tools))
    print("\n".join(found) if found else "Types: nothing found.")
    return 1 if style.returncode or found else 0


def lay_out(folder: Path, packages: list[Path]) -> None:
    """The sources at their paths, with all that they import. The packages that come first win."""
    (folder / PROJECT).symlink_to(TOOLS / PROJECT)
    for path in chain.from_iterable((ROOT / name).rglob("*.*") for name in CHECKED):
        if path.suffix in {".js", ".mjs", ".ts"}:
            link(folder / path.relative_to(ROOT), path)
    for name, module in BESIDE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"export * from '{module}';\n")
    for path in chain.from_iterable([*home.glob("[!.@]*"), *home.glob("@*/*")] for home in packages):
        name = f"{path.parent.name}/{path.name}" if path.parent.name.startswith("@") else path.name
        if not (folder / "node_modules" / name).exists():
            link(folder / "node_modules" / name, path)


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def type_errors(folder: Path, tools: Path) -> Iterator[str]:
    """What is wrong in our files. The packages' declarations have errors too; to skip those would be to skip ours."""
    command: list[str | Path] = ["node", tools / "typescript/bin/tsc", "--pretty", "false", "--project", PROJECT]
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
    ours = True
    for line in done.stdout.splitlines():
        if not line.startswith(" "):
            ours = not line.startswith("node_modules/")
        if ours:
            yield line
    if done.returncode and not done.stdout:
        yield f"tsc ended with exit status {done.returncode}: {done.stderr}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
