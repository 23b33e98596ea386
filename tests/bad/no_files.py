"""Kinds 2, 3, 33: what is no file, or lies elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

from bad.case import ASK, DEMO, GOLDEN, INSPECT, MERGE, ONNX, PUSH, RUN, VERIFY, Case, rows
from bad.changes import FOLDER, LEAVES, NO_FILES, NOWHERE, PIPE, SOCKET, ZERO


def no_files() -> Iterator[Case]:
    for name in (
        "base/config.json",
        "base/model.safetensors",
        "base/tokenizer.json",
        "base/tokenizer_config.json",
        "base/generation_config.json",
        "base/preprocessor_config.json",
        "base/chat_template.jinja",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ):
        yield from rows(
            2, "captioner", MERGE, name, *(NO_FILES if name == "base/config.json" else (LEAVES, PIPE, ZERO))
        )
    for name in ("base/config.json", "base/generation_config.json", "base/chat_template.jinja"):
        yield from rows(2, "captioner", GOLDEN, name, LEAVES, PIPE)
    for name in (
        "work/merged/config.json",
        "work/merged/model.safetensors",
        "work/merged/tokenizer.json",
        "work/merged/merge.json",
        "work/merged/generation_config.json",
        "work/merged/chat_template.jinja",
        "work/merged/preprocessor_config.json",
    ):
        yield from rows(2, "captioner", ONNX, name, LEAVES, PIPE)
    for name in ("golden.json", "golden.safetensors", "images/0.png"):
        yield from rows(3, "captioner", VERIFY, f"golden/t/{name}", *NO_FILES)
        if name != "golden.safetensors":
            yield from rows(3, "captioner", DEMO, f"golden/t/{name}", LEAVES, PIPE)
    for name in (
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "export.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "onnx/decoder_model_merged.onnx",
    ):
        yield from rows(2, "captioner", f"{RUN} --backend onnx", f"work/repo/{name}", *NO_FILES)
    yield from rows(2, "chat", ASK, "work/repo/chat_template.jinja", *NO_FILES)
    yield from rows(2, "chat", ASK, "work/repo/special_tokens_map.json", LEAVES, PIPE)
    for name in ("config.json", "export.json", "tokenizer.json", "README.md", "onnx/encoder_model.onnx"):
        yield from rows(2, "captioner", PUSH, f"work/repo/{name}", LEAVES, PIPE)
    for name in ("export.json", "config.json", "onnx/encoder_model.onnx", "README.md"):
        yield from rows(2, "captioner", DEMO, f"work/repo/{name}", LEAVES, PIPE)
        yield from rows(2, "captioner", VERIFY, f"work/repo/{name}", LEAVES, PIPE)
    yield from rows(2, "captioner", PUSH, "work/report/report.json", *NO_FILES)
    yield from rows(2, "captioner", VERIFY, "work/report/bench.json", LEAVES, PIPE)
    yield from rows(33, "captioner", MERGE, "r.yaml", PIPE, SOCKET, FOLDER, ZERO, NOWHERE)
    yield from rows(33, "captioner", GOLDEN, "images/0.png", PIPE, SOCKET, ZERO, NOWHERE, LEAVES)
    yield from rows(33, "captioner", RUN, "images/0.png", PIPE, SOCKET, ZERO, NOWHERE)
    yield from rows(33, "captioner", f"{ONNX} --quantize q4 --plan plan.yaml", "plan.yaml", PIPE, FOLDER, ZERO, NOWHERE)
    yield from rows(33, "captioner", INSPECT, "base/config.json", LEAVES, PIPE, ZERO)
    yield from rows(33, "captioner", "doctor work/repo", "work/repo/config.json", LEAVES, PIPE, ZERO)
