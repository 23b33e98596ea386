"""What the pages for users show works: links lead somewhere, commands parse, code compiles, recipes load."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import click
import pytest
import yaml
from documented import DOCS, FENCE, PAGES, ROOT, Snippet, prose_and_code

from vlm_export.cli import main
from vlm_export.dtypes import DTYPES
from vlm_export.recipe import load_recipe

sys.path.insert(0, str(ROOT / "scripts"))

import docs_commands
import docs_dtypes
import quick_start
import screenshots

_LINK = re.compile(r"\]\(([^)\s]+)\)")
# Placeholders of a usage line, which is no command that can be typed.
_USAGE = re.compile(r"\[(?:OPTIONS|ARGS|COMMAND)\]|\bREPO_ID$")


SNIPPETS = [snippet for page in PAGES for snippet in prose_and_code(page)[1]]


def commands(snippet: Snippet) -> Iterator[list[str]]:
    """The `vlm-export` lines of a block, each as its arguments."""
    if snippet.language not in ("", "text", "sh", "console"):
        return
    for line in snippet.text.replace("\\\n", " ").splitlines():
        for part in re.split(r" \| | && ", line.strip().removeprefix("$ ")):
            if part.startswith("vlm-export ") and not _USAGE.search(part):
                yield shlex.split(part, comments=True)[1:]


COMMANDS = [(str(snippet), arguments) for snippet in SNIPPETS for arguments in commands(snippet)]


def parsed(arguments: list[str]) -> str:
    """Parse a command line as the program does. Returns the name of its command; raises click's own errors."""
    command: click.Command = main
    context = None
    while isinstance(command, click.Group) and arguments:
        context = click.Context(command, info_name=command.name, parent=context)
        name, arguments = arguments[0], arguments[1:]
        if name.startswith("-"):
            break
        found = command.get_command(context, name)
        if found is None:
            raise click.UsageError(f"no command {name!r}")
        command = found
    command.make_context(command.name, list(arguments), parent=context)
    return str(command.name)


def test_there_is_something_to_test() -> None:
    assert len(COMMANDS) > 60
    assert {snippet.language for snippet in SNIPPETS} >= {"", "python", "js", "yaml", "console", "sh", "html"}


@pytest.mark.parametrize(("place", "arguments"), COMMANDS, ids=[" ".join(arguments) for _, arguments in COMMANDS])
def test_a_command_line_parses(place: str, arguments: list[str]) -> None:
    try:
        assert parsed(arguments)
    except click.exceptions.Exit as shown:  # --help
        assert shown.exit_code == 0


@pytest.mark.parametrize(
    "line", ["vlm-export onxx", "vlm-export onnx --quantise q8", "vlm-export verify --runtime gpu"]
)
def test_a_command_line_that_does_not_parse_is_found(line: str) -> None:
    [arguments] = commands(Snippet(ROOT / "README.md", "", f"    {line}  # so\n"))
    with pytest.raises(click.UsageError):
        parsed(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page, prose_and_code(page)[0]) == []


def broken(page: Path, text: str) -> list[str]:
    """The relative links of a page that lead nowhere: no such file, or no such heading in it."""
    wrong = []
    for link in _LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.is_relative_to(ROOT) or not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


def anchors(page: Path) -> set[str]:
    """Of the headings, as the site and code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


def test_a_link_that_leads_nowhere_is_found() -> None:
    page = ROOT / "docs" / "index.md"
    text = "[a](recipes.md#layouts) [b](recipe.md) [c](recipes.md#layout) [d](../../outside.md) [e](https://x.org)"
    assert broken(page, text) == ["recipe.md", "recipes.md#layout", "../../outside.md"]


def test_pages_of_the_site_link_to_pages_of_the_site() -> None:
    """Others are not in it: their files are named instead."""
    outside = [
        f"{page.name}: {link}"
        for page in DOCS
        for link in _LINK.findall(prose_and_code(page)[0])
        if link.startswith("..")
    ]
    assert outside == []


def test_the_navigation_has_every_page() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(_leaves(settings["nav"])) == [page.name for page in DOCS]


def _leaves(entries: list[dict[str, Any]]) -> Iterator[str]:
    for entry in entries:
        for value in entry.values():
            yield from _leaves(value) if isinstance(value, list) else [value]


def test_the_site_asks_nothing_of_other_servers() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert settings["theme"]["font"] is False
    assert not {"analytics", "consent", "social"} & set(settings["extra"])
    assert not {"extra_javascript", "extra_css", "repo_url", "edit_uri"} & set(settings)
    assert settings["plugins"] == ["search"]


@pytest.mark.parametrize("snippet", [each for each in SNIPPETS if each.language == "python"], ids=str)
def test_python_compiles_and_its_imports_are_there(snippet: Snippet) -> None:
    tree = ast.parse(snippet.text)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), str(snippet.page), "exec"), {})


@pytest.mark.node
@pytest.mark.parametrize("snippet", [each for each in SNIPPETS if each.language == "js"], ids=str)
def test_javascript_parses(snippet: Snippet, tmp_path: Path) -> None:
    """A block that begins with a key is a part of an object."""
    path = tmp_path / "snippet.mjs"
    text = f"({{{snippet.text}}});" if re.match(r"\w+: ", snippet.text) else snippet.text
    path.write_text(text, encoding="utf-8")
    done = subprocess.run(["node", "--check", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


RECIPES = [each for each in SNIPPETS if each.language == "yaml" and each.page.name != "sweeps.md"]


@pytest.mark.parametrize("snippet", RECIPES, ids=str)
def test_a_recipe_loads(snippet: Snippet, tmp_path: Path) -> None:
    """A block that has no name is a part of a recipe."""
    whole = "" if re.search(r"^name:", snippet.text, re.MULTILINE) else "name: a\nmodel: org/model\n"
    path = tmp_path / "recipe.yaml"
    path.write_text(whole + snippet.text, encoding="utf-8")
    assert load_recipe(path).recipe.model


def test_the_page_of_commands_is_what_click_says() -> None:
    written = docs_commands.PAGE.read_text(encoding="utf-8")
    assert written == docs_commands.page(), "docs/commands.md is out of date: run `python scripts/docs_commands.py`"


@pytest.mark.parametrize("page", docs_dtypes.PAGES, ids=lambda page: page.name)
def test_the_tables_of_dtypes_are_what_was_measured(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert text == docs_dtypes.written(text), f"{page.name} is out of date: run `python scripts/docs_dtypes.py`"


def test_a_measurement_is_of_dtypes_that_there_are() -> None:
    for name, table in docs_dtypes.measurements().items():
        assert DTYPES.keys() & table.rows.keys(), name
        for cells in table.rows.values():
            assert len(cells) == len(table.columns)


def test_the_quick_start_shows_the_commands_that_its_script_runs() -> None:
    shown = [
        line.removeprefix("$ ")
        for snippet in prose_and_code(quick_start.PAGE)[1]
        if snippet.language == "console"
        for line in snippet.text.splitlines()
        if line.startswith("$ ")
    ]
    assert shown == [command.replace(quick_start.REPO, quick_start.SHOWN) for command in quick_start.COMMANDS]


def test_pictures_are_those_of_the_script_and_small() -> None:
    pictures = sorted((ROOT / "docs" / "images").iterdir())
    source = Path(screenshots.__file__).read_text(encoding="utf-8")
    for picture in pictures:
        assert f'Shot("{picture.stem}"' in source, f"{picture.name} is not made by scripts/screenshots.py"
        assert picture.stat().st_size < screenshots.LARGEST_BYTES
        assert any(f"images/{picture.name})" in page.read_text(encoding="utf-8") for page in PAGES), picture.name


def test_every_environment_variable_has_its_row() -> None:
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    rows = "\n".join(row for row in page.splitlines() if row.startswith("|"))
    assert "VLM_EXPORT_WORK" in set(variables())
    assert [name for name in sorted(set(variables())) if f"`{name}`" not in rows] == []


def variables() -> Iterator[str]:
    """Names of the environment that the package reads or sets, in Python and in JavaScript."""
    for path in (ROOT / "vlm_export").rglob("*"):
        if {"node_modules", "test"} & set(path.parts):
            continue
        if path.suffix == ".py":
            yield from _of_python(path.read_text(encoding="utf-8"))
        if path.suffix in (".js", ".mjs"):
            yield from re.findall(r"process\.env\.([A-Z_]+)", path.read_text(encoding="utf-8"))


def _of_python(source: str) -> Iterator[str]:
    """Options' `envvar`, and every name in capitals of a module that uses `os.environ`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "envvar" and isinstance(node.value, ast.Constant):
            yield node.value.value
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "os.environ" in source:
            yield from re.findall(r"\A[A-Z]+(?:_[A-Z]+)+\Z|\ACHROMIUM\Z", node.value)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_line_for_a_shell_is_clicks(shell: str) -> None:
    page = (ROOT / "docs" / "completion.md").read_text(encoding="utf-8")
    assert f"_VLM_EXPORT_COMPLETE={shell}_source vlm-export" in page
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    assert kind(main, {}, "vlm-export", "_VLM_EXPORT_COMPLETE").source().strip()
    names = [item.value for item in kind(main, {}, "vlm-export", "_VLM_EXPORT_COMPLETE").get_completions([], "ver")]
    assert names == ["verify"]
