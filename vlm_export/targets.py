"""Where an exported repo runs: what `verify` checks and `bench` measures it in.

`ort` is ONNX Runtime in Python, `node` stock transformers.js in Node, and `wasm` the same on onnxruntime-web's WASM
build, which browsers get. Reports and the option `--runtime` call them runtimes.
"""

from __future__ import annotations

from typing import Literal, get_args

Target = Literal["ort", "node", "wasm"]
VerifyTarget = Literal["ort", "node"]
NodeTarget = Literal["node", "wasm"]  # what a Node process runs

TARGETS: tuple[Target, ...] = get_args(Target)
VERIFY_TARGETS: tuple[VerifyTarget, ...] = get_args(VerifyTarget)
