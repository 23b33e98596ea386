"""What is said of errors: templates that fit a line, and how a terminal shows them."""

from __future__ import annotations

import ast
import errno
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from vlm_export.cli import main
from vlm_export.cli.fitted import COLUMNS, fitted
from vlm_export.errors import VlmExportError, refused

PACKAGE = Path(__file__).parents[1] / "vlm_export"


def templates() -> Iterator[tuple[str, str]]:
    """Where an error of ours is made, and its message with one dot for each value."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds() and node.args:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", template(node.args[0])


def kinds() -> set[str]:
    """The names of the errors that the command line prints."""
    found, waiting = set(), [VlmExportError]
    while waiting:
        kind = waiting.pop()
        found.add(kind.__name__)
        waiting += kind.__subclasses__()
    return found


def template(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(template(part) for part in parts)
        case ast.BinOp(left=left, right=right):
            return template(left) + template(right)
    return "·"


def test_an_error_fits_a_line_but_for_its_values() -> None:
    found = dict(templates())
    assert len(found) > 250
    assert {where: text for where, text in found.items() if len(text.replace("·", "")) > COLUMNS} == {}


def test_a_command_is_never_broken() -> None:
    command = "`vlm-export golden my-captioner.yaml --work 'a folder of mine' --runtime ort --runtime node`"
    said = fitted(f"error: photos/0.png: gives other pixels than it gave: install that, or run {command}", 60)
    assert said.splitlines() == [
        "error: photos/0.png: gives other pixels than it gave:",
        "  install that, or run",
        f"  {command}",
    ]


def test_a_path_that_no_line_holds_is_shortened_in_its_middle() -> None:
    path = "/" + "/".join(["somewhere"] * 12) + "/checkpoint/config.json:"
    first, second, *rest = fitted(f"error: {path} no `model_type`; is this a model folder?", 60).splitlines()
    assert (first, len(second)) == ("error:", 60)
    assert second.startswith("  /somewhere/") and "…" in second and second.endswith("/checkpoint/config.json:")
    assert rest == ["  no `model_type`; is this a model folder?"]


def test_what_fits_is_as_it_was() -> None:
    assert fitted("error: x.yaml: nam: no such key; did you mean name?", 80) == (
        "error: x.yaml: nam: no such key; did you mean name?"
    )


@pytest.mark.parametrize(("columns", "most"), [(60, 60), (80, 80), (300, COLUMNS)])
def test_a_terminal_gets_lines_of_its_width_and_a_pipe_one(columns: int, most: int, tmp_path: Path) -> None:
    wrong = "layuot: chat\nadaptors: []\ngoldens: {}\nhubs: {}\nbases: 1\n"
    (tmp_path / "x.yaml").write_text(f"name: x\nmodel: ./m\n{wrong}")
    command = [sys.executable, "-m", "vlm_export", "merge", "x.yaml"]
    environ = os.environ | {"COLUMNS": str(columns)}
    piped = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(command, cwd=tmp_path, env=environ, stderr=theirs, check=False)
        shown = os.read(ours, 10_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert (piped.returncode, done.returncode, piped.stderr.count("\n")) == (2, 2, 1)
    assert max(map(len, shown.splitlines())) <= most < len(piped.stderr)
    assert shown.split() == piped.stderr.split()


def commands(group: click.Group, *before: str) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*before, name)
        if isinstance(command, click.Group):
            yield from commands(command, *before, name)


@pytest.mark.parametrize("columns", [80, 100, 200])
@pytest.mark.parametrize("command", [(), *commands(main)], ids=" ".join)
def test_help_fits(command: tuple[str, ...], columns: int) -> None:
    said = CliRunner().invoke(main, [*command, "--help"], env={"COLUMNS": str(columns)}).stdout
    assert [line for line in said.splitlines() if len(line) > COLUMNS] == []
    if not command:
        assert CliRunner().invoke(main, [], env={"COLUMNS": str(columns)}).output == said


def test_where_a_copy_has_no_room_the_copy_is_named() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "from.png", None, "to.png")
    assert refused(full) == "to.png: No space left on device"
    gone = OSError(errno.ENOENT, os.strerror(errno.ENOENT), "from.png", None, "to.png")
    assert refused(gone) == "from.png: No such file or directory"
