"""Kinds 22-24: what our own commands wrote."""

from __future__ import annotations

from collections.abc import Iterator

from bad.case import ASK, DEMO, ONNX, PUSH, RUN, VERIFY, Case, rows
from bad.changes import BINARY, EMPTY, GONE, HALF_JSON, NOT_JSON, both, changed_bit, cut, drop, put, raw, replace

# Tensors of a recorded case: what the model is fed, what the encoder says, scores and the cache.
CASE_TENSORS = (
    *("case0/pixel_values", "case1/pixel_values", "case0/input_ids", "case1/input_ids", "case0/image_features"),
    *("case1/prefill.logits", "case0/step0.logits", "case1/cache.0.key"),
)


def documents() -> Iterator[Case]:
    manifest = (
        (put("schema", 99), "schema"),
        (put("schema", "x"), "schema"),
        (drop("schema"), "schema"),
        (put("graphs", None), "graphs"),
        (put("graphs", [5]), "graphs"),
        (put("graphs", [{}]), "graphs"),
        (put("dtypes", None), "dtypes"),
        (put("dtypes", ["q9"]), "dtypes"),
        (put("layout", "nope"), "layout"),
        (put("layout", None), "layout"),
        (drop("graphs"), "graphs"),
        (put("graphs.0.file", "../../x.onnx"), "file"),
        (put("graphs.0.dtype", "q9"), "dtype"),
        (put("graphs.0.component", "a/b"), "component"),
        (put("graphs.0.size_bytes", "x"), "size_bytes"),
        (put("graphs.0.size_bytes", -1), "size_bytes"),
        (put("failed", None), "failed"),
        (put("failed", "x"), "failed"),
        (put("mixed", []), "mixed"),
        (put("inputs_sha256", []), "inputs_sha256"),
        (put("ranges", 5), "ranges"),
        (put("in_graph", "x"), "in_graph"),
        (put("recipe", 5), "recipe"),
        (put("recipe", None), "recipe"),
        *NOT_JSON,
    )
    for command in (VERIFY, PUSH, DEMO):
        yield from rows(22, "captioner", command, "work/repo/export.json", *manifest)
    yield from rows(
        22,
        "captioner",
        f"{RUN} --backend onnx",
        "work/repo/export.json",
        (put("failed", 5), "failed"),
        (put("failed", [5]), "failed"),
        (put("in_graph", 5), "in_graph"),
        (put("recipe", 5), "recipe"),
        *HALF_JSON,
    )
    report = (
        (drop("checks"), "checks"),
        (drop("verdict"), "verdict"),
        (put("checks", None), "checks"),
        (put("checks.0", 5), "checks"),
        (drop("checks.0.metric"), "checks"),
        (drop("files_sha256"), "files_sha256"),
        (put("schema", 99), "schema"),
        (put("files_sha256", []), "files_sha256"),
        *NOT_JSON,
    )
    yield from rows(23, "captioner", PUSH, "work/report/report.json", *report)
    yield from rows(23, "captioner", DEMO, "work/report/report.json", *report[:3], *HALF_JSON)
    yield from rows(
        23,
        "captioner",
        VERIFY,
        "work/report/bench.json",
        (drop("rows"), "rows"),
        (put("rows", [{}]), "rows"),
        (put("rows.0.runtime", "x"), "rows"),
        (put("images", []), "images"),
        (put("machine", {}), "machine"),
        (put("machine.cpus", "x"), "machine"),
        (put("machine.memory_bytes", None), "machine"),
        (put("machine.memory_bytes", "x"), "machine"),
        (put("versions", {"x": {}}), "versions"),
        (put("graphs_sha256", None), "graphs_sha256"),
        *NOT_JSON,
    )
    yield from rows(
        23,
        "captioner",
        ONNX,
        "work/merged/merge.json",
        (drop("inputs_sha256"), "inputs_sha256"),
        (put("inputs_sha256", 5), "inputs_sha256"),
        (put("schema", 99), "schema"),
        (put("parameters", "x"), "parameters"),
        *NOT_JSON,
    )
    yield from rows(
        23,
        "captioner",
        VERIFY,
        "work/merged/merge.json",
        (drop("worst_layer"), "worst_layer"),
        (put("inputs_sha256", {"config.json": ["x"]}), "inputs_sha256"),
        *HALF_JSON,
    )
    golden = (
        (put("schema", 99), "schema"),
        (put("images", []), "golden"),
        (put("images", None), "images"),
        (put("images.0.file", "../x.png"), "images.0.file"),
        (put("images.0.token_ids", []), "token_ids"),
        (put("images.0.token_ids", ["x"]), "token_ids"),
        (both(put("images.0.token_ids", [10**6]), put("images.0.margins", [0.5])), "token_ids"),
        (put("images.0.token_ids", [-1]), "token_ids"),
        (put("images.0.sha256", "x"), "", "0.png"),
        (put("cases", []), "golden"),
        (put("cases.0.batch", 99), "batch"),
        (put("cases.0.batch", 0), "batch"),
        (put("cases.0.name", "nope"), "nope", "golden.safetensors"),
        (put("eos_token_ids", []), "eos_token_ids"),
        (put("eos_token_ids", "x"), "eos_token_ids"),
        (drop("eos_token_ids"), "eos_token_ids"),
        (drop("images.0.caption"), "caption"),
        (put("cases.0.step_token_ids", []), "step_token_ids"),
        (put("cases.0.step_token_ids", [[10**9]]), "step_token_ids"),
        (put("images.0.margins", []), "margins"),
        (put("image_processor", None), "image_processor"),
        *NOT_JSON,
    )
    yield from rows(24, "captioner", VERIFY, "golden/t/golden.json", *golden)
    yield from rows(
        24,
        "captioner",
        DEMO,
        "golden/t/golden.json",
        (put("images", None), "images"),
        (drop("images.0.file"), "file"),
        (put("text", 5), "text"),
        (put("conversation", 5), "conversation"),
        (put("conversation", [5]), "conversation"),
        (put("conversation", [{"role": "user"}]), "conversation"),
        *HALF_JSON,
    )
    yield from rows(
        24,
        "captioner",
        VERIFY,
        "golden/t/golden.safetensors",
        EMPTY,
        BINARY,
        cut(100),
        cut(2000),
        GONE,
        (raw(b"\x02\0\0\0\0\0\0\0{}", "no tensors"), "", ""),
        raw(b"\xff" * 16, "a huge header"),
        *((replace(name, f"{name[:-1]}~"), f"{name.replace('/', ' has no ')}: run") for name in CASE_TENSORS),
        (replace("[1,3,16,16]", "[3,1,16,16]"), "case0: pixel_values is float32 [3, 1, 16, 16]"),
        (replace("[2,3,16,16]", "[3,2,16,16]"), "case1: pixel_values is float32 [3, 2, 16, 16]"),
        (replace('"F32","shape":[2,3,16,16]', '"I32","shape":[2,3,16,16]'), "case1: pixel_values is int32"),
        (changed_bit("case0/pixel_values"), "pixel_values is not what 0.png gives"),
    )
    yield from rows(
        24,
        "chat",
        VERIFY,
        "golden/t/golden.safetensors",
        *(
            (replace(f"case0/{name}", f"case0/{name[:-1]}~"), f"no {name}")
            for name in ("pixel_values", "image_features")
        ),
    )
    yield from rows(24, "captioner", VERIFY, "golden/t/images/0.png", EMPTY, BINARY, GONE)
    for name in ("encoder_model", "decoder_model_merged"):
        yield from rows(
            25,
            "captioner",
            f"{RUN} --backend onnx",
            f"work/repo/onnx/{name}.onnx",
            (EMPTY, "", "onnx"),
            (BINARY, "", "onnx"),
            (cut(300), "", "onnx"),
        )
    yield from rows(
        25,
        "captioner",
        f"{RUN} --backend onnx",
        "work/repo/config.json",
        (put("text_config", "x"), "text_config"),
        (put("decoder", 5), "decoder"),
        (put("model_type", 5), "model_type"),
        (put("model_type", None), "model_type"),
        *NOT_JSON,
    )
    yield from rows(
        25,
        "chat",
        f"{ASK} --backend onnx",
        "work/repo/config.json",
        (put("text_config", "x"), "text_config"),
        (put("image_token_index", "x"), "image_token"),
        (put("image_token_index", 10**9), "image_token"),
        (put("text_config.vocab_size", "x"), "vocab_size"),
    )
