"""Tiny vision encoder-decoders on disk as transformers saves them, each from the real config classes of its parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pico
import torch
from torch import nn
from transformers import (
    AutoConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)

START, END = 1, 256
_TOWER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_BERT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 40}
_BART = {"d_model": 32, "decoder_ffn_dim": 48, "decoder_attention_heads": 4, "max_position_embeddings": 40}
ENCODERS: dict[str, dict[str, Any]] = {
    "vit": _TOWER,
    "deit": _TOWER,
    "siglip_vision_model": _TOWER,
    "swin": {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [1, 2],
        "window_size": 4,
    },
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 32, "n_head": 4, "n_positions": 40}),
    "bert": ("bert", _BERT),
    "roberta": ("roberta", _BERT),
    "trocr": (
        "trocr",
        _BART | {"scale_embedding": True, "layernorm_embedding": False, "cross_attention_hidden_size": 24},
    ),
    "trocr, sinusoidal": (
        "trocr",
        _BART | {"use_learned_position_embeddings": False, "tie_word_embeddings": False},
    ),
    "mbart": ("mbart", _BART | {"scale_embedding": True, "encoder_attention_heads": 8}),
}
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 16, "width": 16},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def config(encoder: str = "vit", decoder: str = "gpt2", *, layers: int = 2) -> VisionEncoderDecoderConfig:
    model_type, sizes = DECODERS[decoder]
    depth = {"gpt2": "n_layer", "trocr": "decoder_layers", "mbart": "decoder_layers"}
    sizes = sizes | {depth.get(model_type, "num_hidden_layers"): layers}
    tokens = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": 0, "decoder_start_token_id": START}
    text = AutoConfig.for_model(model_type, vocab_size=pico.VOCABULARY, **sizes, **tokens)
    vision = AutoConfig.for_model(encoder, **ENCODERS[encoder])
    return VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text, **tokens)


def model(settings: VisionEncoderDecoderConfig, *, seed: int = 0) -> VisionEncoderDecoderModel:
    """Random weights with which images, positions and every layer show in the logits."""
    torch.manual_seed(seed)
    made = VisionEncoderDecoderModel(settings).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        norm = "norm" in name.lower() and name.endswith("weight")
        looking = "crossattention" in name or "encoder_attn." in name
        nn.init.normal_(parameter, mean=float(norm), std=0.4 if looking else 0.2)
    made.decoder.tie_weights()
    return made


def write_adapter(folder: Path, settings: VisionEncoderDecoderConfig, targets: Sequence[str], *, seed: int = 1) -> Path:
    """A PEFT adapter folder (saved by PEFT) with non-zero weights."""
    wrapped = peft.get_peft_model(model(settings), peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets)))
    torch.manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(folder)
    return folder


def write_checkpoint(folder: Path, settings: VisionEncoderDecoderConfig, *, seed: int = 0) -> Path:
    model(settings, seed=seed).save_pretrained(folder)
    pico.write_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder
