"""Lines for a terminal: wrapped between words at its width, and never inside what will be pasted."""

from __future__ import annotations

import re
import shutil
import sys

COLUMNS = 100  # at most, however wide a terminal is: longer lines are hard to read
_INDENT = "  "
_NARROWEST = 40
# A command in backticks is one word, with what ends the sentence behind it.
_WORD = re.compile(r"`[^`]*`\S*|\S+")


def for_stderr(line: str) -> str:
    """A line as stderr shows it: fitted to a terminal, and one line where logs and pipes read it."""
    if not sys.stderr.isatty():
        return line
    return fitted(line, min(shutil.get_terminal_size().columns, COLUMNS))


def fitted(line: str, columns: int) -> str:
    """Wrap a line at `columns`, at least 40; what goes on is indented.

    A command stays whole, on a line of its own if it is long. Another word that no line would hold, such as the path of
    a file, is shortened in its middle.
    """
    columns = max(columns, _NARROWEST)
    lines = [""]
    for word in _WORD.findall(line):
        if lines[-1].strip() and len(lines[-1]) + 1 + len(word) > columns:
            lines.append(_INDENT)
        room = columns - len(_INDENT)
        shown = word if word.startswith("`") else shortened(word, room)
        lines[-1] += f" {shown}" if lines[-1].strip() else shown
    return "\n".join(lines)


def shortened(word: str, columns: int) -> str:
    """A word that has at most so many columns: what is too much is taken out of its middle."""
    if len(word) <= columns:
        return word
    behind = (columns - 1) * 2 // 3  # a path is told from others by its end
    return f"{word[: columns - 1 - behind]}…{word[-behind:]}"
