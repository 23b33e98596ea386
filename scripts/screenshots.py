"""Makes the pictures of docs/images in headless Chromium: the demo page, the report, the page of `serve`, a terminal.

python scripts/screenshots.py [FOLDER]

FOLDER is one in which `vlm-export convert` has run as docs/quick-start.md has it; without it that is done here first. A
picture that is larger than a page should load is an error.
"""

from __future__ import annotations

import html
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quick_start
from PIL import Image

from vlm_export.apps import demo_site
from vlm_export.files import Work
from vlm_export.web.chromium import WASM, drive
from vlm_export.web.site_server import ISOLATION, Site, SiteServer, files_under

IMAGES = quick_start.ROOT / "docs" / "images"
LARGEST_BYTES = 150_000
_COLOURS = 128
_TERMINAL = """<!doctype html><html lang="en"><meta charset="utf-8"><title>terminal</title><style>
body {{ margin: 0; background: #16181d; color: #d7dae0; font: 15px/1.45 ui-monospace, "DejaVu Sans Mono", monospace }}
pre {{ margin: 20px; white-space: pre-wrap }} b {{ color: #8fd48f }}
</style><pre>{text}</pre></html>"""


Served = AbstractContextManager[str]  # within, the page is at the address that it gives


@dataclass(frozen=True)
class Shot:
    """A picture: its name, what serves the page, the steps before it is taken, and the window's size in CSS pixels."""

    name: str
    served: Served
    steps: tuple[Sequence[Any], ...] = ()
    width: int = 1000
    height: int = 700


def main(folder: Path | None) -> None:
    """Make all of them."""
    IMAGES.mkdir(exist_ok=True)
    if folder is not None:
        return take(shots(folder))
    with tempfile.TemporaryDirectory(prefix="vlm-export-") as name:
        place = Path(name, "work")
        quick_start.prepare(place)
        for command in quick_start.COMMANDS[:2]:
            subprocess.run(shlex.split(command), cwd=place, check=True)
        take(shots(place))


def shots(place: Path) -> list[Shot]:
    """What is shown of a folder in which the quick start's `convert` has run."""
    work = Work(place / "build" / "my-captioner")
    choose = ["setInputFiles", "#file", str(place / "photos" / "00.png")]
    captioned = "return document.getElementById('status').textContent === 'Done'"
    demo = demo_site.build(work.repo, place / "golden" / "my-captioner")
    asked = "return /tokens in/.test(document.getElementById('note').textContent)"
    return [
        Shot("demo", site(demo), (choose, ["waitForFunction", captioned]), height=960),
        Shot("report", site(files_under({"/": work.report})), width=1300, height=760),
        Shot("serve", server(work.repo), (choose, ["click", "#ask"], ["waitForFunction", asked]), height=820),
        Shot("terminal", site({"index.html": terminal().encode()}), height=660),
    ]


@contextmanager
def site(files: Site) -> Iterator[str]:
    """Files, of which one is index.html."""
    with SiteServer(files, ISOLATION) as server:
        yield f"{server.url}/index.html"


@contextmanager
def server(repo: Path) -> Iterator[str]:
    """The page of `vlm-export serve`."""
    command = [sys.executable, "-m", "vlm_export", "serve", str(repo), "--port", "8000", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["page"]
        process.terminate()


def terminal() -> str:
    """The page of a terminal: what docs/quick-start.md says that `convert` prints, the table and what is next."""
    said = re.findall(r"```console\n(.*?)```", quick_start.PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = html.escape(said[1].strip()).splitlines()
    lines = [f"<b>{line}</b>" if line.startswith("$ ") else line for line in lines]
    return _TERMINAL.format(text="\n".join(lines))


def take(wanted: Sequence[Shot]) -> None:
    """Take the pictures. Raises SystemExit for one that is too large, or a page that asks another server."""
    for shot in wanted:
        path = IMAGES / f"{shot.name}.png"
        size = {"width": shot.width, "height": shot.height}
        save = ["screenshot", {"path": str(path), "animations": "disabled"}]
        with shot.served as url:
            seen = drive(url, [["setViewportSize", size], *shot.steps, save], WASM)
        if seen.foreign:
            raise SystemExit(f"{shot.name}: asks {seen.foreign[0]}")
        with Image.open(path) as picture:
            picture.convert("RGB").quantize(_COLOURS).save(path, optimize=True)
        print(json.dumps({"picture": str(path), "size_bytes": path.stat().st_size}))
        if path.stat().st_size > LARGEST_BYTES:
            raise SystemExit(f"{path}: {path.stat().st_size:,} bytes: make its window smaller")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else None)
