"""Kinds 2, 19, 22, 25: a repo of one file."""

from __future__ import annotations

from collections.abc import Iterator

from bad.case import DEMO, RUN, VERIFY, Case, rows
from bad.changes import BINARY, EMPTY, GONE, HALF_JSON, LEAVES, PIPE, cut, drop, put, raw

GRAPH = "work/repo/onnx/model.onnx"


def single() -> Iterator[Case]:
    run = f"{RUN} --backend onnx"
    for command in (run, VERIFY):
        yield from rows(2, "single", command, GRAPH, LEAVES, PIPE)
    yield from rows(
        25, "single", run, GRAPH, (EMPTY, "", "onnx"), (BINARY, "", "onnx"), (cut(300), "", "onnx"), (GONE, "", "onnx")
    )
    yield from rows(
        25,
        "single",
        run,
        "work/repo/config.json",
        (put("model_type", "nope"), "model_type"),
        (put("model_type", None), "model_type"),
        (put("decoder", 5), "decoder"),
        *HALF_JSON,
    )
    yield from rows(
        25,
        "single",
        run,
        "work/repo/preprocessor_config.json",
        (put("size", "x"), "size"),
        (put("image_mean", "x"), "image_mean"),
        *HALF_JSON,
    )
    for wrong in (["x"], {}, 5, "nope", "single_graph"):
        yield from rows(25, "single", run, "work/repo/config.json", (put("single_of", wrong), "single_of"))
    yield from rows(25, "single", run, "work/repo/tokenizer.json", raw("{}"), *HALF_JSON)
    for command in (VERIFY, DEMO):
        yield from rows(
            19,
            "single",
            command,
            "work/repo/tokenizer.json",
            put("added_tokens", ["x"]),
            put("added_tokens", [{"id": 0}]),
            put("decoder", "x"),
            put("decoder", {"type": "Sequence", "decoders": 5}),
            put("model", {}),
            put("model.vocab", 5),
            *HALF_JSON,
        )
        yield from rows(
            22,
            "single",
            command,
            "work/repo/export.json",
            (put("layout", "captioner"), "graphs.0.component"),
            (put("layout", "nope"), "layout"),
            (put("in_graph", "x"), "in_graph"),
            (drop("layout"), "layout"),
        )
