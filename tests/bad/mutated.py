"""Random bad input: a file of a work folder, or a request, with some of its bits, values or tensors changed, by number.

The same number is always the same input. What comes of one is a word: `done` and `refused` are as they should be,
everything else is a fault.
"""

from __future__ import annotations

import base64
import copy
import json
import os
import random
import shutil
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from click.testing import CliRunner
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from bad import case, place
from bad.limits import LONGEST_LINE, Hangs, bounded, state
from bad.requests import asking, post
from vlm_export.cli import main
from vlm_export.runtime import Model

FINE = ("done", "refused")
REQUESTS = 0.6  # of all inputs
_SECONDS = 120  # on a machine that does other things too
_REPO = ("config.json", "generation_config.json", "preprocessor_config.json", "export.json", "tokenizer.json")
_PROCESSOR = "processor_config.json"
_PREPARING = ("config.json", "preprocessor_config.json", _PROCESSOR)
_GRAPHS = ("onnx/encoder_model.onnx", "onnx/decoder_model_merged.onnx")
_SINGLE = ("onnx/model.onnx",)
_BASE = ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 1.5, -0.5, 10**9, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"),
    "", "x", "4", "\ud800", "a\nb", "\0", "../x", "x" * 5000, [], [0], ["x"], [[]], {}, {"x": 0}, [1] * 3000,
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A door: a command in a place, the files that come in there, and how often it is tried beside the others."""

    place: str
    command: str
    files: tuple[str, ...]
    weight: float = 1

    @property
    def name(self) -> str:
        return f"{self.command.split()[0]} {self.place}"


def _under(folder: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


_ADAPTER = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
_WEIGHTS = ("base/model.safetensors",)
_GOLDEN = ("golden/t/golden.json", "golden/t/golden.safetensors", "golden/t/images/0.png")
_REPORTS = ("work/report/report.json", "work/report/bench.json", "work/merged/merge.json", "work/repo/export.json")
ENTRIES = (
    Entry("captioner", case.MERGE, ("r.yaml", "base/config.json", *_ADAPTER, *_WEIGHTS), 3),
    Entry("captioner", case.GOLDEN, ("r.yaml", *_under("base", _BASE), "images/0.png"), 0.1),
    Entry("captioner", f"{case.RUN} --backend onnx", (*_under("work/repo", (*_REPO, *_GRAPHS)), "images/0.png"), 3),
    Entry("captioner", case.VERIFY, (*_GOLDEN, *_REPORTS), 0.1),
    Entry("captioner", case.PUSH, _REPORTS, 2),
    Entry("captioner", case.DEMO, (*_GOLDEN[:1], *_REPORTS), 1),
    Entry("captioner", case.INSPECT, (*_under("base", _BASE[:4]), *_WEIGHTS), 3),
    Entry("captioner", "doctor work/repo", _under("work/repo", (*_REPO, *_GRAPHS)), 2),
    Entry("captioner", case.SWEEP, ("s.yaml", "r.yaml", "base/config.json", *_ADAPTER), 1),
    Entry("single", f"{case.RUN} --backend onnx", (*_under("work/repo", (*_REPO, *_SINGLE)), "images/0.png"), 2),
    Entry("single", case.VERIFY, (*_GOLDEN, *_under("work/repo", (*_REPO, *_SINGLE))), 0.1),
    Entry("single", case.DEMO, _under("work/repo", _REPO), 0.5),
    Entry("single", "doctor work/repo", _under("work/repo", (*_REPO, *_SINGLE)), 1),
    Entry("chat", f"{case.ASK} --backend onnx", _under("work/repo", (*_REPO, _PROCESSOR, "chat_template.jinja")), 2),
    *(
        Entry("families", f"merge {name}.yaml --work out", (f"{name}/config.json", f"{name}/model.safetensors"), 0.5)
        for name in place.FAMILIES
    ),
    *(
        Entry("families", f"golden {name}.yaml", _under(name, _PREPARING), 0.02)
        for name in place.FAMILIES
        if name != "encoder_decoder"
    ),
)
REQUEST = Entry("captioner", "request", ("body", "image"))


@dataclass(frozen=True)
class Outcome:
    """What came of an input: of which door and file, how it was changed, and what was seen."""

    number: int
    entry: str
    file: str
    change: str
    what: str
    seen: str = ""

    @property
    def fine(self) -> bool:
        return self.what in FINE


def of_file(number: int, seed: int) -> bool:
    """Whether the input of this number is a file."""
    return _chance(number, seed).random() >= REQUESTS


def _chance(number: int, seed: int) -> random.Random:
    return random.Random(f"{seed}-{number}")


def outcome(number: int, seed: int, made: dict[str, Path], model: Model | None, folder: Path) -> Outcome:
    """What comes of the input of this number; `folder` is empty, and may be filled."""
    chance = _chance(number, seed)
    if chance.random() < REQUESTS:
        return _of_request(number, chance, model)
    (entry,) = chance.choices(ENTRIES, [one.weight for one in ENTRIES])
    known = [file for file in entry.files if (made[entry.place] / file).exists()]
    file = chance.choice(known)
    return _of_file(number, chance, entry, file, place.copy(made[entry.place], folder / "p"))


def _of_file(number: int, chance: random.Random, entry: Entry, file: str, folder: Path) -> Outcome:
    here = os.getcwd()
    os.chdir(folder)
    try:
        change = mutate(Path(file), chance)
        before = state(folder)
        what, seen = _command(entry.command)
        if what == "refused" and state(folder) != before:
            what, seen = "left something", f"{seen}: {sorted(state(folder).keys() ^ before.keys())[:3]}"
    finally:
        os.chdir(here)
        shutil.rmtree(folder)
    return Outcome(number, entry.name, file, change, what, seen)


def _command(command: str) -> tuple[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with bounded(_SECONDS):
                done = CliRunner().invoke(main, command.split(" "))
        except Hangs:
            return "hang", ""
    error = done.exception
    if isinstance(error, Hangs):
        return "hang", ""
    if isinstance(error, MemoryError):
        return "growth", _last(error)
    if error is not None and not isinstance(error, SystemExit):
        return "traceback", _last(error)
    if "Traceback" in done.output:
        return "traceback", done.stderr[-300:]
    if done.exit_code == 0:
        return "done", ""
    line = (done.stderr.splitlines() or [""])[-1]
    if not line.startswith("error: ") or len(line) >= LONGEST_LINE or not line.isprintable():
        return ("done" if done.exit_code == 1 else "message"), done.stderr[-300:]
    return "refused" if done.exit_code == 2 else "done", line


def _of_request(number: int, chance: random.Random, model: Any) -> Outcome:
    kind = chance.choice(REQUEST.files)
    request = asking()
    if kind == "image":
        body, change = json.dumps(request).encode(), ""
        begin, end = body.index(b"base64,") + 7, body.index(b'"}}]')
        picture, change = _bits(base64.b64decode(body[begin:end]), chance)
        body = body[:begin] + base64.b64encode(picture) + body[end:]
    elif chance.random() < 0.3:
        body, change = _bits(json.dumps(request).encode(), chance)
    else:
        changed, change = _json(request | {"max_tokens": 5, "seed": 1, "top_p": 0.5, "stop": ["x"], "n": 1}, chance)
        body = json.dumps(changed).encode()
    try:
        with bounded(_SECONDS):
            status, answer = post(model, body)
    except Hangs:
        return Outcome(number, "request", kind, change, "hang")
    except Exception as error:
        return Outcome(number, "request", kind, change, "traceback", _last(error))
    message = answer.get("error", {}).get("message", "")
    if status >= 500 or model.backend != "onnx":
        return Outcome(number, "request", kind, change, "failure", f"{status} {message}")
    if status != 200 and (not message or len(message) >= LONGEST_LINE or not message.isprintable()):
        return Outcome(number, "request", kind, change, "message", message)
    return Outcome(number, "request", kind, change, "done" if status == 200 else "refused", message)


def _last(error: BaseException) -> str:
    frames = [one for one in traceback.extract_tb(error.__traceback__) if "vlm_export" in one.filename]
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {str(error)[:200]}{where}"


def mutate(path: Path, chance: random.Random) -> str:
    """Change a file, and say how."""
    if path.suffix == ".json" and chance.random() < 0.8:
        changed, said = _json(json.loads(path.read_text()), chance)
        path.write_text(json.dumps(changed))
        return said
    if path.suffix == ".yaml" and chance.random() < 0.6:
        changed, said = _json(yaml.safe_load(path.read_text()), chance)
        path.write_text(json.dumps(changed))
        return said
    if path.suffix == ".safetensors" and chance.random() < 0.6:
        return _tensors(path, chance)
    data, said = _bits(path.read_bytes(), chance)
    path.write_bytes(data)
    return said


def _bits(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    changed, place = bytearray(data), chance.randrange(max(1, min(len(data), chance.choice((64, 2000, 10**9)))))
    match chance.choice(("flip", "flip", "flip", "cut", "again", "put", "zero")):
        case "flip":
            count = chance.choice((1, 1, 2, 8, 64))
            for _ in range(count):
                where = (place + chance.randrange(64)) % len(changed)
                changed[where] ^= 1 << chance.randrange(8)
            return bytes(changed), f"{count} bits flipped near {place}"
        case "cut":
            return data[:place], f"cut at {place}"
        case "again":
            return data[:place] + data[place : place + 40] * 3 + data[place:], f"repeated at {place}"
        case "put":
            return data[:place] + chance.randbytes(9) + data[place:], f"9 bytes put in at {place}"
    changed[place : place + 16] = bytes(16)
    return bytes(changed), f"16 zeros at {place}"


def _json(values: Any, chance: random.Random) -> tuple[Any, str]:
    """One to three values of a document changed; deep ones as often as those above them."""
    changed, said = copy.deepcopy(values), []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        inner, path = changed, []
        while True:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            if not keys:
                break
            key = chance.choice(keys[:200])
            path.append(str(key))
            if isinstance(inner[key], dict | list) and inner[key] and chance.random() < 0.8:
                inner = inner[key]
                continue
            said.append(f"{'.'.join(path)} {_put(inner, key, chance)}")
            break
    return changed, "; ".join(said)[:200]


def _put(inner: Any, key: Any, chance: random.Random) -> str:
    match chance.choice(("value", "value", "value", "value", "gone", "other key", "near")):
        case "gone":
            del inner[key]
            return "gone"
        case "other key" if isinstance(inner, dict):
            inner[f"{key}x"] = inner.pop(key)
            return "renamed"
        case "near" if isinstance(inner[key], int | float) and not isinstance(inner[key], bool):
            inner[key] = inner[key] * chance.choice((-1, 2, 3, 0.5, 10**6)) + chance.choice((0, 1))
        case _:
            inner[key] = copy.deepcopy(chance.choice(_VALUES))
    return f"= {json.dumps(inner[key])[:40]}"


def _tensors(path: Path, chance: random.Random) -> str:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, TypeError):  # of a dtype that NumPy has not
        data, said = _bits(path.read_bytes(), chance)
        path.write_bytes(data)
        return said
    name = chance.choice(sorted(tensors))
    edits: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "NaN": lambda one: np.full_like(one, np.nan) if one.dtype.kind == "f" else one,
        "Inf": lambda one: np.full_like(one, np.inf) if one.dtype.kind == "f" else one,
        "zeros": np.zeros_like,
        "transposed": lambda one: np.ascontiguousarray(one.T),
        "flat": lambda one: one.reshape(-1),
        "halved": lambda one: np.ascontiguousarray(one[: len(one) // 2]) if one.ndim else one,
        "doubled": lambda one: np.concatenate([one, one]) if one.ndim else one,
        "int8": lambda one: np.nan_to_num(one).astype(np.int8),
        "float64": lambda one: one.astype(np.float64),
        "bool": lambda one: one.astype(np.bool_),
        "a scalar": lambda one: np.zeros((), one.dtype),
        "empty": lambda one: np.zeros((0, *one.shape[1:]), one.dtype),
    }
    kind = chance.choice((*edits, "gone", "renamed", "twice"))
    if kind == "gone":
        del tensors[name]
    elif kind == "renamed":
        tensors[f"{name}x"] = tensors.pop(name)
    elif kind == "twice":
        tensors[f"x{name}"] = tensors[name].copy()
    else:
        tensors[name] = edits[kind](tensors[name])
    save_file(tensors, path)
    return f"{name} {kind}"
