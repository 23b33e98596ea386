"""Measure an exported repo by runtime and dtype: load time, time to the first token, tokens a second, peak memory.

Every figure is a median over rounds; in each, every (runtime, dtype) has a process of its own, and they take turns, so
that what disturbs the machine disturbs all of them. A process loads the repo, captions for a second to warm up, then
captions every image, again for a second at least, each with the same number of new tokens. All of it is greedy.

The runtimes: `ort` is `vlm_export.runtime` in Python; `node` is stock transformers.js with onnxruntime-node; `wasm` is
the same with onnxruntime-web's WASM build, in Node.
"""

from __future__ import annotations

import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, TypeVar

import psutil
from pydantic import Field
from typing_extensions import TypedDict  # pydantic reads the standard library's from Python 3.12 on

from vlm_export import bundled
from vlm_export.apps.load import load
from vlm_export.contract import TASK
from vlm_export.errors import CheckFailed, InputError
from vlm_export.files import sha256
from vlm_export.own_files import check_files
from vlm_export.recipe import RecipeFile
from vlm_export.runtime.drivers import graphs_of
from vlm_export.runtime.repo import ONNX, SUFFIXES, Repo, complete_dtypes, open_repo
from vlm_export.targets import BENCH_TARGETS, BenchTarget
from vlm_export.web import node_runtime
from vlm_export.web.captions import Item

Progress = Callable[[str, int, int], None]
Result = TypeVar("Result")
IMAGES = 4
WARM_UP_SECONDS = 1.0
MEASURED_SECONDS = 1.0  # a caption of a small model takes milliseconds, in which a machine does anything
_PROMPT = "Describe this image."
_BROWSER_THREADS = 4  # the most that onnxruntime-web takes by itself


@dataclass(frozen=True, eq=False)
class Job:
    """What one process measures: a repo, in one runtime and dtype, on which images."""

    repo: Path
    layout: str
    runtime: BenchTarget
    dtype: str
    images: tuple[Path, ...]
    prompt: str | list[dict[str, Any]] | None
    new_tokens: int
    threads: int


@dataclass(frozen=True)
class Sample:
    """What one process measured: the medians of its captions, and the versions of what ran there."""

    load_seconds: float
    first_token_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Row:
    """The medians of the rounds of one runtime and dtype; or why there are none.

    `tokens_per_second_range` is the slowest and the fastest round.
    """

    runtime: BenchTarget
    dtype: str
    threads: int
    graph_bytes: int
    load_seconds: float | None = None
    first_token_seconds: float | None = None
    tokens_per_second: float | None = None
    tokens_per_second_range: tuple[float, float] | None = None
    peak_memory_bytes: int | None = None
    failure: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it has all that was measured, or says why there is nothing; memory is not known everywhere."""
        figures = (self.load_seconds, self.first_token_seconds, self.tokens_per_second, self.tokens_per_second_range)
        return self.failure is not None or None not in figures


class Machine(TypedDict):
    """What it was measured on."""

    cpu: str
    cpus: int | None
    memory_bytes: int
    system: str


@dataclass(frozen=True)
class Benchmark:
    """`bench.json`. `graphs_sha256` are the graphs that were measured."""

    model: str
    layout: str
    images: Annotated[list[str], Field(min_length=1)]
    prompt: str | None
    new_tokens: int
    rounds: int
    machine: Machine
    versions: dict[BenchTarget, dict[str, str]]
    graphs_sha256: dict[str, str]
    rows: list[Row]
    schema: int = 1

    @property
    def failures(self) -> list[Row]:
        """The rows of what did not run."""
        return [row for row in self.rows if row.failure]


def images_of(recipe: RecipeFile | None) -> tuple[Path, ...]:
    """The first of a recipe's golden images, or of the bundled ones where it has none.

    Raises:
        InputError: one is a link that leads out of the golden.
    """
    for folder in (recipe.golden_dir if recipe else None, bundled.GOLDEN / bundled.DEFAULT_RECIPE):
        if folder:
            check_files(folder, ["images/*"])
        found = sorted((folder / "images").glob("*")) if folder else []
        if found:
            return tuple(found[:IMAGES])
    raise InputError("no images to caption: give one with --image")


def bench(
    folder: Path,
    images: Sequence[Path],
    *,
    runtimes: Sequence[BenchTarget] = (),
    dtypes: Sequence[str] = (),
    prompt: str | None = None,
    new_tokens: int = 32,
    rounds: int = 3,
    threads: int = 0,
    progress: Progress = lambda *_: None,
) -> Benchmark:
    """Measure a repo; by default in every runtime that loads its layout, and every dtype that it has.

    `threads` 0 is what each runtime takes by itself. A dtype that does not run has a row that says why.

    Raises:
        InputError: a dtype or an image is missing, the layout is not for that runtime, or Node cannot be had.
    """
    repo = open_repo(folder)
    components = graphs_of(repo.files)
    dtypes = _dtypes(repo, components, dtypes)
    runtimes = loadable(repo, runtimes)
    for image in images:
        if not image.is_file():
            raise InputError(f"{image}: no such image")
    if prompt is not None and not repo.takes_prompt:
        raise InputError(f"{repo.name}: a {repo.layout} repo takes no prompt: drop --prompt")
    if prompt is None and repo.takes_prompt and not repo.has_prefix:
        prompt = TASK if repo.layout == "tasks" else _PROMPT
    jobs = [
        Job(
            folder.absolute(),
            repo.layout,
            runtime,
            dtype,
            tuple(images),
            _asked(repo, prompt),
            new_tokens,
            threads or _own_threads(runtime),
        )
        for runtime in runtimes
        for dtype in dtypes
    ]
    samples, failures = _rounds(jobs, rounds, progress)
    files = {dtype: [folder / ONNX / f"{name}{SUFFIXES[dtype]}.onnx" for name in components] for dtype in dtypes}
    return Benchmark(
        model=repo.name,
        layout=repo.layout,
        images=[image.name for image in images],
        prompt=prompt,
        new_tokens=new_tokens,
        rounds=rounds,
        machine=_machine(),
        versions={job.runtime: samples[job][0].versions for job in jobs if samples[job]},
        graphs_sha256={path.name: sha256(path) for paths in files.values() for path in paths},
        rows=[_row(job, files[job.dtype], samples[job], failures.get(job)) for job in jobs],
    )


def _dtypes(repo: Repo, components: Sequence[str], wanted: Sequence[str]) -> list[str]:
    have = complete_dtypes(repo.graph_files, components)
    missing = [dtype for dtype in wanted if dtype not in have]
    if missing or not have:
        raise InputError(
            f"{repo.path / ONNX}: no {' or '.join(missing) or 'graphs'}; it has {', '.join(have) or 'none'}"
        )
    return list(dict.fromkeys(wanted)) or have


def loadable(repo: Repo, wanted: Sequence[BenchTarget]) -> list[BenchTarget]:
    """Those that are wanted, or all that load this layout.

    Raises:
        InputError: one does not load it, or Node cannot be had.
    """
    able: tuple[BenchTarget, ...] = ("ort",) if repo.layout in ("components", "single") else BENCH_TARGETS
    for runtime in wanted:
        if runtime not in able:
            raise InputError(f"{repo.name}: transformers.js does not load the layout {repo.layout}: use --runtime ort")
    chosen = list(dict.fromkeys(wanted)) or list(able)
    if set(chosen) - {"ort"}:
        node_runtime.node_home()
    return chosen


def _asked(repo: Repo, prompt: str | None) -> str | list[dict[str, Any]] | None:
    """A prompt as the client of a layout takes it."""
    if repo.fed_as != "chat":
        return prompt if repo.takes_prompt else None
    text = [{"type": "text", "text": prompt}] if prompt else []
    return [{"role": "user", "content": [{"type": "image"}, *text]}]


def _own_threads(runtime: BenchTarget) -> int:
    """What the runtime takes by itself: one for each core; onnxruntime-web half of the CPUs, up to four."""
    cpus = os.cpu_count() or 1
    if runtime == "wasm":
        return min(_BROWSER_THREADS, math.ceil(cpus / 2))
    return psutil.cpu_count(logical=False) or cpus


def _rounds(jobs: Sequence[Job], rounds: int, progress: Progress) -> tuple[dict[Job, list[Sample]], dict[Job, str]]:
    """The samples of each job; one that fails is not run again."""
    samples: dict[Job, list[Sample]] = {job: [] for job in jobs}
    failures: dict[Job, str] = {}
    for number in range(rounds):
        for place, job in enumerate(jobs):
            progress(f"{job.runtime} {job.dtype}", number * len(jobs) + place, rounds * len(jobs))
            if job in failures:
                continue
            try:
                samples[job].append(_in_python(job) if job.runtime == "ort" else _in_node(job))
            except CheckFailed as error:
                failures[job] = str(error)
    return samples, failures


def _row(job: Job, graphs: Sequence[Path], samples: Sequence[Sample], failure: str | None) -> Row:
    size = sum(file.stat().st_size for graph in graphs for file in graph.parent.glob(f"{graph.name}*"))
    if failure is not None:
        return Row(job.runtime, job.dtype, job.threads, size, failure=failure)
    rates = [sample.tokens_per_second for sample in samples]
    return Row(
        job.runtime,
        job.dtype,
        job.threads,
        size,
        statistics.median(sample.load_seconds for sample in samples),
        statistics.median(sample.first_token_seconds for sample in samples),
        statistics.median(rates),
        (min(rates), max(rates)),
        round(statistics.median(sample.peak_memory_bytes for sample in samples)),
    )


# One process


def _in_python(job: Job) -> Sample:
    """Raises CheckFailed when the graphs do not run; InputError for what the user can mend."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_caption, job).result()
    except BrokenProcessPool as error:
        raise CheckFailed(f"{job.runtime} {job.dtype}: the process died, perhaps of too little memory") from error


def _caption(job: Job) -> Sample:
    import onnxruntime

    from vlm_export import runtime
    from vlm_export.runtime.images import open_image

    options = runtime.Options(
        max_new_tokens=job.new_tokens, min_new_tokens=job.new_tokens, num_beams=1, do_sample=False
    )
    started = time.perf_counter()
    try:
        model = load(job.repo, dtype=job.dtype, backend="onnx", threads=job.threads)
    except InputError as error:
        raise CheckFailed(str(error)) from error
    loaded = time.perf_counter()

    def caption(path: Path) -> tuple[float, float]:
        """Seconds to the first token, and tokens a second after it."""
        started = time.perf_counter()
        image = open_image(path)
        opened = time.perf_counter() - started
        answer = model.generate([image], job.prompt, options)
        first = answer.first_token_seconds
        if model.layout == "single":  # all tokens come at once, so that the first has a run of its own
            first = model.generate([image], job.prompt, replace(options, max_new_tokens=1, min_new_tokens=1)).seconds
        decoding = answer.seconds - first
        return opened + first, _rate(len(answer.token_ids), job.new_tokens, decoding)

    _until(WARM_UP_SECONDS, job.images, caption)
    firsts, rates = zip(*_until(MEASURED_SECONDS, job.images, caption), strict=True)
    return Sample(
        loaded - started,
        statistics.median(firsts),
        statistics.median(rates),
        peak_memory_bytes(),
        {"ONNX Runtime": onnxruntime.__version__, "Python": platform.python_version()},
    )


def _until(seconds: float, images: Sequence[Path], caption: Callable[[Path], Result]) -> list[Result]:
    """Caption all images, and all of them again until `seconds` have passed; returns every caption."""
    started = time.perf_counter()
    made = [caption(path) for path in images]
    while time.perf_counter() - started < seconds:
        made += [caption(path) for path in images]
    return made


def _in_node(job: Job) -> Sample:
    """Raises CheckFailed when the repo does not load or run there."""
    assert job.layout not in ("components", "single") and job.runtime in ("node", "wasm")
    result = node_runtime.caption(
        job.repo,
        layout=job.layout,  # type: ignore[arg-type]
        dtype=job.dtype,
        items=[Item(path, prompt=job.prompt or "") for path in job.images],
        generation={"max_new_tokens": job.new_tokens, "min_new_tokens": job.new_tokens, "num_beams": 1},
        target=job.runtime,
        threads=job.threads,
        warm_up_seconds=WARM_UP_SECONDS,
        repeat_seconds=MEASURED_SECONDS,
    )
    rates = [
        _rate(len(made.token_ids), job.new_tokens, (made.milliseconds - made.first_token_milliseconds) / 1e3)
        for made in result.captions
    ]
    return Sample(
        result.load_milliseconds / 1e3,
        statistics.median(made.first_token_milliseconds / 1e3 for made in result.captions),
        statistics.median(rates),
        result.peak_memory_bytes,
        {
            "transformers.js": result.versions["transformers"],
            f"onnxruntime-{'web' if job.runtime == 'wasm' else 'node'}": result.versions["onnxruntime"],
            "Node": result.versions["node"].removeprefix("v"),
        },
    )


def _rate(tokens: int, wanted: int, seconds: float) -> float:
    """Tokens a second after the first one.

    Raises:
        CheckFailed: there are not as many as all others were measured with.
    """
    if tokens != wanted:
        raise CheckFailed(f"{tokens} new tokens in place of {wanted}")
    return (tokens - 1) / seconds


def peak_memory_bytes() -> int:
    """The most memory that this process has held.

    Not `getrusage` where it can be had otherwise: on Linux a process takes over its parent's at the start.
    """
    status = Path("/proc/self/status")
    text = status.read_text(encoding="utf-8") if status.is_file() else ""
    if peak := re.search(r"^VmHWM:\s*(\d+) kB$", text, re.MULTILINE):
        return int(peak[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # Windows has no such module

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _machine() -> Machine:
    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "memory_bytes": psutil.virtual_memory().total,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    if found := re.search(r"^model name\s*: (.+)$", text, re.MULTILINE):
        return found[1].strip()
    if sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return platform.processor() or platform.machine()
