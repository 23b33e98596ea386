"""Where an exported repo runs: what `verify` checks and `bench` measures it in.

`ort` is ONNX Runtime in Python, `node` stock transformers.js in Node; `wasm` and `webgpu` are the same in a browser, on
the two backends of onnxruntime-web. `verify` opens headless Chromium for them; `bench` measures `wasm` in Node, on the
WASM build that old browsers get, so that no browser is needed. Reports and the option `--runtime` call them runtimes.
"""

from __future__ import annotations

from typing import Literal, get_args

Target = Literal["ort", "node", "wasm", "webgpu"]
ClientTarget = Literal["node", "wasm", "webgpu"]  # where transformers.js runs
BrowserTarget = Literal["wasm", "webgpu"]
BenchTarget = Literal["ort", "node", "wasm"]
NodeTarget = Literal["node", "wasm"]  # what a Node process runs

TARGETS: tuple[Target, ...] = get_args(Target)
BENCH_TARGETS: tuple[BenchTarget, ...] = get_args(BenchTarget)
UNASKED: tuple[Target, ...] = ("ort", "node")  # what `verify` runs when no runtime is named
