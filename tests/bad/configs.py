"""Kinds 18, 34: config.json."""

from __future__ import annotations

from collections.abc import Iterator

from bad.case import GOLDEN, INSPECT, MERGE, ONNX, Case, Row, rows
from bad.changes import DEEPER, HALF_JSON, NOT_JSON, drop, literal, put

GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm_ocr")


def configs() -> Iterator[Case]:
    wrong = (0, -1, "32", 32.5, None, [32], 10**9, 10**30, True, {})
    for key in ("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size"):
        yield from rows(
            18, "captioner", MERGE, "base/config.json", *((put(f"text_config.{key}", value), key) for value in wrong)
        )
    for key in (
        "image_size",
        "patch_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    ):
        yield from rows(
            18,
            "captioner",
            MERGE,
            "base/config.json",
            *((put(f"vision_config.{key}", value), key) for value in (0, -8, "8", None, 10**9)),
        )
    yield from rows(
        18,
        "captioner",
        MERGE,
        "base/config.json",
        (put("text_config.num_attention_heads", 3), "head"),
        (put("text_config.num_key_value_heads", 3), "the config says", "model.safetensors"),
        (put("text_config.num_key_value_heads", 0), "num_key_value_heads"),
        (put("text_config.head_dim", 0), "head_dim"),
        (put("text_config.head_dim", 7), ""),
        (put("text_config.rms_norm_eps", -1), "rms_norm_eps"),
        (literal("text_config.rms_norm_eps", "NaN"), ""),
        (put("text_config.rms_norm_eps", "x"), "rms_norm_eps"),
        (put("text_config.layer_types", ["full_attention"]), "layer_types"),
        (put("text_config.rope_parameters", "x"), "rope"),
        (put("text_config.rope_parameters", {"rope_type": "nope"}), "rope"),
        (literal("text_config.rope_parameters", '{"rope_type": "default", "rope_theta": Infinity}'), ""),
        (put("text_config.hidden_act", "nope"), "nope"),
        (put("text_config.hidden_act", 5), "hidden_act"),
        (put("text_config.max_position_embeddings", 10**12), "max_position_embeddings"),
        (put("text_config.pad_token_id", 10**6), "pad_token_id"),
        (put("text_config.pad_token_id", -5), "pad_token_id"),
        (put("text_config.vocab_size", 10), "vocab_size"),
        (put("text_config.tie_word_embeddings", "x"), "tie_word_embeddings"),
        (put("text_config.model_type", "x" * 12_000), "model_type"),
        (put("text_config.model_type", 5), "model_type"),
        (put("text_config.model_type", None), "model_type"),
        (put("text_config", "x"), "text_config"),
        (put("text_config", None), "text_config"),
        (put("text_config", []), "text_config"),
        (drop("text_config"), "text_config"),
        (put("vision_config", 5), "vision_config"),
        (drop("vision_config"), "vision_config"),
        (put("vision_config.model_type", "nope"), "nope"),
        (put("vision_config.num_channels", 0), "num_channels"),
        (put("vision_config.hidden_act", []), "hidden_act"),
        (put("vision_config.layer_norm_eps", "x"), "layer_norm_eps"),
        (put("model_type", None), "model_type"),
        (put("model_type", 5), "model_type"),
        (put("model_type", ["llava"]), "model_type"),
        (put("model_type", "a\nb"), "model_type"),
        (put("model_type", "m" * 10_000), "model_type"),
        (drop("model_type"), "model_type"),
        (put("projection_type", "nope"), "projection_type"),
        (put("transformers_version", "\ud800"), "transformers_version"),
        (put("id2label", {"\udfff": "x"}), "id2label"),
        (put("projection_dim", 0), ""),
        (put("mlp_hidden_dim", -1), "mlp_hidden_dim"),
        (put("text_config.dtype", "nope"), "dtype"),
        (put("quantization_config", "x"), "quantization_config"),
        (put("quantization_config", {"quant_method": "nope"}), "nope"),
        (put("quantization_config", {"quant_method": 5}), "quant"),
        (put("quantization_config", {"quant_method": "gptq", "bits": "x"}), ""),
        DEEPER,
        *NOT_JSON,
    )
    sizes = {
        "onevision": (
            "image_token_index",
            "vision_feature_layer",
            "vision_feature_select_strategy",
        ),
        "internvl": ("image_token_id", "downsample_ratio", "vision_feature_layer"),
        "idefics3": ("image_token_id", "scale_factor"),
        "smolvlm": ("image_token_id", "scale_factor"),
    }
    for name, keys in sizes.items():
        command = f"merge {name}.yaml --work out"
        for key in keys:
            yield from rows(
                18,
                "families",
                command,
                f"{name}/config.json",
                *((put(key, value), "") for value in ("x", 99_999, -99, [], 10**30)),
            )
        for key in ("text_config.num_attention_heads", "vision_config.num_attention_heads", "vision_config.patch_size"):
            yield from rows(
                18,
                "families",
                command,
                f"{name}/config.json",
                *((put(key, value), "") for value in (0, "4", None, 10**9)),
            )
    yield from _of_towers()
    for key in (
        "encoder.patch_size",
        "encoder.num_attention_heads",
        "decoder.n_head",
        "decoder.n_layer",
        "decoder.n_embd",
        "decoder.vocab_size",
    ):
        yield from rows(
            18,
            "families",
            "merge encoder_decoder.yaml --work out",
            "encoder_decoder/config.json",
            *((put(key, value), "") for value in (0, "4", None, 10**9, -1)),
        )
    yield from rows(
        18,
        "families",
        "merge encoder_decoder.yaml --work out",
        "encoder_decoder/config.json",
        (drop("decoder"), "decoder"),
        (put("encoder", "x"), "encoder"),
        (put("decoder.model_type", "x"), ""),
    )
    yield from rows(
        18,
        "chat",
        MERGE,
        "base/config.json",
        (put("image_token_index", None), "image_token"),
        (put("image_token_index", "x"), "image_token"),
        (put("vision_feature_layer", 99), "vision_feature_layer"),
        (put("vision_feature_layer", "x"), "vision_feature_layer"),
        (put("vision_feature_layer", [99]), "vision_feature_layer"),
        (put("vision_feature_select_strategy", "nope"), "vision_feature_select_strategy"),
        (put("image_token_index", 10**6), "image_token"),
        (put("image_token_index", -1), "image_token"),
    )
    yield from rows(18, "chat", GOLDEN, "base/config.json", (put("image_token_index", 5), "image tokens"))
    for change, said in (
        (put("text_config.num_attention_heads", 3), ""),
        (put("text_config.hidden_size", 0), ""),
        (put("text_config", None), ""),
        (put("model_type", 5), "model_type"),
        (put("text_config.num_hidden_layers", 10**9), ""),
        (put("text_config.vocab_size", "x"), ""),
    ):
        yield from rows(18, "captioner", ONNX, "work/merged/config.json", (change, said))
    for change in HALF_JSON:
        yield from rows(20, "captioner", INSPECT, "base/config.json", change)
        yield from rows(20, "captioner", ONNX, "work/merged/config.json", change)


def _of_towers() -> Iterator[Case]:
    """Families whose pictures are patches: how large, how many become one, where they stand in a prompt."""

    def merged(name: str, *changes: Row) -> Iterator[Case]:
        yield from rows(18, "families", f"merge {name}.yaml --work out", f"{name}/config.json", *changes)

    for name in GRIDS:
        values = (0, -1, "4", [], 10**9) if name == "qwen2_vl" else (0, 10**9)
        for key in ("spatial_merge_size", "temporal_patch_size", "patch_size", "depth", "in_channels", "num_heads"):
            yield from merged(name, *((put(f"vision_config.{key}", value), key) for value in values))
        yield from merged(
            name,
            *((put("image_token_id", value), "image_token_id") for value in (-1, "x", None, 10**9)),
            (put("vision_config.hidden_act", "nope"), "nope"),
            (put("vision_config", {}), "", "config"),
            (put("text_config.rope_parameters.mrope_section", "4"), "mrope_section"),
            (put("text_config.rope_parameters.mrope_section", [-1, 1, 4]), "mrope_section"),
            (put("text_config.rope_parameters.mrope_section", [10**9] * 3), "mrope_section"),
        )
    yield from merged("qwen2_vl", *((put("vision_config.mlp_ratio", value), "mlp_ratio") for value in (0, "x", 10**9)))
    for key in ("window_size", "out_hidden_size", "fullatt_block_indexes"):
        yield from merged(
            "qwen2_5_vl", *((put(f"vision_config.{key}", value), key) for value in (-1, "x", 10**9, [10**9]))
        )
    for key in ("num_position_embeddings", "deepstack_visual_indexes"):
        yield from merged("qwen3_vl", *((put(f"vision_config.{key}", value), key) for value in (-1, "x", 10**9)))
    for name, token in (("mistral3", "image_token_index"), ("lighton_ocr", "image_token_id")):
        yield from merged(
            name,
            *((put(token, value), "image_token") for value in (-1, "x", None, 10**9)),
            *((put("spatial_merge_size", value), "spatial_merge_size") for value in (0, -1, "2", [], 10**9)),
            *((put("vision_config.patch_size", value), "patch_size") for value in (0, -1, "4", [], 10**9)),
            *((put("vision_config.image_size", value), "image_size") for value in (0, -1, "4", [], 10**9)),
            (put("vision_config.head_dim", 0), "head_dim"),
        )
    for key, values in (("downsample_factor", (0, "2", 10**9)), ("text_config.conv_L_cache", (0, "3", 10**9))):
        yield from merged("lfm2_vl", *((put(key, value), key.split(".")[-1]) for value in values))
    for key, value in (("vision_config.num_patches", 10**9), ("projector_hidden_size", 0), ("image_token_id", "x")):
        yield from merged("lfm2_vl", (put(key, value), key.split(".")[-1]))
    yield from merged("lfm2_vl", (put("text_config.layer_types", ["conv"]), "layer_types"))
    for key in ("depths", "embed_dim", "num_heads", "num_groups", "patch_size", "patch_stride", "window_size"):
        yield from merged("florence2", *((put(f"vision_config.{key}", value), key) for value in (-1, "4", [10**9])))
    yield from merged(
        "florence2",
        *(
            (put("vision_config.depths", value), "", "model.safetensors" if value else "config.json")
            for value in ([], [1, 0])
        ),
        *((put("vision_config.num_groups", value), "") for value in ([], [1])),
        *((put("vision_config.image_size", value), "image_size") for value in (0, -1, "64", [], 10**9)),
        *(
            (put("vision_config.max_temporal_embeddings", value), "max_temporal_embeddings")
            for value in (0, "x", 10**9)
        ),
        *((put("image_token_id", value), "image_token_id") for value in (-1, "x", 10**9)),
        (put("vision_config.model_type", "davit"), "davit"),
        (put("text_config.encoder_layers", 10**9), "encoder_layers"),
        (put("text_config.decoder_attention_heads", 3), "head"),
    )
    yield from merged(
        "encoder_decoder",
        *((put("architectures", value), "architectures") for value in (-1, "x", {}, [5])),
    )
