"""Tiny checkpoints in distilvit2's on-disk format: real config classes, two layers, hidden 32, LoRA that matters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from vlm_export.models.prefix import PrefixConditioningVLM
from vlm_export.models.towers import build_tower

VOCABULARY = 260
END = "<|endoftext|>"
LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HALF_OF_A_HEAD = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
GEMMA_LIKE = LLAMA_LIKE | {"head_dim": 16, "query_pre_attn_scalar": 16}
# What a decoder's config says beside the number of layers, to which a list is repeated; the client knows all of them
# but seed_oss.
DECODERS: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "gpt2": {"n_embd": 32, "n_head": 4, "n_positions": 64},
    "smollm3": LLAMA_LIKE | {"head_dim": 16, "no_rope_layers": [1, 0]},
    "opt": {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}
    | {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE | {"head_dim": 16},
    "phi3": LLAMA_LIKE
    | {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "gemma": LLAMA_LIKE | {"head_dim": 16},
    "gemma2": GEMMA_LIKE,
    "seed_oss": LLAMA_LIKE | {"head_dim": 8},
    "gemma3_text": GEMMA_LIKE | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
}
TARGETS = {name: ["q_proj", "k_proj", "v_proj", "o_proj"] for name in DECODERS} | {
    "gpt2": ["c_attn", "c_proj"],
    "opt": ["q_proj", "v_proj"],
    "phi3": ["qkv_proj", "o_proj"],
}
TOWERS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {},
    "clip_vision_model": {},
    "vit": {},
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2, "num_register_tokens": 3},
}
# Names of today's transformers → those of transformers 4, which a checkpoint has on disk.
_WITHIN_VISION_MODEL = [(r"^", "vision_model.")]
_QUERY_KEY_VALUE = [
    (rf"attention\.{name[0]}_proj", f"attention.attention.{name}") for name in ("query", "key", "value")
]
_OLD_TOWER_NAMES = {
    "siglip_vision_model": _WITHIN_VISION_MODEL,
    "clip_vision_model": _WITHIN_VISION_MODEL,
    "vit": [
        *_QUERY_KEY_VALUE,
        (r"attention\.o_proj", "attention.output.dense"),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
        (r"^layers\.", "encoder.layer."),
    ],
}
_OLD_TOWER_NAMES["dinov2"] = [*_QUERY_KEY_VALUE, (r"attention\.o_proj", "attention.output.dense")]
_OLD_TOWER_NAMES["dinov2_with_registers"] = _OLD_TOWER_NAMES["dinov2"]
Tensors = dict[str, torch.Tensor]


def config(
    decoder: str = "llama",
    *,
    tower: str = "siglip_vision_model",
    projection: str = "linear",
    tied: bool = True,
    layers: int = 2,
) -> dict[str, Any]:
    """`config.json` of a pico model: a tower of 16 pixels and 4 patches, and a decoder."""
    vision = AutoConfig.for_model(
        tower,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        **TOWERS[tower],
    )
    ids = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    kinds = {key: (value * layers)[:layers] for key, value in DECODERS[decoder].items() if isinstance(value, list)}
    sizes = DECODERS[decoder] | kinds | {"n_layer" if decoder == "gpt2" else "num_hidden_layers": layers}
    text = AutoConfig.for_model(
        decoder, vocab_size=VOCABULARY, tie_word_embeddings=tied, initializer_range=0.2, **sizes, **ids
    )
    return {
        "model_type": "prefix_conditioning_vlm",
        "architectures": ["PrefixConditioningVLM"],
        "vision_config": vision.to_dict(),
        "text_config": text.to_dict(),
        "projection_type": projection,
        "projection_dim": 512,
        "mlp_hidden_dim": 40,
        "freeze_vision_encoder": True,
        "vision_unfreeze_layers": 0,
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "lora_target_modules": None,
        "max_length": 30,
    }


def write_checkpoint(
    folder: Path,
    settings: dict[str, Any] | None = None,
    *,
    lora: bool = True,
    change: Callable[[Tensors], None] = lambda _: None,
    seed: int = 0,
) -> Path:
    """Write a checkpoint folder as distilvit2 does; `change` may spoil its tensors before they are saved.

    Without `lora` it is a plain base model: no LoRA keys, no PEFT prefixes, no LoRA settings.
    """
    settings = settings or config()
    torch.manual_seed(seed)
    model = PrefixConditioningVLM(settings).eval()
    _spread(model)
    folder.mkdir(parents=True, exist_ok=True)
    if lora:
        add_adapter(model, settings)
        tower = settings["vision_config"]["model_type"]
        whole = dict(model.state_dict()) | _unused_of_tower(settings)
        tensors = {to_disk(name, tower): tensor for name, tensor in whole.items()}
    else:
        tensors = dict(model.state_dict())
        settings = {key: value for key, value in settings.items() if not key.startswith("lora_")}
    if settings["text_config"]["tie_word_embeddings"]:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("lm_head.weight")}
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))
    write_tokenizer(folder)
    return folder


def write_peft_adapter(folder: Path, settings: dict[str, Any], *, seed: int = 1, **lora: Any) -> Path:
    """A standard PEFT adapter folder (saved by PEFT) for the base of `write_checkpoint(..., lora=False)`."""
    torch.manual_seed(0)
    model = PrefixConditioningVLM(settings)
    _spread(model)
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[settings["text_config"]["model_type"]], **lora}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    torch.manual_seed(seed)
    _fill_adapter(wrapped)
    wrapped.save_pretrained(folder)
    return folder


def add_adapter(model: PrefixConditioningVLM, settings: dict[str, Any], *, seed: int = 1) -> None:
    """LoRA on the language model, in place, with non-zero weights."""
    targets = TARGETS[settings["text_config"]["model_type"]]
    lora = peft.LoraConfig(r=settings["lora_r"], lora_alpha=settings["lora_alpha"], target_modules=targets)
    peft.inject_adapter_in_model(lora, model.language_model)
    torch.manual_seed(seed)
    _fill_adapter(model)


def to_disk(name: str, tower: str = "siglip_vision_model") -> str:
    """A parameter name of the wrapped model → the key in a distilvit2 checkpoint."""
    if name.startswith("vision_encoder."):
        name = name.removeprefix("vision_encoder.")
        for pattern, old in _OLD_TOWER_NAMES[tower]:
            name = re.sub(pattern, old, name)
        return f"vision_encoder.{name}"
    return name.replace("language_model.", "language_model.base_model.model.", 1)


def write_tokenizer(folder: Path) -> None:
    """Byte-level, one token a byte, and an end token with id 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)
    fast.save_pretrained(folder)


def _spread(model: torch.nn.Module) -> None:
    """Weights large enough that images, positions and adapters show in the logits."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "language_model" not in name:
            torch.nn.init.normal_(parameter, std=0.2)


def _fill_adapter(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)


def _unused_of_tower(settings: dict[str, Any]) -> Tensors:
    """What a tower has in transformers and not in ours: its pooler or head, its mask token."""
    whole = AutoModel.from_config(AutoConfig.for_model(**settings["vision_config"]))
    used = build_tower(settings["vision_config"]).state_dict()
    return {f"vision_encoder.{name}": tensor for name, tensor in whole.state_dict().items() if name not in used}
