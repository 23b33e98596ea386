"""What commands print: results on stdout, progress and warnings on stderr."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import click

from vlm_export.cli.fitted import for_stderr
from vlm_export.errors import one_line

NO_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"
UNWRAPPED = 1 << 16  # columns, for what reads a pipe: a line stays a line


_QUIET = "vlm_export.quiet"
_SECONDS = 10.0  # between two lines of progress where there is no terminal to draw a bar in


def be_quiet(context: click.Context, value: bool) -> None:
    """From now on `notify` says nothing, and no progress is shown."""
    if value:
        context.find_root().meta[_QUIET] = True
        os.environ[NO_BARS] = "1"


def is_quiet() -> bool:
    """Whether the user asked for silence."""
    context = click.get_current_context(silent=True)
    return bool(context and context.find_root().meta.get(_QUIET))


def notify(line: str) -> None:
    """A line on stderr, unless the user asked for silence; a plan's own columns stay as they are."""
    if not is_quiet():
        click.echo(line if line.startswith(" ") else for_stderr(line), err=True)


def warn(line: str) -> None:
    """A warning on stderr, whatever the user asked for."""
    click.echo(for_stderr(f"warning: {line}"), err=True)


def fail(line: str) -> None:
    """An error on stderr."""
    click.echo(for_stderr(one_line(f"error: {line}")), err=True)


def tell_next(as_json: bool, command: str) -> None:
    """What to type next, behind a result for people."""
    if not as_json and not is_quiet():
        click.echo(f"next: {command}")


def write(text: str) -> None:
    """Print a piece of a text on stdout, without a line's end."""
    click.echo(text, nl=False)


def print_result(as_json: bool, value: dict[str, Any], lines: list[str]) -> None:
    """A result on stdout: one JSON object, or lines."""
    click.echo(json.dumps(value, ensure_ascii=False, default=str) if as_json else "\n".join(lines))


def report_lines(report: Any, path: Path) -> list[str]:
    """What `verify` prints of a report: what failed, at most ten lines of it, then what was said in every runtime."""
    shown: dict[Any, Any] = {}
    for check in report.failures:  # one overflow makes all that follows it infinite
        key = (check.dtype, check.runtime) if math.isnan(check.value) else check
        shown.setdefault(key, check)
    lines = [
        f"FAIL {check.component} {check.dtype} {check.runtime} {check.metric} = {check.value:.3g}"
        + (f" (limit {check.limit:g})" if check.limit is not None else "")
        + (f": {check.detail}" if check.detail else "")
        for check in list(shown.values())[:10]
    ]
    if len(report.failures) > len(lines):
        lines.append(f"and {len(report.failures) - len(lines)} more failures")
    for check in report.checks:
        if check.component == "all" and check.verdict != "fail":
            value = "" if check.verdict == "left-out" else f"{_figure(check.value)} "
            lines.append(f"{check.verdict:9} {check.dtype} {check.runtime:5} {check.metric} {value}({check.detail})")
    return [*lines, f"{report.verdict}: {len(report.checks)} checks, {len(report.failures)} failed; {path}"]


def plan_lines(plan: Any) -> list[str]:
    """What `push --dry-run` prints of a plan: a line for each file, and how much is done in all."""
    from vlm_export.hub import sized

    return [
        *(f"{change.action:7} {change.path} ({sized(change.size_bytes)})" for change in plan.changes),
        plan.summary,
        *([f"not compared with what the Hub has: {plan.not_compared}"] if plan.not_compared else []),
    ]


def _figure(value: float) -> str:
    """Three digits behind the point, or two that count."""
    return f"{value:.3f}" if value >= 0.001 or not value else f"{value:.1e}"


class Progress:
    """A bar on stderr, with the time left, once something has taken a second.

    Where stderr is no terminal it is a line now and then, and nothing where the user asked for silence or for JSON.
    """

    def __init__(self, silent: bool):
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self.is_silent = silent or is_quiet()
        self.is_drawn = console.is_terminal and not self.is_silent
        self.bar = Progress(console=console, transient=True, disable=not self.is_drawn)
        self.task: Any = None
        self.started = self.told = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show how many of `total` are done of `what`; 0 says that their number is not known."""
        if not self.is_drawn:
            self._tell(what, done, total)
            return
        if self.task is None and time.monotonic() - self.started > 1:
            self.bar.start()
            self.task = self.bar.add_task(what)
        if self.task is not None:
            self.bar.update(self.task, description=what, completed=done, total=total or None)

    def _tell(self, what: str, done: int, total: int) -> None:
        if self.is_silent or time.monotonic() - self.told < _SECONDS:
            return
        self.told = time.monotonic()
        notify(f"{what} ({done} of {total})" if total else what)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
