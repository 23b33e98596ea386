"""Loading, prefill and decoding of one decoder: our graph, the peers' graphs and PyTorch, on two threads.

python benchmarks/decode.py

Every graph runs in this environment's ONNX Runtime, in a process of its own, with one loop: 196 embeddings first, then
one token after the other, the cache kept as OrtValues. The optimum-onnx graph takes the 196 token ids whose embeddings
the others get. All are greedy, and tokens are compared with PyTorch's.
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
from harness import EAGER, OURS, Row
from safetensors import safe_open

PREFIX = 196  # the patches of SigLIP-base/16-224
_FEATURES = "encoder_hidden_states"
_TABLES = ("model.embed_tokens.weight", "transformer.wte.weight")


@dataclass(frozen=True)
class Work:
    """What one run does."""

    decoder: Path
    batch: int
    steps: int
    threads: int

    def prefix(self) -> np.ndarray:
        """`[batch, 196] int64`, the same in every run."""
        vocabulary = len(self.table())
        return np.random.default_rng(0).integers(vocabulary, size=(self.batch, PREFIX))

    def table(self) -> np.ndarray:
        """The token embeddings, `[vocabulary, hidden] float32`."""
        with safe_open(self.decoder / "model.safetensors", framework="numpy") as file:
            return file.get_tensor(next(name for name in _TABLES if name in file.keys()))  # noqa: SIM118 - not a dict

    def empty_cache(self) -> np.ndarray:
        """A layer's keys or values before the first token, `[batch, kv_heads, 0, head_dim] float32`.

        From the config, because the genai builder's graph does not declare its head_dim.
        """
        config = json.loads((self.decoder / "config.json").read_text())
        hidden = config.get("hidden_size") or config["n_embd"]
        heads = config.get("num_attention_heads") or config["n_head"]
        return np.zeros((self.batch, config.get("num_key_value_heads", heads), 0, hidden // heads), np.float32)


@dataclass(frozen=True)
class Timing:
    """One run; `tokens` is `[steps + 1][batch]`."""

    load_s: float
    prefill_ms: float
    tokens_per_s: float
    tokens: list[list[int]]


class Graph:
    """A decoder graph behind a loop that feeds whatever it declares: embeddings or ids, mask, positions.

    A captioner's takes the embeddings of the first tokens as an image's features, and ids after that.
    """

    def __init__(self, path: Path, work: Work):
        options = ort.SessionOptions()
        options.intra_op_num_threads = work.threads
        started = time.perf_counter()
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.load_s = time.perf_counter() - started
        self.table = work.table()
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.empty = work.empty_cache()

    def start(self) -> None:
        """Forget the past."""
        self.length = 0
        self.past = {
            name: ort.OrtValue.ortvalue_from_numpy(self.empty) for name in self.inputs if name.startswith("past_key_")
        }

    def step(self, ids: np.ndarray) -> np.ndarray:
        """The next token of each row, `[batch]`, after `ids` `[batch, length]`."""
        return self.logits(ids, self.table[ids]).argmax(-1)

    def logits(self, ids: np.ndarray, embeds: np.ndarray) -> np.ndarray:
        """`[batch, vocabulary]` after `ids` `[batch, length]`, whose embeddings are `[batch, length, hidden]`."""
        total = self.length + ids.shape[1]
        if self.length == 0:
            self.features = embeds
        reads_features = _FEATURES in self.inputs and self.length == 0
        feeds = {
            "input_ids": lambda: ids[:, :1] if reads_features else ids,
            _FEATURES: lambda: self.features,
            "inputs_embeds": lambda: embeds,
            "attention_mask": lambda: np.ones((len(ids), total), np.int64),
            "position_ids": lambda: np.tile(np.arange(self.length, total), (len(ids), 1)),
        }
        binding = self.session.io_binding()
        for name in self.inputs:
            if name in self.past:
                binding.bind_ortvalue_input(name, self.past[name])
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(feeds[name]()))
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        results = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        self.past = {name: results[name.replace("past_key_values", "present")] for name in self.past}
        self.length = total
        return results["logits"].numpy()[:, -1]


class Eager:
    """The same loop around the PyTorch model."""

    def __init__(self, work: Work):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(work.threads)
        self.torch = torch
        started = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(work.decoder, dtype=torch.float32).eval()
        self.load_s = time.perf_counter() - started

    def start(self) -> None:
        self.past = None

    def step(self, ids: np.ndarray) -> np.ndarray:
        with self.torch.inference_mode():
            embeds = self.model.get_input_embeddings()(self.torch.from_numpy(ids))
            done = self.model(inputs_embeds=embeds, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past = done.past_key_values
        return done.logits[:, -1].argmax(-1).numpy()


def run(make: Callable[[Work], Graph | Eager], work: Work) -> Timing:
    """Load, run once for warmth, then measure."""
    decoder = make(work)
    generate(decoder, work.prefix(), 2)
    [prefill_s, *step_s], tokens = generate(decoder, work.prefix(), work.steps)
    return Timing(decoder.load_s, prefill_s * 1000, work.batch * work.steps / sum(step_s), tokens)


def generate(
    decoder: Graph | Eager, ids: np.ndarray, steps: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[float], list[list[int]]]:
    """Seconds of the prefill and of each step, and the greedy tokens after each, `[steps + 1][batch]`."""
    decoder.start()
    times, tokens = [clock()], [decoder.step(ids)]
    times.append(clock())
    for _ in range(steps):
        tokens.append(decoder.step(tokens[-1][:, None]))
        times.append(clock())
    return np.diff(times).tolist(), [token.tolist() for token in tokens]


def rows(timings: dict[str, list[Timing]], work: Work) -> list[Row]:
    """Medians, and how many times as fast ours is as each of the others."""
    ours = timings[OURS]
    return [
        {
            "batch": work.batch,
            "decoder": name,
            "load s": statistics.median(t.load_s for t in runs),
            "prefill ms": statistics.median(t.prefill_ms for t in runs),
            "decode tok/s": statistics.median(t.tokens_per_s for t in runs),
            "ours, prefill ×": harness.median_ratio([t.prefill_ms for t in runs], [t.prefill_ms for t in ours]),
            "ours, decode ×": harness.median_ratio([t.tokens_per_s for t in ours], [t.tokens_per_s for t in runs]),
            "PyTorch's tokens": f"{np.mean(np.array(runs[0].tokens) == np.array(timings[EAGER][0].tokens)):.0%}",
        }
        for name, runs in timings.items()
    ]


def main() -> None:
    parser = harness.arguments(__doc__, rounds=9)
    parser.add_argument("--shape", default="smollm-135m", help="of checkpoints.py, in float32 (%(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="(1 and 4)")
    parser.add_argument("--steps", type=int, default=32, help="tokens to decode (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    options = parser.parse_args()
    found: list[Row] = []
    with harness.workspace(options.keep) as folder:
        source = harness.checkpoint(folder, options.shape, "base", "decoder")
        graphs = harness.graphs(folder, options.shape, partial(harness.decoder_exports, source))
        decoders = {name: partial(Graph, path) for name, path in graphs.items()} | {EAGER: Eager}
        for batch in options.batch:
            work = Work(source / "decoder", batch, options.steps, options.threads)
            candidates = {name: partial(harness.in_new_process, run, make, work) for name, make in decoders.items()}
            found += rows(harness.alternating(options.rounds, candidates), work)
    harness.report("decode", found, shape=options.shape, rounds=options.rounds, threads=options.threads)


if __name__ == "__main__":
    main()
