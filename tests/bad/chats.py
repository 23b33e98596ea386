"""Kind 18: config.json of the families with one tower and one picture, whose pictures are a fixed number of tokens."""

from __future__ import annotations

from collections.abc import Iterator

from bad.case import Case, Row, rows
from bad.changes import DEEPER, HALF_JSON, drop, put

TOKENS = {
    "deepseek_vl": "image_token_id",
    "gemma3": "image_token_index",
    "got_ocr2": "image_token_index",
    "paligemma": "image_token_index",
}


def chats() -> Iterator[Case]:
    for name, token in TOKENS.items():
        yield from _merged(
            name,
            *((put(token, value), "image_token") for value in (-1, "x", 10**9)),
            *((put("text_config.num_attention_heads", value), "num_attention_heads") for value in (0, "4", 10**9)),
            (put("text_config.num_hidden_layers", 10**9), "num_hidden_layers"),
            (put("text_config", "x"), "text_config"),
            (put("vision_config", 5), "vision_config"),
            (drop("text_config"), "", "error"),
            DEEPER,
            *HALF_JSON,
        )
    for name in TOKENS:
        for key in ("patch_size", "image_size", "num_attention_heads", "num_hidden_layers"):
            yield from _merged(name, *((put(f"vision_config.{key}", value), key) for value in (0, -8, "8", 10**9)))
    for key, values in (
        ("window_size", (-1, "5", 10**9)),
        ("global_attn_indexes", ("x", [-1], [[]], [10**9])),
        ("output_channels", (0, "16", 10**9)),
        ("mlp_dim", (0, -1, 10**9)),
    ):
        yield from _merged("got_ocr2", *((put(f"vision_config.{key}", value), key) for value in values))
    for key, values in (
        ("layer_types", ("x", ["full_attention"], ["nope"] * 6, [5] * 6)),
        ("sliding_window", ("x", -1, 0)),
        ("query_pre_attn_scalar", ("x", 0)),
        ("rope_parameters", ("x",)),
    ):
        yield from _merged("gemma3", *((put(f"text_config.{key}", value), key) for value in values))
    yield from _merged("gemma3", put("text_config.rope_parameters.full_attention", 5))
    yield from _merged("gemma3", *((put("mm_tokens_per_image", value), "mm_tokens") for value in (0, "x", 5, 10**9)))
    yield from _merged("paligemma", *((put("projection_dim", value), "projection_dim") for value in (0, "x", 10**9)))


def _merged(name: str, *changes: Row) -> Iterator[Case]:
    yield from rows(18, "families", f"merge {name}.yaml --work out", f"{name}/config.json", *changes)
