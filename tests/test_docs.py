"""Pages for developers name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("docs/architecture.md", "docs/adding-a-family.md", "CONTRIBUTING.md", "README.md", "benchmarks/README.md")
FILE = re.compile(r"[\w./-]+\.(?:py|md|mjs|js|json|yaml|toml)|[\w./-]+/")


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page: str) -> None:
    """A name in backticks that begins with a folder of the repository, or of the package, is a file or folder in it."""
    spans = re.findall(r"`([^`\n]+)`", (ROOT / page).read_text(encoding="utf-8"))
    tops = {path.name for folder in (ROOT, ROOT / "vlm_export") for path in folder.iterdir()} - {"build", "golden"}
    named = [span for span in spans if FILE.fullmatch(span) and Path(span).parts[0] in tops]
    assert named
    missing = [span for span in named if not (ROOT / span).exists() and not (ROOT / "vlm_export" / span).exists()]
    assert missing == []


def test_the_architecture_names_every_part_and_nothing_else() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [row for row in re.findall(r"^\| (.*?) \|", page, re.MULTILINE) if row.startswith("`")]
    named = {span.rstrip("/") for row in rows for span in re.findall(r"`([\w./]+)`", row)}
    package = {
        path.name
        for path in (ROOT / "vlm_export").iterdir()
        if (path.suffix == ".py" and not path.stem.startswith("__")) or (path / "__init__.py").is_file()
    }
    assert named == package


def test_the_layers_of_the_page_are_those_of_the_check() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [row for row in re.findall(r"^\| (.*?) \|", page, re.MULTILINE) if row.startswith("`")]
    ranks = {}
    lines = re.search(r"layers =\n((?: .*\n)+)", (ROOT / ".importlinter").read_text(encoding="utf-8"))
    assert lines
    for rank, line in enumerate(lines[1].split("\n")):
        ranks |= {name: rank for name in re.findall(r"\w+", line)}
    order = [ranks[Path(span.rstrip("/")).stem] for row in rows for span in re.findall(r"`([\w./]+)`", row)]
    assert order == sorted(order)
