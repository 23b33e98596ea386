"""A decoder with cross-attention: the image's keys and values carried in the cache, or computed at every step.

python benchmarks/cross_attention.py

Ours runs twice with one loop: as transformers.js feeds it, and with the cross-attention's part of the cache withheld,
so that it reads the image at every step. The optimum-onnx graph, in the layout of the published exports, always does.
All start from one token and random states in the place of the image's 197 patches; tokens are compared with PyTorch's.
"""

from __future__ import annotations

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

WITHHELD = f"{OURS}, cross cache withheld"
_FILES = {OPTIMUM: "decoder_model_merged.onnx"}
_CROSS = ".encoder."
_START = 1


@dataclass(frozen=True)
class Work:
    """What one run does."""

    checkpoint: Path
    rows: int
    hidden: int
    steps: int
    threads: int

    def states(self) -> np.ndarray:
        """`[1, rows, hidden] float32`, the same in every run."""
        return np.random.default_rng(0).normal(size=(1, self.rows, self.hidden)).astype(np.float32)


@dataclass(frozen=True)
class Timing:
    """One run; `tokens` has one more than there were steps."""

    prefill_ms: float
    step_ms: float
    tokens: list[int]


class Graph:
    """A decoder graph, fed as transformers.js feeds it: what it gives for `.encoder.` is taken from its first run."""

    def __init__(self, path: Path, work: Work, *, withheld: bool = False):
        options = ort.SessionOptions()
        options.intra_op_num_threads = work.threads
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.states = ort.OrtValue.ortvalue_from_numpy(work.states())
        self.withheld = withheld

    def start(self) -> None:
        """Forget the past."""
        self.first = True
        self.past = {name: _empty(value.shape) for name, value in self.inputs.items() if name.startswith("past_key_")}

    def step(self, token: int) -> int:
        """The token after `token`."""
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([[token]]))
        binding.bind_ortvalue_input("encoder_hidden_states", self.states)
        if "use_cache_branch" in self.inputs:
            binding.bind_cpu_input("use_cache_branch", np.array([not self.first]))
        for name, value in self.past.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        results = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        kept = [name for name in self.past if _CROSS in name and (self.withheld or not self.first)]
        self.past |= {
            name: results[name.replace("past_key_values", "present")] for name in self.past if name not in kept
        }
        self.first = False
        return int(results["logits"].numpy()[0, -1].argmax())


class Eager:
    """The same loop around the PyTorch model."""

    def __init__(self, work: Work):
        import torch
        from transformers import VisionEncoderDecoderModel

        torch.set_num_threads(work.threads)
        self.torch = torch
        self.decoder = VisionEncoderDecoderModel.from_pretrained(work.checkpoint, dtype=torch.float32).eval().decoder
        self.states = torch.from_numpy(work.states())

    def start(self) -> None:
        self.past = None

    def step(self, token: int) -> int:
        with self.torch.inference_mode():
            done = self.decoder(
                input_ids=self.torch.tensor([[token]]),
                encoder_hidden_states=self.states,
                past_key_values=self.past,
                use_cache=True,
            )
        self.past = done.past_key_values
        return int(done.logits[0, -1].argmax())


def _empty(shape: list[int | str]) -> ort.OrtValue:
    """An input of the cache before the first run: one row of nothing."""
    sizes = [size if isinstance(size, int) else int(size == "batch_size") for size in shape]
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(sizes, np.float32))


def run(make: Callable[[Work], Graph | Eager], work: Work) -> Timing:
    """Load, run once for warmth, then measure."""
    decoder = make(work)
    _generate(decoder, 2)
    return _generate(decoder, work.steps)


def _generate(decoder: Graph | Eager, steps: int) -> Timing:
    decoder.start()
    started = time.perf_counter()
    tokens = [decoder.step(_START)]
    prefilled = time.perf_counter()
    for _ in range(steps):
        tokens.append(decoder.step(tokens[-1]))
    return Timing((prefilled - started) * 1000, (time.perf_counter() - prefilled) * 1000 / steps, tokens)


def exports(source: Path, target: Path) -> dict[str, Command]:
    """The command of each tool that makes the decoder's graph: in `target`."""
    optimum: Command = [harness.environment(OPTIMUM) / "optimum-cli", "export", "onnx"]
    return {
        OURS: harness.our_export(source, target, "decoder_model_merged", part="encoder-decoder"),
        OPTIMUM: [*optimum, "--model", source / "encoder-decoder", "--task", "image-to-text-with-past", target],
    }


def rows(timings: dict[str, list[Timing]]) -> list[Row]:
    """Medians, and how many times as fast ours is as each of the others."""
    ours = timings[OURS]
    return [
        {
            "decoder": name,
            "prefill ms": statistics.median(t.prefill_ms for t in runs),
            "ms per token": statistics.median(t.step_ms for t in runs),
            "ours ×": harness.median_ratio([t.step_ms for t in runs], [t.step_ms for t in ours]),
            "PyTorch's tokens": f"{np.mean(np.array(runs[0].tokens) == np.array(timings[EAGER][0].tokens)):.0%}",
        }
        for name, runs in timings.items()
    ]


def main() -> None:
    parser = harness.arguments(__doc__, rounds=5)
    parser.add_argument("--shape", default="vit-gpt2", help="of checkpoints.py, in float32 (%(default)s)")
    parser.add_argument("--rows", type=int, default=197, help="of the encoder's states (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="tokens to decode (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    options = parser.parse_args()
    with harness.workspace(options.keep) as folder:
        source = harness.checkpoint(folder, options.shape, "encoder-decoder")
        graphs = harness.graphs(folder, f"{options.shape}-cross", partial(exports, source))
        merged = {tool: path.with_name(_FILES.get(tool, path.name)) for tool, path in graphs.items()}
        work = Work(source / "encoder-decoder", options.rows, _hidden(merged[OURS]), options.steps, options.threads)
        decoders: dict[str, Callable[[Work], Graph | Eager]] = {
            **{tool: partial(Graph, path) for tool, path in merged.items()},
            WITHHELD: partial(Graph, merged[OURS], withheld=True),
            EAGER: Eager,
        }
        candidates = {name: partial(harness.in_new_process, run, make, work) for name, make in decoders.items()}
        found = rows(harness.alternating(options.rounds, candidates))
    harness.report("cross_attention", found, shape=options.shape, rounds=options.rounds, threads=options.threads)


def _hidden(graph: Path) -> int:
    """The width of the encoder's states."""
    import onnx_ir as ir

    states = next(value for value in ir.load(graph).graph.inputs if value.name == "encoder_hidden_states")
    assert states.shape is not None
    width = states.shape[2]
    assert isinstance(width, int), "the width of a trained model is known"
    return width


if __name__ == "__main__":
    main()
