"""Checkpoints of real shapes with seeded random weights, streamed to disk: no model is ever in memory as a whole.

python benchmarks/checkpoints.py smollm-135m FOLDER    # FOLDER/captioner, FOLDER/base, FOLDER/decoder, FOLDER/tower
python benchmarks/checkpoints.py smollm-135m FOLDER captioner    # one of them

- `captioner`: what `vlm-export merge` takes: a prefix_conditioning_vlm checkpoint with LoRA, as distilvit2 saves them.
- `base`: the same without LoRA, as if merged.
- `decoder`, `tower`: the plain transformers folders of its two halves, for the peers.
- `encoder-decoder`: the two halves joined by cross-attention, as transformers saves them (this one is in memory whole).

The tower has its pooling head, as the real one does, although a prefix never uses it.

A tensor's values depend on its name in the plain folder alone, so that all four hold the same weights.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)

from vlm_export.tensors.safetensors_writer import Entry, write_tensors

END = "<|endoftext|>"
LORA_RANK, LORA_ALPHA = 16, 32
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "c_attn", "c_proj")
STD = 0.02


@dataclass(frozen=True)
class Shape:
    """A captioner: `config.json` of its decoder and of its tower, and the dtype on disk."""

    text: dict[str, Any]
    vision: dict[str, Any]
    dtype: str = "F32"


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **other: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        **_end_token(other.get("vocab_size", 49152)),
        **other,
    }


def _end_token(vocabulary: int) -> dict[str, int]:
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), vocabulary - 1)


def _siglip(hidden: int, inner: int, layers: int, heads: int, image: int, patch: int) -> dict[str, Any]:
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": patch,
    }


_GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
    "tie_word_embeddings": True,
    **_end_token(50257),
}
_VIT_BASE = {
    "architectures": ["ViTModel"],
    "model_type": "vit",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
_SIGLIP_BASE = _siglip(768, 3072, 12, 12, image=224, patch=16)
SHAPES = {
    "pico": Shape(_llama(64, 96, 2, 4, 2, vocab_size=300), _siglip(48, 96, 2, 2, image=32, patch=8)),
    "smollm-135m": Shape(_llama(576, 1536, 30, 9, 3), _SIGLIP_BASE),
    "smollm-135m-60-layers": Shape(_llama(576, 1536, 60, 9, 3), _SIGLIP_BASE),
    "smollm-360m": Shape(_llama(960, 2560, 32, 15, 5), _SIGLIP_BASE),
    "smollm2-1.7b": Shape(
        _llama(2048, 8192, 24, 32, 32, max_position_embeddings=8192, rope_theta=130000.0), _SIGLIP_BASE, "BF16"
    ),
    "gpt2": Shape(_GPT2, _SIGLIP_BASE),
    "vit-gpt2": Shape(_GPT2, _VIT_BASE),
    "pico-gpt2": Shape(
        _GPT2 | {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 300, **_end_token(300)},
        _VIT_BASE | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "image_size": 32},
    ),
}
_TORCH_DTYPES = {"F32": "float32", "BF16": "bfloat16"}


def write_decoder(folder: Path, shape: Shape) -> Path:
    """The decoder as transformers saves it, with a tokenizer."""
    _write_config(folder, shape.text | {"torch_dtype": _TORCH_DTYPES[shape.dtype]})
    _write_tokenizer(folder, shape.text["vocab_size"])
    _write_weights(folder, {name: _random(name, size, shape.dtype) for name, size in _decoder_sizes(shape)})
    return folder


def write_tower(folder: Path, shape: Shape) -> Path:
    """The tower as transformers 4 saves it (and 5 reads it), with its image processor."""
    _write_config(folder, shape.vision | {"torch_dtype": _TORCH_DTYPES[shape.dtype]})
    size = shape.vision["image_size"]
    processor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": size, "width": size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    weights = {f"vision_model.{name}": _random(name, size, shape.dtype) for name, size in _tower_sizes(shape)}
    _write_weights(folder, weights)
    return folder


def write_captioner(folder: Path, shape: Shape, *, lora: bool = True) -> Path:
    """Tower, projection and decoder in one prefix_conditioning_vlm checkpoint."""
    settings: dict[str, Any] = {
        "architectures": ["PrefixConditioningVLM"],
        "model_type": "prefix_conditioning_vlm",
        "vision_config": shape.vision,
        "text_config": shape.text,
        "projection_type": "linear",
    }
    if lora:
        settings |= {"lora_r": LORA_RANK, "lora_alpha": LORA_ALPHA, "lora_dropout": 0.1, "lora_target_modules": None}
    _write_config(folder, settings)
    _write_tokenizer(folder, shape.text["vocab_size"])
    hidden = AutoConfig.for_model(**shape.text).hidden_size
    sizes = {
        "projection.projection.weight": (hidden, shape.vision["hidden_size"]),
        "projection.projection.bias": (hidden,),
    }
    weights = {name: _random(name, size, shape.dtype) for name, size in sizes.items()}
    for name, size in _tower_sizes(shape):
        weights[f"vision_encoder.vision_model.{name}"] = _random(name, size, shape.dtype)
    for name, size in _decoder_sizes(shape):
        weights |= (
            _with_lora(name, size, shape) if lora else {f"language_model.{name}": _random(name, size, shape.dtype)}
        )
    _write_weights(folder, weights)
    return folder


def write_encoder_decoder(folder: Path, shape: Shape) -> Path:
    """A vision-encoder-decoder with a tokenizer and an image processor."""
    tokens = _end_token(shape.text["vocab_size"])
    vision, text = (AutoConfig.for_model(**part) for part in (shape.vision, shape.text))
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        vision, text, decoder_start_token_id=tokens["bos_token_id"], **tokens
    )
    torch.manual_seed(0)
    VisionEncoderDecoderModel(config).save_pretrained(folder)
    _write_tokenizer(folder, shape.text["vocab_size"])
    size = shape.vision["image_size"]
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": size, "width": size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def _with_lora(name: str, size: tuple[int, ...], shape: Shape) -> dict[str, Entry]:
    """One decoder tensor under PEFT's name for it, and the LoRA pair beside it where its module has one."""
    module, _, parameter = name.rpartition(".")
    prefix = f"language_model.base_model.model.{module}"
    weight = _random(name, size, shape.dtype)
    if not module.endswith(LORA_TARGETS):
        return {f"{prefix}.{parameter}": weight}
    entries = {f"{prefix}.base_layer.{parameter}": weight}
    if parameter == "weight":
        inputs, outputs = size if shape.text["model_type"] == "gpt2" else size[::-1]  # GPT-2's Conv1D is transposed
        for part, part_size in {"A": (LORA_RANK, inputs), "B": (outputs, LORA_RANK)}.items():
            entries[f"{prefix}.lora_{part}.default.weight"] = _random(f"{module}.lora_{part}", part_size, shape.dtype)
    return entries


def _decoder_sizes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.text))
    for name, parameter in model.named_parameters():
        if name != "lm_head.weight":  # tied
            yield name, tuple(parameter.shape)


def _tower_sizes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**shape.vision))
    for name, parameter in model.named_parameters():
        yield name.removeprefix("vision_model."), tuple(parameter.shape)


def _random(name: str, size: tuple[int, ...], dtype: str) -> Entry:
    """Norms scale by about 1, all else is small; the seed is the name's."""

    def make() -> torch.Tensor:
        values = torch.empty(size).normal_(std=STD, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        is_norm_scale = len(size) == 1 and name.endswith("weight")
        return values + 1 if is_norm_scale else values

    return Entry(dtype, size, make)


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _write_weights(folder: Path, entries: dict[str, Entry]) -> None:
    partial_file = folder / "model.safetensors.part"
    write_tensors(partial_file, entries)
    partial_file.rename(folder / "model.safetensors")


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Byte-level, one token a byte; fillers up to the vocabulary's size, the last of which ends a text."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"<|filler_{index}|>" for index in range(len(words), vocabulary - 1)]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate([*words, END])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)
    fast.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"  # transformers 4 does not know the class that 5 writes there
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))


PARTS: dict[str, Callable[[Path, Shape], Path]] = {
    "captioner": write_captioner,
    "base": partial(write_captioner, lora=False),
    "decoder": write_decoder,
    "tower": write_tower,
    "encoder-decoder": write_encoder_decoder,
}


def main() -> None:
    """Write the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all but the last without one")
    arguments = parser.parse_args()
    captioner = [part for part in PARTS if part != "encoder-decoder"]
    for part in arguments.parts or captioner:
        PARTS[part](arguments.folder / part, SHAPES[arguments.shape])


if __name__ == "__main__":
    main()
