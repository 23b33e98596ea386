"""Whether what was made would come out the same: what each stage was made of, and what it left, by content.

`.stages.json` of a work folder holds it. A file is read again only if its size or its time of change is another than
when it was read last, as git does it; a record that is missing, damaged or of another schema says that nothing is done.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlm_export.errors import InputError
from vlm_export.files import read_json, sha256, write_json

RECORD = ".stages.json"
SCHEMA = 1


class Record:
    """The record of a work folder, read when it is made and written by `done`."""

    def __init__(self, work: Path):
        self.path = work / RECORD
        self.stages: dict[str, Any] = {}
        self.read: dict[str, list[Any]] = {}  # by file: size, time of change, sha256
        try:
            values = read_json(self.path)
        except InputError:
            return
        stages, read = values.get("stages"), values.get("files")
        if values.get("schema") == SCHEMA and isinstance(stages, dict) and isinstance(read, dict):
            self.stages, self.read = stages, read

    def digests(self, paths: Iterable[Path]) -> dict[str, str]:
        """sha256 of files, and of all files below folders, by names that a move of them all leaves as they are."""
        return {
            f"{place} {file.relative_to(path.parent).as_posix()}": self._digest(file)
            for place, path in enumerate(paths)
            for file in _files(path)
        }

    def since(self, stage: str, made_of: Mapping[str, Any], left: Mapping[str, str]) -> str | None:
        """When a stage was done with these inputs, if it left these files; None where it has to run.

        Args:
            stage: its name.
            made_of: everything that its result depends on, as JSON can hold it.
            left: digests of its files as they are now.
        """
        known = self.stages.get(stage)
        if not isinstance(known, dict) or not left:
            return None
        same = known.get("made_of") == fingerprint(made_of) and known.get("left") == fingerprint(left)
        return str(known.get("at")) if same else None

    def done(self, stage: str, made_of: Mapping[str, Any], left: Mapping[str, str]) -> None:
        """Note that a stage was done."""
        at = time.strftime("%Y-%m-%d %H:%M")
        self.stages[stage] = {"made_of": fingerprint(made_of), "left": fingerprint(left), "at": at}
        self.read = {file: entry for file, entry in self.read.items() if Path(file).exists()}
        write_json(self.path, {"schema": SCHEMA, "stages": self.stages, "files": self.read})

    def _digest(self, file: Path) -> str:
        found, name = file.stat(), str(file.absolute())
        known = self.read.get(name)
        if isinstance(known, list) and known[:2] == [found.st_size, found.st_mtime_ns]:
            return str(known[2])
        digest = sha256(file)
        self.read[name] = [found.st_size, found.st_mtime_ns, digest]
        return digest


def fingerprint(facts: Mapping[str, Any]) -> str:
    """sha256 of facts, whatever their order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
