"""Writes into docs/quick-start.md what the commands of its walk print, by running them.

python scripts/quick_start.py

They run in a folder of their own, on the checkpoint and the pictures of the bundled captioner; the Hub is the tests',
on the loopback interface. It takes two minutes.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "quick-start.md"
sys.path.insert(0, str(ROOT / "tests"))

from hub_server import TOKEN, HubServer, environment  # noqa: E402

REPO = "acme/my-captioner"
SHOWN = "you/my-captioner"  # in place of a name that the tests' Hub lets us write to
COMMANDS = (
    f"vlm-export init my-captioner --images photos --license apache-2.0 --repo-id {REPO}",
    "vlm-export convert",
    f"vlm-export push {REPO}",
)
_COLUMNS = 100
_PROGRESS = re.compile(r"\w+: .* \(\d+ of \d+\).*")  # a terminal shows it in one line that goes
_PLACE = re.compile(r"(<!-- transcript -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Run the commands, and write the page."""
    blocks = "\n".join(f"```console\n{said}\n```\n" for said in walk())
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(_PLACE.sub(lambda found: f"{found[1]}{blocks}{found[2]}", page), encoding="utf-8")


def walk() -> list[str]:
    """Run the commands in a new folder; returns what a terminal shows of each."""
    with tempfile.TemporaryDirectory(prefix="vlm-export-") as folder:
        place = Path(folder, "work")
        prepare(place)
        with HubServer(Path(folder, "hub")) as hub:
            environ = os.environ | environment(hub.url, Path(folder, "home"), TOKEN) | {"COLUMNS": str(_COLUMNS)}
            said = [transcript(command, place, environ) for command in COMMANDS]
    return [text.replace(hub.url, "https://huggingface.co").replace(REPO, SHOWN) for text in said]


def prepare(place: Path) -> None:
    """Make the folder that a user begins in: a checkpoint, and pictures."""
    shutil.copytree(ROOT / "recipes" / "shapes-captioner" / "checkpoint", place / "my-captioner")
    shutil.copytree(ROOT / "golden" / "shapes-captioner" / "images", place / "photos")


def transcript(command: str, place: Path, environ: Mapping[str, str]) -> str:
    """A command and what it prints, in the order in which a terminal shows it."""
    done = subprocess.run(
        shlex.split(command), cwd=place, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{command}: {done.stdout}")
    lines = [line.rstrip() for line in done.stdout.rstrip().splitlines() if not _PROGRESS.fullmatch(line)]
    return "\n".join([f"$ {command}", *lines])


if __name__ == "__main__":
    main()
