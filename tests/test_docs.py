"""Pages for developers name what there is."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GENERATED = ("commands.md", "families.md")
PAGES = (
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.name not in GENERATED),
    *("CONTRIBUTING.md", "README.md", "benchmarks/README.md"),
)
FILE = re.compile(r"[\w./-]+\.(?:py|md|mjs|js|json|yaml|toml|safetensors)|[\w./-]+/")
SOURCES = ("vlm_export", "tests", "scripts", "benchmarks", "recipes", "Makefile", "pyproject.toml")


@cache
def written() -> set[str]:
    """Every word of the repository's own code and settings, but for this file."""
    places = [ROOT / name for name in SOURCES]
    files = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place])]
    code = {".py", ".js", ".mjs", ".ts", ".toml", ".yaml", ".json", ""}
    found: set[str] = set()
    for file in files:
        if file.is_file() and file.suffix in code and "node_modules" not in file.parts and file != Path(__file__):
            found.update(re.findall(r"\w+", file.read_text(encoding="utf-8")))
    return found


@cache
def members() -> dict[str, set[str]]:
    """What stands in each module and class of the package, by the last part of its name."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in (ROOT / "vlm_export").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found[file.stem].update(_names(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].update(_names(node))
    return found


def _names(scope: ast.Module | ast.ClassDef) -> Iterator[str]:
    for node in scope.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def is_there(span: str) -> bool:
    """Whether a span in backticks names what there is: files, a member of a module or class, words of the code."""
    return all(_is_there(part) for part in span.split()) and (not span.startswith("make ") or span in _commands())


def _is_there(part: str) -> bool:
    tops = {path.name for folder in (ROOT, ROOT / "vlm_export") for path in folder.iterdir()} - {"build", "golden"}
    if FILE.fullmatch(part):
        if Path(part).parts[0] in tops:
            return (ROOT / part).exists() or (ROOT / "vlm_export" / part).exists()
    elif (member := re.match(r"(\w+)\.(\w+)", part)) and member[1] in members():
        return member[2] in members()[member[1]]
    words = re.findall(r"[^\W\d]\w{2,}", re.sub(r"\w*<\w+>", "", part))
    return all(word in written() or (word[0] == "_" and _ends_a_word(word)) for word in words)


def _ends_a_word(ending: str) -> bool:
    return any(word.endswith(ending) for word in written())


def _commands() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return {f"make {target}" for target in re.findall(r"^([\w-]+):", makefile, re.MULTILINE)}


def missing(text: str) -> list[str]:
    """The spans in backticks that name what is not there."""
    return [span for span in re.findall(r"`([^`\n]+)`", text) if not is_there(span)]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "`" in text
    assert missing(text) == []


@pytest.mark.parametrize(
    "span",
    ["graph/tracer.py", "spec/rules/", "make coffee", "Family.preprocesor", "drivers.nobody_for", "no_such_name"],
)
def test_a_name_of_nothing_is_found(span: str) -> None:
    assert missing(f"Beside `Family.preprocessor` and `graph/trace.py` there is `{span}`.") == [span]


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
