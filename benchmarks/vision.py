"""The SigLIP-base encoder: our graph, the optimum-onnx graph and PyTorch, on two threads.

python benchmarks/vision.py

The tower without its pooling head, which a prefix does not use: the head is cut off the optimum-onnx graph. Every graph
runs in this environment's ONNX Runtime, in a process of its own; outputs are compared with PyTorch's.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import harness
import numpy as np
import onnxruntime as ort
from harness import EAGER, OPTIMUM, OURS, Command, Row

OUTPUT = "last_hidden_state"


@dataclass(frozen=True)
class Work:
    """What one run does."""

    tower: Path
    batch: int
    repeats: int
    threads: int

    def pixels(self) -> np.ndarray:
        """`[batch, 3, size, size] float32`, the same in every run."""
        size = json.loads((self.tower / "config.json").read_text())["image_size"]
        return np.random.default_rng(0).uniform(-1, 1, (self.batch, 3, size, size)).astype(np.float32)


@dataclass(frozen=True)
class Timing:
    """One process: the median of its repeats, and what came out."""

    load_s: float
    encode_ms: float
    features: np.ndarray


class Graph:
    """An ONNX graph that encodes pixels."""

    def __init__(self, path: Path, work: Work):
        options = ort.SessionOptions()
        options.intra_op_num_threads = work.threads
        started = time.perf_counter()
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.load_s = time.perf_counter() - started

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        return np.asarray(self.session.run([OUTPUT], {"pixel_values": pixels})[0])


class Eager:
    """The PyTorch tower that encodes pixels."""

    def __init__(self, work: Work):
        import torch
        from transformers import SiglipVisionConfig, SiglipVisionModel

        torch.set_num_threads(work.threads)
        self.torch = torch
        started = time.perf_counter()
        config = SiglipVisionConfig.from_pretrained(work.tower, vision_use_head=False)
        self.model = SiglipVisionModel.from_pretrained(work.tower, config=config, dtype=torch.float32).eval()
        self.load_s = time.perf_counter() - started

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        with self.torch.inference_mode():
            return self.model(self.torch.from_numpy(pixels)).last_hidden_state.numpy()


def run(make: Callable[[Work], Graph | Eager], work: Work) -> Timing:
    """Load, encode once for warmth, then measure."""
    encoder = make(work)
    pixels = work.pixels()
    features = encoder.encode(pixels)
    seconds = []
    for _ in range(work.repeats):
        started = time.perf_counter()
        encoder.encode(pixels)
        seconds.append(time.perf_counter() - started)
    return Timing(encoder.load_s, statistics.median(seconds) * 1000, features)


def exports(source: Path, target: Path) -> dict[str, Command]:
    """The command of each tool that makes the tower's graph: `target/model.onnx`."""
    task = ["--task", "feature-extraction"]
    optimum: Command = [harness.environment(OPTIMUM) / "optimum-cli", "export", "onnx", "--model", source / "tower"]
    return {OURS: harness.our_export(source, target, "vision_encoder"), OPTIMUM: [*optimum, *task, target]}


def without_head(path: Path) -> Path:
    """The graph with one output and what it needs: ONNX Runtime would compute the rest in each run."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    target = path.with_name("tower.onnx")
    model = ir.load(path)
    model.graph.outputs[:] = [output for output in model.graph.outputs if output.name == OUTPUT]
    RemoveUnusedNodesPass()(model)
    ir.save(model, target)
    return target


def rows(timings: dict[str, list[Timing]], work: Work) -> list[Row]:
    """Medians, and how many times as fast ours is as each of the others."""
    ours, reference = timings[OURS], timings[EAGER][0].features
    return [
        {
            "batch": work.batch,
            "encoder": name,
            "load s": statistics.median(t.load_s for t in runs),
            "encode ms": statistics.median(t.encode_ms for t in runs),
            "ours ×": harness.median_ratio([t.encode_ms for t in runs], [t.encode_ms for t in ours]),
            "difference from PyTorch": f"{np.abs(runs[0].features - reference).max() / np.abs(reference).max():.0e}",
        }
        for name, runs in timings.items()
    ]


def main() -> None:
    parser = harness.arguments(__doc__, rounds=9)
    parser.add_argument("--shape", default="smollm-135m", help="whose tower, of checkpoints.py (%(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="(1 and 4)")
    parser.add_argument("--repeats", type=int, default=5, help="of each process (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    options = parser.parse_args()
    found: list[Row] = []
    with harness.workspace(options.keep) as folder:
        source = harness.checkpoint(folder, options.shape, "base", "tower")
        graphs = harness.graphs(folder, f"{options.shape}-tower", partial(exports, source))
        graphs[OPTIMUM] = without_head(graphs[OPTIMUM])
        encoders = {name: partial(Graph, path) for name, path in graphs.items()} | {EAGER: Eager}
        for batch in options.batch:
            work = Work(source / "tower", batch, options.repeats, options.threads)
            candidates = {name: partial(harness.in_new_process, run, make, work) for name, make in encoders.items()}
            found += rows(harness.alternating(options.rounds, candidates), work)
    harness.report("vision", found, shape=options.shape, rounds=options.rounds, threads=options.threads)


if __name__ == "__main__":
    main()
