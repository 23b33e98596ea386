"""What the benchmarks share: the peers' environments, measured processes, checkpoints and graphs, the report."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from vlm_export.dtypes import DTYPES
from vlm_export.files import Work, cache_folder, read_json

Key = TypeVar("Key", str, tuple[str, str])
Result = TypeVar("Result")
Row = dict[str, Any]
Command = list[str | Path]

HERE = Path(__file__).parent
CACHE = cache_folder()
OURS = "vlm-export"
AGAIN = ", again"  # behind the name of an export of ours that finds its graphs traced
OPTIMUM = "optimum-onnx"
GENAI = "onnxruntime-genai"
EAGER = "PyTorch eager"
# Both come from PyPI. optimum-onnx 0.1.0 needs transformers 4; the builder of onnxruntime-genai names no requirements.
_REQUIREMENTS = {
    OPTIMUM: ("torch==2.13.*", "optimum-onnx==0.1.0", "transformers==4.57.*", "onnxruntime==1.31.*", "accelerate"),
    GENAI: ("torch==2.13.*", "onnxruntime-genai==0.18.*", "transformers==5.23.*", "onnxruntime==1.31.*", "onnx-ir"),
}
CLI = Path(sys.executable).with_name("vlm-export")
# The captioner of trained weights of real size, in the layout that pipeline('image-to-text') takes.
_ASSEMBLE = HERE.parent / "recipes" / "real-captioner" / "assemble.py"
# It is calibrated on its own images.
_REAL_RECIPE = """name: real-captioner
model: {model}
layout: captioner
golden:
  images: ["{images}/*.png"]
"""
_VERSIONS = ("vlm-export", "torch", "transformers", "onnxruntime")
# In a process of its own, and a small one: the peak of a child begins with what its parent had in memory at the fork.
_MEASURE = """
import json, resource, subprocess, sys, time
log, *command = sys.argv[1:]
with open(log, "wb") as file:
    started = time.perf_counter()
    status = subprocess.call(command, stdout=file, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - started
print(json.dumps([status, seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024]))
"""


@dataclass(frozen=True)
class Measured:
    """One command: wall time, and the resident memory of the largest of its processes, mapped files included."""

    seconds: float
    peak_mib: float
    output: str


class CommandFailed(Exception):
    """A command ended with another status than 0; the text is the last line that it printed."""


def environment(peer: str) -> Path:
    """The `bin` folder of a peer's virtual environment, which is made at its first use."""
    requirements = _REQUIREMENTS[peer]
    digest = hashlib.sha256(repr((sys.version, requirements)).encode()).hexdigest()[:12]
    folder = CACHE / f"bench-{digest}"
    if not (folder / ".installed").is_file():
        progress(f"installing {peer} into {folder}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *requirements], check=True)
        (folder / ".installed").touch()
    return folder / "bin"


def measured(command: Sequence[str | Path], folder: Path, graph_cache: Path | None = None) -> Measured:
    """Run a command in `folder`, offline. What ours traced is looked for and kept in `graph_cache`, else in `folder`.

    Raises:
        CommandFailed: its status is not 0.
    """
    log = folder / "output.log"
    helper = [sys.executable, "-c", _MEASURE, log, *command]
    environ = {"HF_HUB_OFFLINE": "1", "VLM_EXPORT_STRUCTURES": str(graph_cache or folder / "structures")}
    done = subprocess.run(helper, cwd=folder, env=os.environ | environ, stdout=subprocess.PIPE, check=True)
    status, seconds, peak_mib = json.loads(done.stdout)
    output = log.read_text(errors="replace")
    if status != 0:
        raise CommandFailed((output.strip().splitlines() or [f"exit status {status}"])[-1])
    return Measured(seconds, peak_mib, output)


def in_new_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function where nothing else was loaded, allocated or threaded before."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def alternating(rounds: int, candidates: Mapping[Key, Callable[[], Result]]) -> dict[Key, list[Result]]:
    """`rounds` results of each candidate, which take turns, so that what disturbs the machine disturbs all of them."""
    results: dict[Key, list[Result]] = {name: [] for name in candidates}
    for number in range(rounds):
        for name, candidate in candidates.items():
            progress(f"round {number + 1} of {rounds}: {name if isinstance(name, str) else ', '.join(name)}")
            results[name].append(candidate())
    return results


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def checkpoint(work: Path, shape: str, *parts: str) -> Path:
    """The folder with these parts (`checkpoints.PARTS`) of a shape; each is written at its first use."""
    folder = work / "checkpoints" / shape
    missing = [part for part in parts if not (folder / part / "model.safetensors").is_file()]
    if missing:
        progress(f"writing {shape}: {', '.join(missing)}")
        subprocess.run([sys.executable, HERE / "checkpoints.py", shape, folder, *missing], check=True)
    return folder


def real_captioner(folder: Path, *, adapter: bool = True, permuted: bool = False) -> tuple[Path, Work]:
    """The recipe of the captioner of real size, and its work folder: assembled and merged at the first use.

    Without its adapter the decoder is SmolLM2 itself, which reads English; with it, it talks of pictures. The one that
    is permuted says the same with weights in another order (`permutation.py`).
    """
    name = "real-captioner" if adapter else "without-adapter"
    if permuted:
        return _permuted_captioner(folder, name, real_captioner(folder, adapter=adapter)[1])
    options: Command = [] if adapter else [folder / f"{name}-checkpoint", "--without-adapter"]
    done = subprocess.run([sys.executable, _ASSEMBLE, *options], stdout=subprocess.PIPE, text=True, check=True)
    return _merged_captioner(folder, name, Path(done.stdout.strip()))


def _permuted_captioner(folder: Path, name: str, work: Work) -> tuple[Path, Work]:
    checkpoint = folder / f"{name}-permuted-checkpoint"
    if not checkpoint.is_dir():
        progress(f"permuting {work.merged}")
        subprocess.run([sys.executable, HERE / "permutation.py", work.merged, checkpoint], check=True)
    return _merged_captioner(folder, f"{name}-permuted", checkpoint)


def _merged_captioner(folder: Path, name: str, model: Path) -> tuple[Path, Work]:
    recipe, work = folder / f"{name}.yaml", Work(folder / name)
    recipe.write_text(_REAL_RECIPE.format(model=model, images=_ASSEMBLE.with_name("images")))
    if not work.merged.is_dir():
        _vlm_export("merge", recipe, "--work", work.root)
    return recipe, work


def real_repo(folder: Path, dtypes: Sequence[str] = (), *, adapter: bool = True, permuted: bool = False) -> Work:
    """Its work folder, exported in these dtypes, or in all, unless it is."""
    recipe, work = real_captioner(folder, adapter=adapter, permuted=permuted)
    wanted = [*(dtypes or DTYPES)]
    manifest = work.repo / "export.json"
    if not manifest.is_file() or not set(wanted) <= set(read_json(manifest)["dtypes"]):
        _vlm_export("onnx", recipe, "--work", work.root, *(f"--quantize={dtype}" for dtype in wanted))
    return work


def _vlm_export(*arguments: str | Path) -> None:
    subprocess.run([CLI, *arguments], stdout=sys.stderr, check=True)


def our_export(source: Path, target: Path, component: str, dtype: str = "fp32", part: str = "base") -> Command:
    """The command that exports one component of a checkpoint without LoRA: `target/model.onnx`."""
    return [sys.executable, HERE / "export_component.py", source / part, component, target / "model.onnx", dtype]


def decoder_exports(source: Path, target: Path) -> dict[str, Command]:
    """The command of each tool that makes the same decoder's graph: `target/model.onnx`."""
    decoder = source / "decoder"
    task = ["--task", "text-generation-with-past"]
    return {
        OURS: our_export(source, target, "language_model"),
        OPTIMUM: [environment(OPTIMUM) / "optimum-cli", "export", "onnx", "--model", decoder, *task, target],
        GENAI: genai_export(decoder, target, "fp32", "exclude_embeds=true"),
    }


def genai_export(decoder: Path, target: Path, precision: str, *options: str) -> Command:
    """The command of onnxruntime-genai's builder for a decoder's folder: `target/model.onnx`, for a processor."""
    python = environment(GENAI) / "python"
    builder: Command = [python, "-m", "onnxruntime_genai.models.builder", "-i", decoder, "-o", target]
    extra = ["--extra_options", *options] if options else []
    return [*builder, "-p", precision, "-e", "cpu", "-c", "cache", *extra]


def graphs(work: Path, name: str, exports: Callable[[Path], dict[str, Command]]) -> dict[str, Path]:
    """Each tool's graph, exported into `work/graphs` when it is not there. A peer that cannot export it is left out."""
    found = {}
    for tool in exports(work):
        target = work / "graphs" / name / tool
        if not target.is_dir():
            beside = target.with_name(f".{tool}")
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            try:
                done = measured(exports(beside)[tool], beside)
            except CommandFailed as failure:
                if tool == OURS:
                    raise
                progress(f"{tool} is left out: {failure}")
                continue
            beside.rename(target)
            progress(f"{tool} exported {name}: {done.seconds:.1f} s, {done.peak_mib:.0f} MiB")
        found[tool] = target / "model.onnx"
    return found


def arguments(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="measurements of each (%(default)s)")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep checkpoints and graphs here, for the next run"
    )
    return parser


@contextmanager
def workspace(keep: Path | None) -> Iterator[Path]:
    """A folder for checkpoints and graphs, gone afterwards unless it is to be kept."""
    folder = (keep or CACHE / f"bench-work-{os.getpid()}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if keep is None:
            shutil.rmtree(folder)


def report(benchmark: str, rows: Sequence[Row], **settings: Any) -> None:
    """Print a Markdown table, and in the last line a JSON object with the same rows and what they were measured on."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(_cell(row.get(column)) for column in columns) + " |")
    machine = {"cpus": os.cpu_count(), "architecture": platform.machine(), "load_average": os.getloadavg()}
    versions = {name: version(name) for name in _VERSIONS} | _REQUIREMENTS
    print(
        "\n" + json.dumps({"benchmark": benchmark, **settings, "machine": machine, "versions": versions, "rows": rows})
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
