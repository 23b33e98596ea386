"""Kinds 27, 37: adapters."""

from __future__ import annotations

from collections.abc import Iterator

from bad.case import MERGE, Case, rows
from bad.changes import BINARY, DEEPER, EMPTY, GONE, NOT_JSON, Change, both, cut, literal, put, raw


def adapters() -> Iterator[Case]:
    yield from rows(
        27,
        "captioner",
        MERGE,
        "adapter/adapter_config.json",
        (put("target_modules", "*("), "target_modules"),
        (put("target_modules", "(" * 5000), "target_modules"),
        (put("exclude_modules", "*("), "exclude_modules"),
        (put("target_modules", "(.*" + ".*" * 20 + ")*#"), "target_modules"),
        (put("target_modules", "((a+)+)+$"), "target_modules"),
        (put("target_modules", 5), "target_modules"),
        (put("target_modules", {}), "target_modules"),
        (put("target_modules", []), "target_modules"),
        (put("rank_pattern", {"*(": 4}), "rank_pattern"),
        (put("rank_pattern", []), "rank_pattern"),
        (put("rank_pattern", {"q_proj": "x"}), "rank_pattern"),
        (put("rank_pattern", {"(.*" + ".*" * 20 + ")*#": 4}), "rank_pattern"),
        (put("rank_pattern", {"q_proj": 0}), "rank_pattern"),
        (put("rank_pattern", {"q_proj": 10**9}), "rank_pattern"),
        (put("alpha_pattern", {"*(": 4}), "alpha_pattern"),
        (put("alpha_pattern", "x"), "alpha_pattern"),
        (literal("alpha_pattern", '{"q_proj": NaN}'), ""),
        (put("r", 0), "r"),
        (put("r", "x"), "r"),
        (put("r", 10**9), "r"),
        (put("r", -4), "r"),
        (put("r", None), "r"),
        (put("r", 5), ""),
        (literal("lora_alpha", "NaN"), "lora_alpha"),
        (put("lora_alpha", 1e308), "adapter"),
        (literal("lora_alpha", "Infinity"), "lora_alpha"),
        (put("lora_alpha", "x"), "lora_alpha"),
        (put("lora_alpha", None), "lora_alpha"),
        (put("peft_type", "nope"), "nope"),
        (put("peft_type", 5), "peft_type"),
        (put("peft_type", "P" * 5000), "peft_type"),
        (put("bias", "x"), "bias"),
        (put("layers_to_transform", "x"), "layers_to_transform"),
        (put("modules_to_save", 5), "modules_to_save"),
        (put("use_dora", "x"), "use_dora"),
        (put("layers_pattern", "*("), "layers_pattern"),
        (put("target_parameters", 5), "target_parameters"),
        (put("trainable_token_indices", "x"), "trainable_token_indices"),
        (put("task_type", 5), "task type"),
        DEEPER,
        *NOT_JSON,
    )
    yield from rows(
        27,
        "captioner",
        MERGE,
        "adapter/adapter_model.safetensors",
        EMPTY,
        BINARY,
        cut(100),
        cut(3000),
        GONE,
        (raw(b"\x02\0\0\0\0\0\0\0{}", "no tensors"), "holds no tensors", "adapter"),
        raw(b"\xff" * 16, "a huge header"),
    )
    yield from rows(
        27,
        "captioner",
        MERGE,
        "base/model.safetensors",
        EMPTY,
        BINARY,
        cut(100),
        cut(3000),
        GONE,
        (raw(b"\x02\0\0\0\0\0\0\0{}", "no tensors"), "is missing", "base"),
        raw(b"\xff" * 16, "a huge header"),
    )
    index = "model.safetensors.index.json"
    for text, named in (
        ('{"weight_map": 5}', index),
        ('{"weight_map": {"a": "../x.safetensors"}}', index),
        ('{"weight_map": {"a": 5}}', index),
        ('{"weight_map": {"a": "/etc/passwd"}}', index),
        ('{"weight_map": {"a": "none.safetensors"}}', "none.safetensors"),
        ('{"weight_map": {}}', "base"),
        ("{}", index),
        ("[]", index),
        ("{", index),
    ):
        yield from rows(
            27,
            "captioner",
            MERGE,
            "base/model.safetensors.index.json",
            (
                both(Change("", lambda path: path.with_name("model.safetensors").unlink()), raw(text)),
                "",
                named,
            ),
        )
