"""Checkpoints: a config, its family, and every tensor under the name that transformers 5's module tree gives it.

Keys are translated once, by the family; everything after this module uses the translated names. Nothing is loaded here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from vlm_export.errors import InputError, VlmExportError, reason, shown
from vlm_export.families._known import named_as_today
from vlm_export.families.registry import find_family
from vlm_export.forms.model_config import sections
from vlm_export.forms.reading import needed_json_of
from vlm_export.models.library import without_weights
from vlm_export.own_files import check_files
from vlm_export.spec.family import Family
from vlm_export.tensors import other_folders
from vlm_export.tensors.peft_keys import below_root
from vlm_export.tensors.stored import TensorRef, stored_tensors
from vlm_export.tensors.weight_files import folder_of

# What is downloaded of a model and of an adapter; and what lies beside the weights of both.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",  # this and the next six: what older checkpoints have instead of tokenizer.json
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
)
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
    "pytorch_model.bin.index.json",
    *COMPANIONS,
)
TRAINED_BESIDE_LORA = "non_lora_trainables.bin"  # of LLaVA's own trainer: the projector
ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    TRAINED_BESIDE_LORA,
    *COMPANIONS,
)
_TOLD = ("model_type", "architectures")  # looked at for itself, or of no effect
_WORD = 8  # letters from which on a key in a message is no word of it
_SAVED_MODULE = re.compile(r"\.modules_to_save\.[^.]+\.")
_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B)(\.[A-Za-z0-9_-]+)?\.weight$")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, opened.

    Attributes:
        path: its folder.
        tensors: the model's plain tensors by parameter name.
        lora: LoRA tensors that the checkpoint itself carries, by the names that PEFT saves.
        unused: keys that the family says inference never reads.
        notes: what was not taken as it is written, a sentence each.
    """

    path: Path
    config: Mapping[str, Any]
    family: Family
    tensors: Mapping[str, TensorRef]
    lora: Mapping[str, TensorRef]
    unused: tuple[str, ...]
    notes: tuple[str, ...] = ()


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the config and the tensor index of a checkpoint: a folder, or the file of weights in one.

    Raises:
        InputError: no config, an unsupported model_type, no safetensors, two tensors of one name, or a link that leads
            out of the folder.
    """
    folder = folder_of(path)
    check_files(folder, MODEL_FILES)
    if not (folder / "config.json").is_file() and (instead := other_folders.no_model(folder)):
        raise InputError(instead)
    config = named_as_today(needed_json_of(folder, "config.json"))
    if "model_type" not in config:
        raise InputError(f"{folder / 'config.json'}: no `model_type`; is this a model folder?")
    family = find_family(config["model_type"], str(folder / "config.json"), has_code="auto_map" in config)
    plain: dict[str, TensorRef] = {}
    lora: dict[str, TensorRef] = {}
    unused = []
    with _reading_config(folder, config):
        family.text_config(config)
        name_of = family.names(config)
    for key, ref in stored_tensors(path).items():
        unwrapped = _without_peft(key)
        name = None if unwrapped is None else name_of(unwrapped)
        if name is None:
            unused.append(key)
            continue
        found = _LORA_KEY.match(name)
        target = lora if found else plain
        name = f"{found['module']}.lora_{found['part']}.weight" if found else name
        if name in target:
            raise InputError(f"{ref}: a second tensor for {name}; keep one of the two")
        target[name] = ref
    return Checkpoint(folder, config, family, plain, lora, tuple(sorted(unused)))


def _without_peft(key: str) -> str | None:
    """A base model's key in what `PeftModel.state_dict` gives; None for what PEFT keeps and does not use."""
    if ".original_module." in key:
        return None
    key = _SAVED_MODULE.sub(".", key).replace(".base_layer.", ".")
    return below_root(key)


def build_empty(checkpoint: Checkpoint) -> nn.Module:
    """The checkpoint's model with real buffers and parameters on the meta device: modules without weights.

    Raises:
        InputError: the config does not describe a model.
    """
    _check_image_token(checkpoint)
    with _reading_config(checkpoint.path, checkpoint.config):
        with without_weights():
            model = checkpoint.family.build(dict(checkpoint.config)).eval()
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.tie_weights()  # building on the meta device separates what the config ties
    return model


def _check_image_token(checkpoint: Checkpoint) -> None:
    """Raises InputError where the token that stands for an image is none of the model's."""
    config, path = checkpoint.config, checkpoint.path / "config.json"
    text = config.get("text_config") or {}
    for key in ("image_token_id", "image_token_index"):
        value, rows = config.get(key), text.get("vocab_size")
        if isinstance(value, int) and (value < 0 or (isinstance(rows, int) and value >= rows)):
            raise InputError(f"{path}: {key}: is {value}; it must be one of the text_config.vocab_size, {rows}, tokens")


@contextmanager
def _reading_config(folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Within, what a model's class raises becomes an InputError about the folder's `config.json`, and the key of it.

    Which key that is, a class seldom says.
    """
    path = folder / "config.json"
    try:
        yield
    except VlmExportError:
        raise
    except Exception as error:
        key = next(_suspects(config, str(path), str(error)), "")
        raise InputError(f"{path}: {key and f'{key}: '}cannot build the model: {reason(error)}") from error


def _suspects(config: Mapping[str, Any], path: str, said: str) -> Iterator[str]:
    """Keys whose values a model's class may have stumbled over, the likeliest first."""
    parts = list(sections(config, path))
    for place, section in parts:
        yield from (f"{place}{key} null" for key, value in section.items() if value is None and key.endswith("_config"))
        if place and "model_type" in section and section["model_type"] not in CONFIG_MAPPING:
            yield f"{place}model_type {shown(section['model_type'])}"
    for place, section in parts:
        padding, rows = section.get("pad_token_id"), section.get("vocab_size")
        if isinstance(padding, int) and isinstance(rows, int) and padding >= rows:
            yield f"{place}pad_token_id {padding}, of vocab_size {rows}"
        heads, size = section.get("num_attention_heads"), section.get("hidden_size")
        if isinstance(heads, int) and isinstance(size, int) and heads and size % heads:
            yield f"{place}num_attention_heads {heads}, of {size}"
    inner = {f"{place}{key}.": value for place, part in parts for key, value in part.items() if isinstance(value, dict)}
    for place, section in [*parts, *inner.items()]:
        named = (key for key, value in section.items() if isinstance(value, str) and value and value in said)
        yield from (f"{place}{key} {shown(section[key])}" for key in named if key not in _TOLD)
        yield from (f"{place}{key}" for key in section if len(key) > _WORD and key in said)
