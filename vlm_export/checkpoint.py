"""Checkpoints on disk: which tensors there are, under which names, and where their bytes lie. Nothing is loaded here
before it is asked for.

A checkpoint folder holds `config.json` and its weights as safetensors, whole or sharded. Keys are translated once, by
the family, into the names of transformers 5's module tree; everything after this module uses those.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from vlm_export.errors import InputError
from vlm_export.families.base import Family, find_family

WEIGHTS = "model.safetensors"
_ADAPTER_PART = re.compile(r"\.(lora_|token_adapter\.|base_layer\.)")
_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B)(\.[A-Za-z0-9_-]+)?\.weight$")


class Weight(Protocol):
    """A tensor that is somewhere else, or is computed when it is asked for. `dtype` is safetensors' name for it."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def load(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a safetensors file: read with `load`, which maps it into memory."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    def load(self, rows: slice | None = None) -> torch.Tensor:
        """The tensor, or some of its rows."""
        with safe_open(self.file, framework="pt") as handle:
            return handle.get_tensor(self.key) if rows is None else handle.get_slice(self.key)[rows]

    def __str__(self) -> str:
        return f"{self.file.name}: {self.key}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, opened.

    Attributes:
        tensors: the model's plain tensors by parameter name.
        lora: LoRA tensors that the checkpoint itself carries, by the names that PEFT saves.
        unused: keys that the family says inference never reads.
    """

    path: Path
    config: Mapping[str, Any]
    family: Family
    tensors: Mapping[str, TensorRef]
    lora: Mapping[str, TensorRef]
    unused: tuple[str, ...]


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the config and the tensor index of a checkpoint folder.

    Raises:
        InputError: no config, an unsupported model_type, no safetensors, or two tensors of one name.
    """
    config = read_json(path / "config.json")
    if "model_type" not in config:
        raise InputError(f"{path / 'config.json'}: no `model_type`; is this a model folder?")
    family = find_family(config["model_type"], str(path / "config.json"))
    plain: dict[str, TensorRef] = {}
    lora: dict[str, TensorRef] = {}
    unused = []
    for key, ref in stored_tensors(path).items():
        name = family.rename(key)
        if name is None:
            unused.append(key)
            continue
        found = _LORA_KEY.match(name)
        target = lora if found else plain
        name = f"{found['module']}.lora_{found['part']}.weight" if found else name
        if name in target:
            raise InputError(f"{ref}: a second tensor for {name}; keep one of the two")
        target[name] = ref
    return Checkpoint(path, config, family, plain, lora, tuple(sorted(unused)))


def stored_tensors(path: Path, whole: str = WEIGHTS) -> dict[str, TensorRef]:
    """Every tensor of a folder's safetensors file or shards, by key, a DataParallel `module.` prefix removed.

    Raises:
        InputError: there are no safetensors, a shard is missing, or a file cannot be read.
    """
    index_file = path / f"{whole}.index.json"
    if (path / whole).is_file():
        files = [path / whole]
    elif index_file.is_file():
        files = [path / name for name in _shard_names(index_file)]
    else:
        raise InputError(f"{path}: no {whole} (nor {index_file.name}); save the checkpoint as safetensors")
    refs: dict[str, TensorRef] = {}
    for ref in (ref for file in files for ref in _tensors_of(file)):
        if ref.key in refs:
            raise InputError(f"{ref}: is in {refs[ref.key].file.name} too; keep one of the two")
        refs[ref.key] = ref
    if refs and all(key.startswith("module.") for key in refs):
        return {key.removeprefix("module."): ref for key, ref in refs.items()}
    return refs


def _shard_names(index_file: Path) -> list[str]:
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index_file}: no weight_map of tensor names to file names")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise InputError(f"{index_file}: weight_map: {name!r} is outside the checkpoint's folder")
    return sorted(set(weight_map.values()))


def _tensors_of(file: Path) -> list[TensorRef]:
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
            return [TensorRef(file, key, part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()]
    except FileNotFoundError:
        raise InputError(f"{file}: the index names this shard, and it is not there") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a readable safetensors file: {error}") from error


def build_empty(checkpoint: Checkpoint) -> nn.Module:
    """The checkpoint's model with real buffers and parameters on the meta device: structure without weights.

    Raises:
        InputError: the config does not describe a model.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model = checkpoint.family.build(dict(checkpoint.config)).eval()
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise InputError(f"{checkpoint.path / 'config.json'}: cannot build the model: {detail}") from error
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.tie_weights()  # building on the meta device separates what the config ties
    return model


def library_names(model: PreTrainedModel) -> Callable[[str], str]:
    """For families that are a class of transformers: a checkpoint's tensor name → the name in that class's module tree.

    What the library itself does when it loads: names of transformers 4 and of other frameworks' ports become those of
    transformers 5, and a bare base model's get the prefix that the class has. LoRA tensors are renamed like the weight
    of the module that they adapt. `model` may be without weights. Tensors that the library would fuse, split or
    transpose keep their names, and so are reported as unknown.
    """
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    names: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())

    def rename(key: str) -> str:
        adapted = _ADAPTER_PART.search(key)
        probe = f"{key[: adapted.start()]}.weight" if adapted else key
        renamed, _ = rename_source_key(probe, renamings, [], model.base_model_prefix, names)
        return renamed.removesuffix(".weight") + key[adapted.start() :] if adapted else renamed

    return rename


def aliases(model: nn.Module) -> dict[str, str]:
    """Every parameter name that shares storage with an earlier one (a tied head) → that one's name."""
    first: dict[int, str] = {}
    result = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        canonical = first.setdefault(id(parameter), name)
        if canonical != name:
            result[name] = canonical
    return result


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: it is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
