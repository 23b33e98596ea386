"""Checkpoints on disk: which tensors there are, under which names, and where their bytes lie. Nothing is loaded here
before it is asked for.

A checkpoint folder holds `config.json` and its weights as safetensors, whole or sharded. Keys are translated once, by
the family, into the names of transformers 5's module tree; everything after this module uses those.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from vlm_export.errors import InputError
from vlm_export.families.base import Family, find_family

WEIGHTS = "model.safetensors"
_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B)(\.[A-Za-z0-9_-]+)?\.weight$")


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a safetensors file: read with `load`."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    def load(self) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as handle:
            return handle.get_tensor(self.key)

    def __str__(self) -> str:
        return f"{self.file.name}: {self.key}"


@dataclass(frozen=True)
class LoraPair:
    """`ΔW = scale · B @ A` of one module: A is `[r, in]`, B is `[out, r]`."""

    a: TensorRef
    b: TensorRef


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, opened.

    Attributes:
        tensors: the model's plain tensors by parameter name.
        lora: LoRA pairs that the checkpoint itself carries, by module name.
        unused: keys that the family says inference never reads.
    """

    path: Path
    config: Mapping[str, Any]
    family: Family
    tensors: Mapping[str, TensorRef]
    lora: Mapping[str, LoraPair]
    unused: tuple[str, ...]


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the config and the tensor index of a checkpoint folder.

    Raises:
        InputError: no config, an unsupported model_type, no safetensors, or LoRA tensors without their other half.
    """
    config = read_json(path / "config.json")
    if "model_type" not in config:
        raise InputError(f"{path / 'config.json'}: no `model_type`; is this a model folder?")
    family = find_family(config["model_type"], str(path / "config.json"))
    plain: dict[str, TensorRef] = {}
    lora: dict[str, TensorRef] = {}
    unused = []
    with _reading_config(path):
        name_of = family.names(config)
    for key, ref in stored_tensors(path).items():
        name = name_of(key)
        if name is None:
            unused.append(key)
            continue
        target = lora if _LORA_KEY.match(name) else plain
        if name in target:
            raise InputError(f"{ref}: a second tensor for {name}; keep one of the two")
        target[name] = ref
    return Checkpoint(path, config, family, plain, pair_lora(lora), tuple(sorted(unused)))


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


def pair_lora(refs: Mapping[str, TensorRef]) -> dict[str, LoraPair]:
    """Bring `….lora_A…weight` and `….lora_B…weight` of one module together.

    Raises:
        InputError: a module has one of the two, or they do not fit each other.
    """
    halves: dict[str, dict[str, TensorRef]] = {}
    for name, ref in refs.items():
        match = _LORA_KEY.match(name)
        if match is None:
            raise InputError(f"{ref}: not LoRA on a linear layer (lora_A, lora_B), which is all that can be merged")
        parts = halves.setdefault(match["module"], {})
        if match["part"] in parts:
            raise InputError(f"{ref}: a second lora_{match['part']} of {match['module']}; keep one adapter")
        parts[match["part"]] = ref
    for module, parts in halves.items():
        if set(parts) != {"A", "B"}:
            present = next(iter(parts.values()))
            missing = ({"A", "B"} - set(parts)).pop()
            raise InputError(f"{present}: has no lora_{missing} beside it for {module}; the adapter is incomplete")
        a, b = parts["A"].shape, parts["B"].shape
        if len(a) != 2 or len(b) != 2:
            raise InputError(f"{parts['B']}: shape {list(b)}, lora_A's is {list(a)}; only matrices can be merged")
        if a[0] != b[1]:
            raise InputError(f"{parts['B']}: shape {list(b)} does not fit lora_A's {list(a)}")
    return {module: LoraPair(parts["A"], parts["B"]) for module, parts in sorted(halves.items())}


def load_tensors(model: nn.Module, tensors: Mapping[str, TensorRef]) -> nn.Module:
    """Fill an empty model with float32 weights; tied parameters stay tied. `tensors` must cover it (see `merge`)."""
    shared = aliases(model)
    state = {name: tensors[name].load().float() for name, _ in model.named_parameters()}
    state |= {alias: state[name] for alias, name in shared.items()}
    model.load_state_dict(state, strict=False, assign=True)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.tie_weights()
    return model.requires_grad_(False)


def build_empty(checkpoint: Checkpoint) -> nn.Module:
    """The checkpoint's model with real buffers and parameters on the meta device: structure without weights.

    Raises:
        InputError: the config does not describe a model.
    """
    with _reading_config(checkpoint.path), init_empty_weights(include_buffers=False):
        model = checkpoint.family.build(dict(checkpoint.config)).eval()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.tie_weights()  # building on the meta device separates what the config ties
    return model


@contextmanager
def _reading_config(path: Path) -> Iterator[None]:
    """Within, what a model's class raises is about the folder's `config.json`."""
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise InputError(f"{path / 'config.json'}: cannot build the model: {detail}") from error


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
