"""Blocks of code of the pages for users: README.md, docs/, and those beside them."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
OTHERS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "vlm_export/js/README.md")]
PAGES = [*DOCS, *OTHERS, *(ROOT / name / "README.md" for name in ("examples", "recipes/real-captioner"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^\n|\A)((?:^    .*\n|^\n)+)", re.MULTILINE)


@dataclass(frozen=True)
class Snippet:
    """A block of code of a page; `language` is empty where the page says none."""

    page: Path
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text.strip().splitlines()[0]}"


def prose_and_code(page: Path) -> tuple[str, list[Snippet]]:
    """The page without its blocks of code, and those."""
    text = page.read_text(encoding="utf-8")
    found = [Snippet(page, language, textwrap.dedent(code)) for _, language, code in FENCE.findall(text)]
    text = FENCE.sub("", text)
    found += [Snippet(page, "", textwrap.dedent(code)) for code in _INDENTED.findall(text) if code.strip()]
    return text, found
