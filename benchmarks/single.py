"""One file with the loop inside against its two graphs, driven from Python with their cache kept in ONNX Runtime.

    python benchmarks/single.py REPO [--dtype fp32] [--tokens 20,100,500] [--rounds 5]

REPO is an exported captioner; the one file is made of its graphs. Of each number of tokens the two are run in turns, on
the same pixels; printed are medians, and their ratio. Then, each in a process of its own: seconds to load, and the
most memory that is held after a caption. Results: docs/single.md.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime

from vlm_export.contract import IMAGE, OPTIONS, SINGLE_GRAPH
from vlm_export.dtypes import DTYPES
from vlm_export.graph import single_file
from vlm_export.measure.bench import peak_memory_bytes
from vlm_export.runtime.repo import ONNX, open_repo
from vlm_export.runtime.sessions import Sessions

ENCODER, DECODER = "encoder_model", "decoder_model_merged"


class TwoGraphs:
    """Encoder and decoder under an IO binding: what a step appends to the cache is never copied to Python."""

    def __init__(self, repo: Path, dtype: str):
        sessions = Sessions(repo / ONNX, DTYPES[dtype].suffix)
        self.encoder, self.decoder = sessions.session(ENCODER), sessions.session(DECODER)
        generation = open_repo(repo).generation
        self.start, ends = generation["decoder_start_token_id"], generation["eos_token_id"]
        self.ends = ends if isinstance(ends, list) else [ends]

    def run(self, picture: np.ndarray, count: int) -> list[int]:
        """`[1, 3, height, width] float32` → the likeliest tokens, so many, without those that end a text."""
        [states] = self.encoder.run(None, {"pixel_values": picture})
        binding = self.decoder.io_binding()
        binding.bind_cpu_input("encoder_hidden_states", states)
        outputs = [value.name for value in self.decoder.get_outputs()]
        past = {
            value.name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            )
            for value in self.decoder.get_inputs()
            if value.name.startswith("past_key_values")
        }
        tokens, token = [], int(self.start)
        for _ in range(count):
            binding.bind_cpu_input("input_ids", np.array([[token]], dtype=np.int64))
            for name, value in past.items():
                binding.bind_ortvalue_input(name, value)
            for name in outputs:
                binding.bind_output(name, "cpu")
            self.decoder.run_with_iobinding(binding)
            made = dict(zip(outputs, binding.get_outputs(), strict=True))
            scores = made["logits"].numpy()[0, -1]
            scores[self.ends] = -np.inf
            token = int(scores.argmax())
            tokens.append(token)
            first = len(tokens) == 1
            past |= {
                name: made[name.replace("past_key_values", "present", 1)]
                for name in past
                if first or ".encoder." not in name
            }
        return tokens


class OneFile:
    """The graph with the loop inside."""

    def __init__(self, path: Path):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.takes_picture = self.session.get_inputs()[0].name == IMAGE

    def run(self, picture: np.ndarray, count: int) -> list[int]:
        """As of `TwoGraphs`."""
        options = np.array([count, 1, 0, count], dtype=np.float32)
        fed: dict[str, np.ndarray] = {"pixel_values": picture}
        if self.takes_picture:
            fed = {IMAGE: np.ascontiguousarray(np.moveaxis(picture[0], 0, -1).astype(np.uint8))}
        [tokens] = self.session.run(["sequences"], {**fed, OPTIONS: options})
        return np.asarray(tokens)[0].tolist()


def picture_for(repo: Path) -> np.ndarray:
    """Noise of the size that the encoder takes, or of 112 × 112 where it takes any."""
    session = onnxruntime.InferenceSession(str(repo / ONNX / f"{ENCODER}.onnx"), providers=["CPUExecutionProvider"])
    sides = [side if isinstance(side, int) else 112 for side in session.get_inputs()[0].shape[2:]]
    return np.random.default_rng(0).integers(0, 255, (1, 3, *sides)).astype(np.float32)


def made(repo: Path, dtype: str, folder: Path) -> Path:
    """The one file, of a copy of the repo in `folder`."""
    shutil.copytree(repo, folder, dirs_exist_ok=True)
    return folder / ONNX / single_file.write(folder, dtype).file


def load_and_caption(kind: str, repo: Path, dtype: str, path: Path) -> None:
    """Print seconds to load, and bytes that are held after a caption: in a process of its own."""
    picture = picture_for(repo)
    started = time.perf_counter()
    model: Any = TwoGraphs(repo, dtype) if kind == "two" else OneFile(path)
    loaded = time.perf_counter() - started
    model.run(picture, 20)
    print(f"{kind}: load {loaded:.2f} s, {peak_memory_bytes() / 1e6:.0f} MB")


@click.command()
@click.argument("repo", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--dtype", default="fp32", show_default=True)
@click.option("--tokens", default="20,100,500", show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--alone", type=click.Choice(["two", "one"]), hidden=True)
@click.option("--file", type=click.Path(path_type=Path), hidden=True)
def main(repo: Path, dtype: str, tokens: str, rounds: int, alone: str | None, file: Path | None) -> None:
    """Compare the one file with the two graphs of REPO."""
    if alone:
        load_and_caption(alone, repo, dtype, file or repo)
        return
    picture = picture_for(repo)
    with tempfile.TemporaryDirectory(dir=repo.parent) as folder:
        path = made(repo, dtype, Path(folder))
        two, one = TwoGraphs(repo, dtype), OneFile(path)
        for count in map(int, tokens.split(",")):
            seconds: dict[str, list[float]] = {"two": [], "one": []}
            said = {}
            for _ in range(rounds):
                for name, model in (("two", two), ("one", one)):
                    started = time.perf_counter()
                    said[name] = model.run(picture, count)
                    seconds[name].append(time.perf_counter() - started)
            middle = {name: statistics.median(values) for name, values in seconds.items()}
            same = "the same tokens" if said["two"] == said["one"] else "other tokens"
            ratio = middle["one"] / middle["two"]
            print(f"{dtype}, {count} tokens: two graphs {middle['two']:.3f} s, one file {middle['one']:.3f} s", end="")
            print(f", {ratio:.2f} times; {same}", flush=True)
        sizes = [sum(each.stat().st_size for each in found) for found in ([path], parts(repo, dtype))]
        print(f"{SINGLE_GRAPH}: {sizes[0] / 1e6:.1f} MB; its two graphs {sizes[1] / 1e6:.1f} MB")
        del two, one
        for kind in ("two", "one"):
            command = [sys.executable, __file__, str(repo), "--dtype", dtype, "--alone", kind, "--file", str(path)]
            subprocess.run(command, check=True)


def parts(repo: Path, dtype: str) -> list[Path]:
    """The two graphs of a dtype."""
    return [repo / ONNX / f"{name}{DTYPES[dtype].suffix}.onnx" for name in (ENCODER, DECODER)]


if __name__ == "__main__":
    main()
