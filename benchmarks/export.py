"""Checkpoint on disk → decoder graph on disk, ours and the peers', by size and depth; and our whole command line.

python benchmarks/export.py                           # the decoders of smollm-135m with 30 and 60 layers, smollm-360m
python benchmarks/export.py --shapes smollm-135m      # this one only
python benchmarks/export.py --what large              # smollm2-1.7b: bfloat16 → float16 graph; merge of its adapter
python benchmarks/export.py --what bounded            # smollm2-1.7b: `vlm-export onnx` to float32 and q4 within 3 GB
python benchmarks/export.py --what captioner          # SigLIP-base and smollm-135m: `vlm-export merge` and `onnx`

Wall time is the whole command's, start and imports included; memory is that of its largest process. An export of ours
finds nothing kept of earlier ones, unless its name ends in "again": then one of the same architecture came before.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import harness
from harness import AGAIN, OURS, Command, CommandFailed, Measured, Row

from vlm_export.files import Work

Job = tuple[str, str]  # shape, and what is done to it by whom

_RECIPE = "name: captioner\nmodel: {model}\nlayout: captioner\ndtypes: [fp32]\n"
DEPTH = "smollm-135m"
DECODERS = (DEPTH, "smollm-135m-60-layers", "smollm-360m")
LARGE = "smollm2-1.7b"
CAPTIONER = "smollm-135m"


@dataclass(frozen=True)
class Run:
    """What a command took, and the size of its graphs; or, in its place, why it failed."""

    measured: Measured | None
    graph_mb: float = 0
    failure: str | None = None

    @property
    def without_weights_s(self) -> float | None:
        """Wall time less the phase that moves weights, which our driver reports."""
        if self.measured is None:
            return None
        last = self.measured.output.splitlines()[-1:]
        phases = json.loads(last[0]) if last and last[0].startswith('{"structure_s"') else None
        return self.measured.seconds - phases["weights_s"] if phases else None


def run(command: Callable[[Path], Command], work: Path, graph_cache: Path | None = None) -> Run:
    """Run a command in an empty folder, which goes away with what it wrote; `graph_cache` stays."""
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=work))
    try:
        done = harness.measured(command(folder), folder, graph_cache)
        graphs = folder.rglob("*.onnx*")
        return Run(done, sum(file.stat().st_size for file in graphs) / 1e6)
    except CommandFailed as failure:
        return Run(None, failure=str(failure))
    finally:
        shutil.rmtree(folder)


def decoders(work: Path, shapes: Sequence[str]) -> dict[Job, Callable[[Path], Command]]:
    """Every shape, by every tool."""

    def command(source: Path, tool: str, folder: Path) -> Command:
        return harness.decoder_exports(source, folder)[tool.removesuffix(AGAIN)]

    sources = {shape: harness.checkpoint(work, shape, "base", "decoder") for shape in shapes}
    tools = (OURS, f"{OURS}{AGAIN}", harness.OPTIMUM, harness.GENAI)
    return {(shape, tool): partial(command, source, tool) for shape, source in sources.items() for tool in tools}


def large(work: Path, _: Sequence[str]) -> dict[Job, Callable[[Path], Command]]:
    """A bfloat16 checkpoint, whose weights are larger than the memory that a conversion may take."""
    source = harness.checkpoint(work, LARGE, "base", "captioner")
    return {
        (LARGE, f"{OURS}, fp16"): lambda folder: harness.our_export(source, folder, "language_model", "fp16"),
        (LARGE, f"{OURS} merge"): lambda folder: _in_shell(source, folder, "merge"),
    }


def bounded(work: Path, _: Sequence[str]) -> dict[Job, Callable[[Path], Command]]:
    """The same checkpoint, all of it in float32 and in q4, by the command line, which may not take more than 3 GB.

    12 GB of disk are enough, for the checkpoint goes as soon as it is merged.
    """
    merged = Work(work / "bounded")
    recipe = work / "bounded.yaml"
    if not merged.merged.is_dir():
        source = harness.checkpoint(work, LARGE, "base")
        recipe.write_text(_RECIPE.format(model=source / "base"))
        subprocess.run([harness.CLI, "merge", recipe, "--work", merged.root], stdout=sys.stderr, check=True)
        shutil.rmtree(source)

    def command(folder: Path) -> Command:
        (folder / "work").mkdir()
        Work(folder / "work").merged.symlink_to(merged.merged)
        return [harness.CLI, "onnx", recipe, "--work", folder / "work", "--quantize", "q4", "--memory", "3GB"]

    return {(LARGE, f"{OURS} onnx, fp32 and q4"): command}


def captioner(work: Path, _: Sequence[str]) -> dict[Job, Callable[[Path], Command]]:
    """All that a user types before `verify`."""
    source = harness.checkpoint(work, CAPTIONER, "captioner")
    shape, both = f"SigLIP-base + {CAPTIONER}", f"{OURS} merge && {OURS} onnx"
    return {
        (shape, f"{OURS} merge"): lambda folder: _in_shell(source, folder, "merge"),
        (shape, both): lambda folder: _in_shell(source, folder, "merge", "onnx"),
        (shape, f"{both}{AGAIN}"): lambda folder: _in_shell(source, folder, "merge", "onnx"),
    }


def _in_shell(source: Path, folder: Path, *commands: str) -> Command:
    (folder / "recipe.yaml").write_text(_RECIPE.format(model=source / "captioner"))
    return ["sh", "-c", " && ".join(f"'{harness.CLI}' {command} recipe.yaml" for command in commands)]


def rows(results: dict[Job, list[Run]]) -> list[Row]:
    """Medians, and how many times as long and as much as ours the others take; a failure takes the row."""
    found = []
    for (shape, by), runs in results.items():
        ours = results.get((shape, OURS), runs)
        row: Row = {"shape": shape, "export by": by}
        failures = [run.failure for run in runs if run.failure]
        if failures:
            found.append(row | {"wall s": f"failed: {failures[0]}"})
            continue
        row["wall s"] = statistics.median(_seconds(runs))
        row["peak MiB"] = statistics.median(_peaks(runs))
        row["graph MB"] = runs[0].graph_mb
        if runs is not ours and not any(run.failure for run in ours):
            row["ours, wall ×"] = harness.median_ratio(_seconds(runs), _seconds(ours))
            row["ours, peak ×"] = harness.median_ratio(_peaks(runs), _peaks(ours))
        without = _without_weights(runs)
        if without:
            row["without weights s"] = statistics.median(without)
            shallow = _without_weights(results.get((DEPTH, OURS), []))
            if shallow and by == OURS and shape.startswith(f"{DEPTH}-"):
                row["of 30 layers ×"] = harness.median_ratio(without, shallow)
        found.append(row)
    return found


def _seconds(runs: Sequence[Run]) -> list[float]:
    return [run.measured.seconds for run in runs if run.measured]


def _peaks(runs: Sequence[Run]) -> list[float]:
    return [run.measured.peak_mib for run in runs if run.measured]


def _without_weights(runs: Sequence[Run]) -> list[float]:
    return [run.without_weights_s for run in runs if run.without_weights_s is not None]


WHAT = {"decoders": decoders, "large": large, "bounded": bounded, "captioner": captioner}


def main() -> None:
    parser = harness.arguments(__doc__, rounds=3)
    parser.add_argument("--what", choices=WHAT, default="decoders", help="(%(default)s)")
    parser.add_argument("--shapes", nargs="+", default=DECODERS, metavar="SHAPE", help="of checkpoints.py")
    options = parser.parse_args()
    with harness.workspace(options.keep) as work:
        jobs = WHAT[options.what](work, options.shapes)
        candidates = {job: partial(run, command, work) for job, command in jobs.items()}
        with tempfile.TemporaryDirectory(prefix="structures-", dir=work) as kept:
            for shape, by in jobs:
                if by.endswith(AGAIN):
                    harness.progress(f"once, uncounted: {shape}, {by.removesuffix(AGAIN)}")
                    candidates[shape, by] = partial(run, jobs[shape, by], work, Path(kept))
                    candidates[shape, by]()
            results = harness.alternating(options.rounds, candidates)
    harness.report("export", rows(results), what=options.what, rounds=options.rounds)


if __name__ == "__main__":
    main()
