"""Writes docs/commands.md: every command with its arguments and options, as click knows them.

python scripts/docs_commands.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click

from vlm_export.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
HEAD = """# Commands

<!-- Written by `python scripts/docs_commands.py`: change the command's help, then run it. -->

Results are printed on stdout, progress and warnings on stderr. Exit status 0 is success, 1 a check that failed, 2
something that is wrong with what was given. `vlm-export COMMAND --help` says the same as this page.
"""
# Of every command; said once, below the heading of the page.
EVERYWHERE = {
    "--json": "Print one JSON object on stdout, for scripts.",
    "--quiet": "Only the result, warnings and errors: no progress, no notes.",
    "--debug": "Show the traceback of an error.",
    "--help": "Show the command's help.",
}


def page() -> str:
    """The whole page."""
    shared = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in EVERYWHERE.items())
    parts = [HEAD, f"| nearly every command takes | |\n|---|---|\n{shared}\n"]
    root = click.Context(main, info_name="vlm-export")
    for heading, commands in main.sections.items():
        parts.append(f"## {heading}\n")
        for command in commands:
            for context in contexts(command, root):
                parts += section(context)
    return "\n".join(parts)


def contexts(command: click.Command, parent: click.Context) -> Iterator[click.Context]:
    """A context for a command, and one for each command below it."""
    context = click.Context(command, info_name=command.name, parent=parent)
    yield context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from contexts(command.commands[name], context)


def section(context: click.Context) -> list[str]:
    """A command's heading, usage, help and options, as paragraphs."""
    command = context.command
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    parts = [f"### {context.command_path.removeprefix('vlm-export ')}\n", f"```text\n{usage}\n```\n"]
    parts += [paragraph(text) for text in inspect.cleandoc(command.help or "").split("\n\n")]
    rows = [row(option, context) for option in command.params if isinstance(option, click.Option)]
    rows = [each for each in rows if each]
    if rows:
        parts.append("\n".join(["| option | |", "|---|---|", *rows, ""]))
    return parts


def paragraph(text: str) -> str:
    """A paragraph of help: one that click does not wrap is code, and so is an example."""
    kept = text.removeprefix("\b\n")
    if kept == text and not text.startswith("Example:"):
        return escaped(" ".join(text.split())) + "\n"
    title = "Example:\n\n" if kept.startswith("Example:") else ""
    return f"{title}```text\n{inspect.cleandoc(kept.removeprefix('Example:'))}\n```\n"


def row(option: click.Option, context: click.Context) -> str:
    """An option's row; empty for those that every command has."""
    record = option.get_help_record(context)
    if record is None or EVERYWHERE.keys() & set(option.opts):
        return ""
    names, meaning = record
    if variable := option.envvar:
        meaning += f" [`{variable}`](environment.md)"
    names = names.replace("|", "\\|")
    return f"| `{names}` | {escaped(meaning)} |"


def escaped(text: str) -> str:
    """Text whose angle brackets, stars and bars are not Markdown's, but for what stands in backticks."""
    pieces = re.split(r"(`[^`]*`|\[`\w+`\]\(\S+\))", text)
    return "".join(piece if index % 2 else re.sub(r"([<>*|])", r"\\\1", piece) for index, piece in enumerate(pieces))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
