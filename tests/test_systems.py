"""What the package does where the tests here do not run: on Windows and macOS."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from vlm_export.measure import bench

ROOT = Path(__file__).parents[1]
# Modules of Python that Windows does not have.
UNIX = {"curses", "fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}


def test_no_module_needs_what_windows_lacks() -> None:
    """When it is imported: within a function it may ask for the system first."""
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / "vlm_export").rglob("*.py"))
        for name in sorted(UNIX & set(imported(path)))
    ]
    assert found == []


def imported(path: Path) -> Iterator[str]:
    """The modules that importing a module imports."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def test_peak_memory_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=123))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    monkeypatch.setattr(sys, "platform", "win32")
    assert bench.peak_memory_bytes() == 123
