"""What each dtype of the captioner of real size costs in time and memory, on ONNX Runtime with two threads.

python benchmarks/dtypes.py                   # its decoder: load, prefill, tokens a second, a whole caption, memory
python benchmarks/dtypes.py --prefix 257      # after as many rows as its own tower gives (196: SigLIP-base/16-224)
python benchmarks/dtypes.py --what export     # what an export in a dtype takes, and what that is more than fp32 alone

Graphs are driven by the runtime of `vlm-export run`, each in a process of its own. A caption is a prefill and 20 tokens
after it. An export finds the traced graphs of an earlier one, so that the difference is the dtype's own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import harness
import numpy as np
from harness import Measured, Row

from vlm_export.dtypes import DTYPES, FP32

DECODER = "decoder_model_merged"
CAPTION_TOKENS = 20


@dataclass(frozen=True)
class Work:
    """What one run does."""

    repo: Path
    dtype: str
    prefix: int
    repeats: int
    threads: int


@dataclass(frozen=True)
class Timing:
    """One process: medians of its repeats, the most memory that was resident, and the size of the graph's files."""

    load_s: float
    prefill_ms: float
    caption_ms: float
    peak_mib: float
    graph_mb: float

    @property
    def tokens_per_s(self) -> float:
        return CAPTION_TOKENS / (self.caption_ms - self.prefill_ms) * 1000


def run(work: Work) -> Timing:
    """Load, caption once for warmth, then measure."""
    from vlm_export.measure.bench import peak_memory_bytes
    from vlm_export.runtime.drivers import choose_driver
    from vlm_export.runtime.repo import ONNX, SUFFIXES, open_repo
    from vlm_export.runtime.sessions import Sessions

    repo = open_repo(work.repo)
    sessions = Sessions(work.repo / ONNX, SUFFIXES[work.dtype], work.threads)
    started = time.perf_counter()
    shapes = {value.name: value.shape for value in sessions.session(DECODER).get_inputs()}
    load_s = time.perf_counter() - started
    hidden = shapes["encoder_hidden_states"][-1]
    prefix = np.random.default_rng(0).normal(scale=0.1, size=(1, work.prefix, hidden)).astype(np.float32)
    driver = choose_driver(repo.files).on(sessions)

    def caption() -> tuple[float, float]:
        """Seconds of the prefill, and of all."""
        started = time.perf_counter()
        done = driver.prefill({"image_features": prefix, "input_ids": np.empty((1, 0), np.int64)})
        prefilled = time.perf_counter()
        for _ in range(CAPTION_TOKENS):
            done = driver.step(done.logits[:, -1:].argmax(-1), done.cache, {"image_features": prefix})
        return prefilled - started, time.perf_counter() - started

    caption()
    prefill_s, caption_s = zip(*(caption() for _ in range(work.repeats)), strict=True)
    return Timing(
        load_s=load_s,
        prefill_ms=statistics.median(prefill_s) * 1000,
        caption_ms=statistics.median(caption_s) * 1000,
        peak_mib=peak_memory_bytes() / 2**20,
        graph_mb=sum(path.stat().st_size for path in sessions.folder.glob(f"{sessions.path(DECODER).name}*")) / 1e6,
    )


def speed(folder: Path, options: argparse.Namespace) -> list[Row]:
    """Each dtype's decoder."""
    dtypes = _with_fp32(options.dtype)
    repo = harness.real_repo(folder, dtypes).repo
    found: list[Row] = []
    for prefix in options.prefix:
        works = {name: Work(repo, name, prefix, options.repeats, options.threads) for name in dtypes}
        candidates = {name: partial(harness.in_new_process, run, work) for name, work in works.items()}
        found += speed_rows(harness.alternating(options.rounds, candidates), prefix)
    return found


def speed_rows(timings: dict[str, list[Timing]], prefix: int) -> list[Row]:
    """Medians, and how many times as fast as fp32 each dtype is."""

    def median(runs: Sequence[Timing], name: str) -> float:
        return statistics.median(getattr(timing, name) for timing in runs)

    def ratio(name: str, over: Sequence[Timing], under: Sequence[Timing]) -> float:
        return harness.median_ratio([getattr(t, name) for t in over], [getattr(t, name) for t in under])

    fp32 = timings[FP32.name]
    return [
        {
            "prefix": prefix,
            "dtype": name,
            "file MB": runs[0].graph_mb,
            "load s": median(runs, "load_s"),
            "prefill ms": median(runs, "prefill_ms"),
            "decode tok/s": median(runs, "tokens_per_s"),
            "caption ms": median(runs, "caption_ms"),
            "peak MiB": median(runs, "peak_mib"),
            "prefill, × fp32": ratio("prefill_ms", fp32, runs),
            "decode, × fp32": ratio("tokens_per_s", runs, fp32),
            "caption, × fp32": ratio("caption_ms", fp32, runs),
        }
        for name, runs in timings.items()
    ]


def export(folder: Path, options: argparse.Namespace) -> list[Row]:
    """`vlm-export onnx` in each dtype; fp32 is always written beside it."""
    recipe, work = harness.real_captioner(folder)

    def run(dtype: str) -> Measured:
        command: harness.Command = [harness.CLI, "onnx", recipe, "--work", work.root, "--quantize", dtype]
        return harness.measured(command, folder)

    harness.progress("once, uncounted: fp32")
    run(FP32.name)
    candidates: dict[str, Callable[[], Measured]] = {name: partial(run, name) for name in _with_fp32(options.dtype)}
    return export_rows(harness.alternating(options.rounds, candidates))


def export_rows(results: dict[str, list[Measured]]) -> list[Row]:
    """Medians, and what each dtype takes more than fp32 alone: the medians of the rounds' differences."""
    fp32 = results[FP32.name]
    return [
        {
            "export in": name if name == FP32.name else f"{FP32.name}, {name}",
            "wall s": statistics.median(run.seconds for run in runs),
            "peak MiB": statistics.median(run.peak_mib for run in runs),
            "adds s": statistics.median(a.seconds - b.seconds for a, b in zip(runs, fp32, strict=True)),
            "adds MiB": statistics.median(a.peak_mib - b.peak_mib for a, b in zip(runs, fp32, strict=True)),
        }
        for name, runs in results.items()
    ]


def _with_fp32(dtypes: Sequence[str]) -> list[str]:
    """The dtypes that are asked for, or all, after fp32, which they are compared with."""
    return list(dict.fromkeys([FP32.name, *(dtypes or DTYPES)]))


WHAT = {"speed": speed, "export": export}


def main() -> None:
    parser = harness.arguments(__doc__, rounds=5)
    parser.add_argument("--what", choices=WHAT, default="speed", help="(%(default)s)")
    parser.add_argument("--dtype", action="append", default=[], choices=DTYPES, help="repeats (all)")
    parser.add_argument("--prefix", type=int, nargs="+", default=[196], help="rows before the first token (196)")
    parser.add_argument("--repeats", type=int, default=3, help="of each process (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    options = parser.parse_args()
    with harness.workspace(options.keep) as folder:
        rows = WHAT[options.what](folder, options)
    harness.report("dtypes", rows, what=options.what, rounds=options.rounds, threads=options.threads)


if __name__ == "__main__":
    main()
