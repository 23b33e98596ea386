"""Chat models of real shapes, random weights, bfloat16 on disk → merged → a repo: time and memory of each command.

python benchmarks/chat_families.py                        # all of them
python benchmarks/chat_families.py --models qwen2-vl-2b   # this one only
python benchmarks/chat_families.py --dtype q4             # what is written beside float32 is nothing

Sizes are those of the published checkpoints' configs, as far as they are known here, at transformers' defaults else.
Wall time is the whole command's; memory that of its largest process, mapped files included. The checkpoint is streamed
to disk, since no such model should have to be in memory as a whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import harness
import torch
from checkpoints import _random, _write_config, _write_tokenizer, _write_weights
from transformers import AutoConfig

from vlm_export.families import registry
from vlm_export.models.library import without_weights

_QWEN = {"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303}
_QWEN_TEXT = {"vocab_size": 151936, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_LFM2 = {
    "model_type": "lfm2",
    "vocab_size": 65536,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
}
_NAFLEX = {"model_type": "siglip2_vision_model", "num_patches": 256, "patch_size": 16, "vision_use_head": False}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2-vl-2b": {
        "model_type": "qwen2_vl",
        "text_config": {
            **_QWEN_TEXT,
            "model_type": "qwen2_vl_text",
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {"model_type": "qwen2_vl_vision", "hidden_size": 1536},
        "tie_word_embeddings": True,
        **_QWEN,
    },
    "qwen3-vl-2b": {
        "model_type": "qwen3_vl",
        "text_config": {
            **_QWEN_TEXT,
            "model_type": "qwen3_vl_text",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        },
        "vision_config": {
            "model_type": "qwen3_vl_vision",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "depth": 24,
            "out_hidden_size": 2048,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        "tie_word_embeddings": True,
        **_QWEN,
    },
    "glm-ocr": {
        "model_type": "glm_ocr",
        "text_config": {"model_type": "glm_ocr_text", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
        "vision_config": {"model_type": "glm_ocr_vision"},
        "image_token_id": 300,
        "video_token_id": 301,
    },
    "lfm2-vl-450m": {
        "model_type": "lfm2_vl",
        "text_config": {**_LFM2, "hidden_size": 1024, "intermediate_size": 6656, "num_attention_heads": 16},
        "vision_config": {**_NAFLEX, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
        "image_token_id": 300,
    },
    "lfm2-vl-1.6b": {
        "model_type": "lfm2_vl",
        "text_config": {**_LFM2, "hidden_size": 2048, "intermediate_size": 12288, "num_attention_heads": 32},
        "vision_config": {
            **_NAFLEX,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
        },
        "image_token_id": 300,
    },
    "paligemma2-3b-pt-224": {
        "model_type": "paligemma",
        "text_config": {
            "model_type": "gemma2",
            "vocab_size": 257216,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "tie_word_embeddings": True,
        },
        "vision_config": {**_SIGLIP, "image_size": 224},
        "image_token_index": 300,
        "projection_dim": 2304,
        "hidden_size": 2304,
        "vocab_size": 257216,
        "tie_word_embeddings": True,
    },
    "gemma-3-4b": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "vocab_size": 262208,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 1024,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "tie_word_embeddings": True,
        },
        "vision_config": {**_SIGLIP, "image_size": 896},
        "image_token_index": 300,
        "mm_tokens_per_image": 256,
        "tie_word_embeddings": True,
    },
}
_RECIPE = "name: {name}\nmodel: {model}\nlayout: chat\ndtypes: [{dtype}]\n"
_PROCESSORS = {
    "glm_ocr": "Glm46VImageProcessor",
    "paligemma": "SiglipImageProcessor",
    "gemma3": "Gemma3ImageProcessor",
    "lfm2_vl": "Lfm2VlImageProcessor",
}
_PLACES = {"boi_token": "<s>", "image_token": "<soft>", "eoi_token": "</s>"}  # what Gemma 3's processor writes


def write(folder: Path, config: dict[str, Any]) -> int:
    """A checkpoint of random weights; returns how many numbers they are."""
    family = registry.find_family(config["model_type"], "benchmark")
    with without_weights():
        model = family.build(config)
    loaded = AutoConfig.for_model(**config)
    _write_config(folder, loaded.to_dict() | {"architectures": [type(model).__name__], "dtype": "bfloat16"})
    _write_tokenizer(folder, loaded.get_text_config().vocab_size)
    tokenizer = folder / "tokenizer.json"  # some clients write no other token for an image
    image_token_id = config.get("image_token_id", config.get("image_token_index"))
    tokenizer.write_text(tokenizer.read_text().replace(f"<|filler_{image_token_id}|>", "<image>"))
    vision = loaded.vision_config
    processor: dict[str, Any] = {"image_processor_type": _PROCESSORS.get(config["model_type"], "Qwen2VLImageProcessor")}
    if hasattr(vision, "spatial_merge_size"):
        processor |= {
            "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "size": {"shortest_edge": 3136, "longest_edge": 401408},
        }
    elif hasattr(vision, "image_size"):
        processor["size"] = dict.fromkeys(("height", "width"), vision.image_size)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | _PLACES))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    _write_weights(folder, {name: _random(name, size, "BF16") for name, size in sizes.items()})
    return sum(torch.Size(size).numel() for size in sizes.values())


def main() -> None:
    """Write, merge and export each model."""
    parser = harness.arguments(__doc__, rounds=1)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtype", default="int8")
    given = parser.parse_args()
    rows: list[harness.Row] = []
    with harness.workspace(given.keep) as work:
        for name in given.models:
            harness.progress(f"{name}: writing")
            parameters = write(work / name / "checkpoint", MODELS[name])
            recipe = work / name / "recipe.yaml"
            recipe.write_text(_RECIPE.format(name=name, model=work / name / "checkpoint", dtype=given.dtype))
            row: harness.Row = {"model": name, "parameters, M": round(parameters / 1e6)}
            for command in ("merge", "onnx"):
                harness.progress(f"{name}: {command}")
                done = harness.measured(
                    [harness.CLI, command, recipe, "--work", work / name / "work"], work, work / name / "cache"
                )
                row |= {f"{command}, s": round(done.seconds, 1), f"{command}, MiB": round(done.peak_mib)}
            written = (work / name / "work").rglob("*.onnx*")
            row["repo, MB"] = round(sum(path.stat().st_size for path in written) / 1e6)
            rows.append(row)
            harness.progress(str(row))
    harness.report("chat_families", rows, dtype=given.dtype)


if __name__ == "__main__":
    main()
