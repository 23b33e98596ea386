"""Ask who keeps lists of vulnerabilities about what is pinned: `requirements/tested.txt`, and each `package-lock.json`.

    python scripts/audit.py

By pip-audit and `npm audit`, which ask PyPI and npm. Exit status 1: something is known of a version that is pinned; 2:
somebody could not be asked, so that nothing is known.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTED = ROOT / "requirements" / "tested.txt"
SECONDS = 300  # for one question


@dataclass(frozen=True)
class Answer:
    """What was said of a file: how many packages were looked up, what is known of them, or why nobody was asked."""

    file: str
    packages: int = 0
    known: tuple[str, ...] = ()
    unasked: str = ""

    def __str__(self) -> str:
        if self.known:
            return "\n".join(f"{self.file}: {line}" for line in self.known)
        if self.unasked:
            return f"{self.file}: cannot ask: {self.unasked}"
        return f"{self.file}: nothing known of {self.packages:,} packages"


def main() -> int:
    """Ask about every file."""
    answers = [of_python(TESTED), *(of_npm(lock) for lock in locks())]
    for answer in answers:
        print(answer, flush=True)
    return status(answers)


def status(answers: Sequence[Answer]) -> int:
    """The exit status: what is known before what is not."""
    if any(answer.known for answer in answers):
        return 1
    return 2 if any(answer.unasked for answer in answers) else 0


def locks() -> list[Path]:
    """Every lock file of the repository."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in ("node_modules", "build") and not name.startswith(".")]
        found += [Path(folder, name) for name in files if name == "package-lock.json"]
    return sorted(found)


def of_python(path: Path) -> Answer:
    """What PyPI knows of a file of requirements with hashes."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(path), "--require-hashes", "--disable-pip"]
    return read_pip_audit(_name(path), *_said([*command, "--format", "json", "--progress-spinner", "off"], ROOT))


def of_npm(lock: Path) -> Answer:
    """What npm knows of a lock file."""
    command = ["npm", "audit", "--package-lock-only", "--json"]
    return read_npm_audit(_name(lock), *_said(command, lock.parent), packages=_locked(lock))


def read_pip_audit(file: str, said: str, failure: str) -> Answer:
    """What pip-audit printed. A package that it left out was not asked about: then nobody was."""
    try:
        found = json.loads(said)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return Answer(file, unasked=_last_line(failure or said))
    known = tuple(
        f"{one['name']} {one['version']}: {bug['id']}: mended in {', '.join(bug['fix_versions']) or 'no version yet'}"
        for one in found
        for bug in one.get("vulns", ())
    )
    left_out = [one for one in found if "skip_reason" in one]
    unasked = f"{len(left_out)} of {len(found)} packages: {left_out[0]['skip_reason']}" if left_out else ""
    if not found:
        unasked = "no package in it"
    return Answer(file, len(found), known, unasked)


def read_npm_audit(file: str, said: str, failure: str, *, packages: int) -> Answer:
    """What `npm audit --json` printed."""
    try:
        report: dict[str, Any] = json.loads(said)
    except ValueError:
        return Answer(file, unasked=_last_line(failure or said))
    if "vulnerabilities" not in report:
        return Answer(file, unasked=_last_line(str(report.get("message") or report.get("error") or failure)))
    known = tuple(
        f"{name}: {one['severity']}: {', '.join(_titles(one))}" for name, one in report["vulnerabilities"].items()
    )
    return Answer(file, packages, known)


def _titles(vulnerability: dict[str, Any]) -> list[str]:
    """What it is, or the packages that it comes from."""
    return [one["title"] if isinstance(one, dict) else f"by {one}" for one in vulnerability["via"]]


def _locked(lock: Path) -> int:
    return len([name for name in json.loads(lock.read_text(encoding="utf-8"))["packages"] if name])


def _said(command: Sequence[str], folder: Path) -> tuple[str, str]:
    """What a command printed, and what it said of a failure."""
    try:
        done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True, timeout=SECONDS)
    except FileNotFoundError:
        return "", f"{command[0]} is not installed"
    except subprocess.TimeoutExpired:
        return "", f"no answer in {SECONDS} s"
    return done.stdout, done.stderr


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no answer"])[-1][:200]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


if __name__ == "__main__":
    sys.exit(main())
