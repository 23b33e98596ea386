"""What is done to a file, so that it is wrong: a change is a function of the file's path, with a name for the table."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECRET = '{"secret": "what is nobody\'s business"}'


@dataclass(frozen=True)
class Change:
    """A change and its name."""

    name: str
    apply: Callable[[Path], None]


def raw(content: bytes | str, name: str = "") -> Change:
    """Other content."""
    data = content.encode() if isinstance(content, str) else content
    return Change(name or repr(content)[:40], lambda path: _write(path, data))


def put(key: str, value: Any) -> Change:
    """Another value at a key of a JSON file, `a.b.0.c`; a file that is not there is made."""

    def apply(path: Path) -> None:
        values = json.loads(path.read_text()) if path.exists() else {}
        *above, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
        inner = values
        for part in above:
            inner = inner.setdefault(part, {}) if isinstance(inner, dict) else inner[part]
        inner[last] = value
        _write(path, json.dumps(values).encode())

    return Change(f"{key} = {json.dumps(value)[:40]}", apply)


def literal(key: str, text: str, name: str = "") -> Change:
    """A piece of JSON at a key, which Python would not write so."""

    def apply(path: Path) -> None:
        put(key, "<here>").apply(path)
        _write(path, path.read_text().replace('"<here>"', text).encode())

    return Change(f"{key} = {name or text[:40]}", apply)


def drop(key: str) -> Change:
    """Without a key."""

    def apply(path: Path) -> None:
        values = json.loads(path.read_text())
        *above, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
        inner = values
        for part in above:
            inner = inner[part]
        del inner[last]
        _write(path, json.dumps(values).encode())

    return Change(f"without {key}", apply)


def both(*changes: Change) -> Change:
    """One after the other."""

    def apply(path: Path) -> None:
        for change in changes:
            change.apply(path)

    return Change(" and ".join(change.name for change in changes), apply)


def replace(old: str, new: str) -> Change:
    """Another text in place of one."""

    def apply(path: Path) -> None:
        data = path.read_bytes()
        assert old.encode() in data
        _write(path, data.replace(old.encode(), new.encode()))

    return Change(f"{old!r} → {new!r:.60}", apply)


def changed_bit(tensor: str) -> Change:
    """Another bit in a tensor of a safetensors file."""

    def apply(path: Path) -> None:
        data = bytearray(path.read_bytes())
        head = 8 + int.from_bytes(data[:8], "little")
        data[head + json.loads(data[8:head])[tensor]["data_offsets"][0]] ^= 1
        _write(path, bytes(data))

    return Change(f"a bit of {tensor}", apply)


def append(text: str) -> Change:
    """More at its end."""
    return Change(f"… {text!r:.60}", lambda path: _write(path, path.read_bytes() + text.encode()))


def cut(size_bytes: int) -> Change:
    """Only its first bytes."""
    return Change(f"{size_bytes} bytes of it", lambda path: _write(path, path.read_bytes()[:size_bytes]))


def _leave(path: Path) -> None:
    outside = Path(os.environ["BAD_OUTSIDE"])
    outside.mkdir(exist_ok=True)
    target = outside / path.name
    if path.exists():
        path.rename(target)
    else:
        target.write_text(SECRET)
    path.symlink_to(target)


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    here = os.getcwd()
    os.chdir(path.parent)  # an address has at most 107 characters
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _link(target: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return apply


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


LEAVES = Change("a link to outside", _leave)
PIPE = Change("a pipe", _pipe)
SOCKET = Change("a socket", _socket)
FOLDER = Change("a folder", _folder)
ZERO = Change("a link to /dev/zero", _link("/dev/zero"))
NOWHERE = Change("a link to nothing", _link("none"))
ITSELF = Change("a link to itself", _link("./."))
GONE = Change("gone", lambda path: path.unlink())
NONE = Change("", lambda path: None)
NO_FILES = (LEAVES, PIPE, SOCKET, FOLDER, ZERO, NOWHERE)

EMPTY = raw(b"", "empty")
BINARY = raw(b"\x80\x81\xff\x00" * 16, "binary")
OPENED = raw("{", "{")
LIST = raw("[]", "[]")
NULL = raw("null", "null")
DEEP = raw('{"a":' * 100_000 + "1" + "}" * 100_000, "100,000 deep")
DEEPER = literal("extra", '{"a":' * 900 + "1" + "}" * 900, "900 deep")
DIGITS = literal("extra", "1" * 5000, "5,000 digits")
NOT_JSON = (EMPTY, BINARY, OPENED, LIST, NULL, DEEP, DIGITS)
HALF_JSON = (OPENED, DEEP)  # of a file that other rows have all of them for
