"""`kill -9` at random moments of `merge`, `onnx` and `verify`: what is left is whole, and the next run completes it.

python benchmarks/kills.py                # 100 kills of a tiny captioner's conversion, some seconds each
python benchmarks/kills.py --times 3      # as the tests run it

A conversion begins in turn with nothing, not even traced graphs; with nothing but these; and with the result of an
adapter that has changed since. It is killed at a random moment of each hundredth (or so) of the time that it takes.
After each kill, `merged/`, `repo/` and `report/` must be absent or byte for byte what a run that nobody killed leaves
behind a stage, the old one or the new one. The same commands are then run again to their end. All files must be those
of the run that nobody killed (or of it and a second `verify`: a report says what it took over from the one before), and
nothing else may lie in the work folder, beside it, in the temporary folder or in the cache. Ctrl-C ends it early.

Each process is forked from one that has imported everything, so that a kill hits the work and not the imports.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from vlm_export.cli import main as vlm_export_main
from vlm_export.files import file_hashes

STAGES = ("merge", "onnx", "verify")
FOLDERS = ("merged", "repo", "report")
OLDER, NOTHING, UNTRACED = "an older result", "nothing", "nothing, nor traced"
STARTS = (OLDER, NOTHING, UNTRACED)
_TURNS = (0, 1, 2, 0, 1, 0, 1, 0, 1)  # tracing takes most of a run, and is the same in each
_COMMANDS = (["merge"], ["onnx"], ["verify", "--runtime", "ort"])
_RECIPE = """name: tiny
model: ./checkpoint
layout: captioner
dtypes: {dtypes}
generation: {{max_new_tokens: 3}}
golden: {{images: [images/*.png]}}
hub: {{license: mit}}
tolerances:
"""
_TOLERANCE = "  - {{metric: {metric}, dtype: {dtype}, limit: {limit}, reason: random weights have no margin}}\n"
_LIMITS = {"tokens_exact_rate": 0.0, "teacher_forced_top1_agreement": 0.0}
_LIBRARIES = ("vlm_export", "torch", "transformers", "peft", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "PIL")
_PROCESSES = multiprocessing.get_context("fork")
Hashes = dict[str, str]


@dataclass(frozen=True)
class Place:
    """The folder of a conversion: its inputs, its work folder, and all that a process may leave something in."""

    root: Path

    @property
    def work(self) -> Path:
        return self.root / "build" / "tiny"

    def hashes(self) -> dict[str, Hashes]:
        """The files of each result, by its name; without those that are not there."""
        return {name: file_hashes(self.work / name) for name in FOLDERS if (self.work / name).exists()}

    def left_over(self) -> list[str]:
        """What is neither an input nor a result."""
        beside = [*self.root.iterdir(), *(self.root / "build").iterdir(), *(self.root / "golden").iterdir()]
        known = {"checkpoint", "images", "tiny.yaml", "golden", "build", "tiny", "tmp", "cache"}
        found = [path for path in beside if path.name not in known]
        found += [path for path in self.work.iterdir() if path.name not in {*FOLDERS, ".stages.json"}]
        found += [*(self.root / "tmp").glob("vlm-export-*")]
        found += [path for path in (self.root / "cache").rglob("*") if path.name.startswith(".")]
        return [str(path.relative_to(self.root)) for path in found]


@dataclass
class Figures:
    """What came of the kills that began alike."""

    start: str
    kills: int = 0
    during: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)  # by the run behind the kill
    rerun_seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        return {
            "begun with": self.start,
            "kills": self.kills,
            **{f"in {stage}": self.during[stage] for stage in STAGES},
            "stages that the next run skipped": sum(self.skipped.values()),
            "next run, at most, s": round(max(self.rerun_seconds, default=0), 1),
            "wrong": len(self.wrong),
        }


def act(root: Path, stage: Any, said: Any, commands: Sequence[Sequence[str]]) -> None:
    """In a process of its own: run commands, telling which one is on; their status and errors go to `said`."""
    os.chdir(root)
    os.environ |= {"VLM_EXPORT_CACHE": str(root / "cache"), "TMPDIR": str(root / "tmp"), "HF_HUB_OFFLINE": "1"}
    os.environ.pop("VLM_EXPORT_STRUCTURES", None)
    for place, command in enumerate(commands):
        stage.value = place
        done = CliRunner().invoke(vlm_export_main, [command[0], "tiny.yaml", *command[1:]])
        said.put((done.exit_code, done.stderr if done.exit_code == 0 else done.output, [*sys.modules]))
        if done.exit_code:
            break
    said.close()
    said.join_thread()
    os._exit(0)


def begun(root: Path, commands: Sequence[Sequence[str]] = _COMMANDS) -> tuple[Any, Any, Any]:
    """A process that runs commands, the place of the one that is on, and what they said."""
    stage, said = _PROCESSES.Value("i", 0), _PROCESSES.Queue()
    process = _PROCESSES.Process(target=act, args=(root, stage, said, commands))
    process.start()
    return process, stage, said


def ran(root: Path, commands: Sequence[Sequence[str]] = _COMMANDS) -> tuple[list[str], float]:
    """Run commands to their end. Returns what they told, and the seconds that they took.

    What they imported is imported here, for the processes that are forked later.

    Raises:
        RuntimeError: one failed.
    """
    started = time.monotonic()
    process, _, said = begun(root, commands)
    told = []
    for _ in commands:
        status, text, modules = said.get(timeout=300)
        if status:
            raise RuntimeError(f"exit status {status}: {text.strip()}")
        told.append(text)
    process.join()
    seconds = time.monotonic() - started
    for name in modules:
        if name not in sys.modules and name.partition(".")[0] in _LIBRARIES:
            with suppress(ImportError):
                importlib.import_module(name)
    return told, seconds


def write_inputs(root: Path, captioner: Path, dtypes: Sequence[str]) -> None:
    """A recipe, its checkpoint and its images in an empty folder."""
    import numpy as np
    from PIL import Image

    for name in ("images", "golden", "build", "tmp", "cache"):
        (root / name).mkdir(parents=True)
    shutil.copytree(captioner, root / "checkpoint")
    limits = [(dtype, metric, limit) for dtype in ("fp32", *dtypes) for metric, limit in _LIMITS.items()]
    tolerances = [_TOLERANCE.format(dtype=dtype, metric=metric, limit=limit) for dtype, metric, limit in limits]
    (root / "tiny.yaml").write_text(_RECIPE.format(dtypes=list(dtypes)) + "".join(tolerances))
    random_numbers = np.random.default_rng(0)
    for name in ("0.png", "1.png"):
        Image.fromarray(random_numbers.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(root / "images" / name)


def change_adapter(root: Path) -> None:
    """Another adapter in the same checkpoint, as after more training."""
    [file] = (root / "checkpoint").glob("*.safetensors")
    tensors = load_file(file)
    changed = {name: tensor * 1.25 if "lora_" in name else tensor for name, tensor in tensors.items()}
    save_file(changed, file, metadata={"format": "pt"})


def copied(source: Path, target: Path) -> Path:
    """A folder as it was, times of files included, in place of what is there."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


@dataclass(frozen=True)
class Expected:
    """What runs that nobody killed gave.

    Attributes:
        starts: by name, the folders that a conversion begins with.
        seconds: how long it takes from each.
        whole: what each result is after any stage.
        final: what it is in the end.
    """

    starts: dict[str, Path]
    seconds: dict[str, float]
    whole: dict[str, list[Hashes]]
    final: dict[str, list[Hashes]]


def main() -> None:
    """Kill, look, run again, compare."""
    parser = harness.arguments(__doc__, rounds=1)
    parser.add_argument("--times", type=int, default=100, help="how many kills")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with harness.workspace(given.keep) as folder:
        captioner = harness.checkpoint(folder, "pico", "captioner") / "captioner"
        harness.progress("runs that nobody kills")
        expected = prepared(folder, captioner, STARTS, ("q8", "q4"))
        figures = kills(folder, expected, given.times, random.Random(given.seed), _TURNS)
    harness.report("kills", [each.row() for each in figures], times=given.times, seed=given.seed)
    if wrong := [f"{each.start}: {line}" for each in figures for line in each.wrong]:
        sys.exit("\n".join(wrong))


def kills(
    folder: Path, expected: Expected, times: int, chosen: random.Random, turns: Sequence[int] = (0,)
) -> list[Figures]:
    """Kill as many runs, each in another slice of the time that it takes; `turns` says which start is whose."""
    names = list(expected.starts)
    figures = [Figures(name) for name in names]
    slices = list(range(times))
    chosen.shuffle(slices)
    with suppress(KeyboardInterrupt):
        for number, place in enumerate(slices):
            of = figures[turns[number % len(turns)]]
            moment = (place + chosen.random()) / times * expected.seconds[of.start]
            harness.progress(f"{number + 1} of {times}: after {moment:.2f} s")
            before = len(of.wrong)
            kill(folder / "place", moment, expected, of)
            for line in of.wrong[before:]:
                harness.progress(line)
    return figures


def prepared(folder: Path, captioner: Path, names: Sequence[str], dtypes: Sequence[str]) -> Expected:
    """What runs that nobody kills give, from each of these starts.

    All runs are in `folder/place`: what they are compared with was made in the same folder.
    """
    place = Place(folder / "place")
    shutil.rmtree(place.root, ignore_errors=True)
    write_inputs(place.root, captioner, dtypes)
    ran(place.root, [["golden"], *_COMMANDS])
    states = [place.hashes()]
    change_adapter(place.root)
    ran(place.root, [["golden"]])
    starts, seconds = {}, {}
    for name in names:
        if name != OLDER:
            shutil.rmtree(place.work)
            ran(place.root, [["golden"]])
        if name == UNTRACED:
            shutil.rmtree(place.root / "cache")
            (place.root / "cache").mkdir()
        starts[name] = copied(place.root, folder / name.replace(" ", "-"))
    for name, source in starts.items():
        copied(source, place.root)
        started = time.monotonic()
        for command in _COMMANDS:
            ran(place.root, [command])
            states.append(place.hashes())
        seconds[name] = time.monotonic() - started
    ran(place.root, [_COMMANDS[-1]])
    states.append(place.hashes())
    whole = {name: [state[name] for state in states if name in state] for name in FOLDERS}
    return Expected(starts, seconds, whole, {name: [state[name] for state in states[-2:]] for name in FOLDERS})


def kill(root: Path, moment: float, expected: Expected, of: Figures) -> None:
    """One kill of a run in `root`, and the run behind it; what is wrong is noted."""
    start = expected.starts[of.start]
    place = Place(copied(start, root))
    while True:
        process, stage, _ = begun(root)
        process.join(moment)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            break
        copied(start, root)  # it was faster this time
        moment *= 0.8
    of.kills += 1
    of.during[STAGES[stage.value]] += 1
    when = f"killed after {moment:.2f} s, in {STAGES[stage.value]}"
    of.wrong += [
        f"{when}: {name}/ is not whole" for name, found in place.hashes().items() if found not in expected.whole[name]
    ]
    try:
        told, seconds = ran(root)
    except RuntimeError as error:
        of.wrong.append(f"{when}: the next run failed: {error}")
        return
    of.rerun_seconds.append(seconds)
    of.skipped.update(name for name, text in zip(STAGES, told, strict=True) if "; skipped" in text)
    found = place.hashes()
    for name in FOLDERS:
        if found[name] not in expected.final[name]:
            differing = {file for file, _ in found[name].items() ^ expected.final[name][0].items()}
            of.wrong += [f"{when}: {name}/{file} differs in the end" for file in sorted(differing)]
    of.wrong += [f"{when}: {path} was left" for path in place.left_over()]


if __name__ == "__main__":
    main()
