"""A row of the table of bad input, and the commands that rows are about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bad.changes import Change

MERGE = "merge r.yaml --work out"
GOLDEN = "golden r.yaml"
ONNX = "onnx r.yaml --work work"
VERIFY = "verify r.yaml --work work --runtime ort"
PUSH = "push org/model --recipe r.yaml --work work --dry-run"
RUN = "run work/repo images/0.png"
ASK = "run work/repo images/0.png --prompt what"
BENCH = "bench r.yaml --work work --runtime ort --card"
DEMO = "demo r.yaml --work work --export site"
INSPECT = "inspect base"
SWEEP = "sweep s.yaml --dry-run --in-process --work out"


@dataclass(frozen=True)
class Case:
    """A row. `named` is what the message calls the file."""

    kind: int
    place: str
    command: str
    file: str
    change: Change
    said: str = ""
    named: str | None = None

    @property
    def title(self) -> str:
        return f"{self.kind}-{self.command.split()[0]}-{self.file}-{self.change.name}".replace("/", "_")


Row = Change | tuple[Change, str] | tuple[Change, str, str]


def rows(kind: int, place: str, command: str, file: str, *changes: Row) -> Iterator[Case]:
    """A case for each change, which may stand with what is said, and what is named in place of the file."""
    for change in changes:
        change, said, named = (*change, "", None)[:3] if isinstance(change, tuple) else (change, "", None)
        yield Case(kind, place, command, file, change, said, file.rpartition("/")[2] if named in (None, "") else named)
