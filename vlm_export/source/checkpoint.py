"""Checkpoints on disk: which tensors there are, under which names, and where their bytes lie. Nothing is loaded here
before it is asked for.

A checkpoint folder holds `config.json` and its weights as safetensors, whole or sharded; pickles (`.bin`) are read
without running what they ask for. Keys are translated once, by
the family, into the names of transformers 5's module tree; everything after this module uses those.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from transformers.initialization import no_init_weights

from vlm_export.errors import InputError
from vlm_export.families.base import Family, find_family
from vlm_export.files import read_json
from vlm_export.own_files import check_files, own_file
from vlm_export.tensors import other_folders
from vlm_export.tensors.peft_keys import PEFT_ROOT, below_root
from vlm_export.tensors.safetensors_writer import DTYPES

WEIGHTS = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
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
_PICKLES = {WEIGHTS: "pytorch_model.bin", ADAPTER_WEIGHTS: "adapter_model.bin"}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What stands for a module's weight, or beside it: an adapter's tensors, and those of packed integers.
_PART = re.compile(r"\.(lora_|token_adapter\.|base_layer\.|(qweight|qzeros|scales|g_idx)$)")
# What torch.compile, FSDP and activation checkpointing put between a module's name and its parts'.
_WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_SAVED_MODULE = re.compile(r"\.modules_to_save\.[^.]+\.")
_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B)(\.[A-Za-z0-9_-]+)?\.weight$")


class Weight(Protocol):
    """A tensor that is somewhere else, or is computed when it is asked for. `dtype` is safetensors' name for it.

    `rounded` says what would be left of another value for it, were that stored in the same way.
    """

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def load(self) -> torch.Tensor: ...

    def rounded(self, value: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a file: read with `load`, which maps it into memory."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    def load(self, rows: slice | None = None) -> torch.Tensor:
        """The tensor, or some of its rows."""
        if is_pickle(self.file):
            tensor = _unpickled(self.file)[self.key]
            return tensor if rows is None else tensor[rows]
        with safe_open(self.file, framework="pt") as handle:
            return handle.get_tensor(self.key) if rows is None else handle.get_slice(self.key)[rows]

    def rounded(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(DTYPES[self.dtype])

    def __str__(self) -> str:
        return f"{self.file.name}: {self.key}"


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
    config = read_json(folder / "config.json")
    if "model_type" not in config:
        raise InputError(f"{folder / 'config.json'}: no `model_type`; is this a model folder?")
    family = find_family(config["model_type"], str(folder / "config.json"), has_code="auto_map" in config)
    plain: dict[str, TensorRef] = {}
    lora: dict[str, TensorRef] = {}
    unused = []
    with _reading_config(path):
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


def folder_of(path: Path) -> Path:
    """Where a checkpoint's or adapter's settings lie: the folder itself, or that of its one file of weights."""
    return path.parent if path.is_file() else path


def stored_tensors(path: Path, whole: str = WEIGHTS) -> dict[str, TensorRef]:
    """Every tensor of a folder's file or shards, or of one file, by key without the names of wrappers around modules.

    Raises:
        InputError: there are no weights, a shard is missing, or a file cannot be read.
    """
    refs: dict[str, TensorRef] = {}
    for ref in (ref for file in weight_files(path, whole) for ref in _tensors_of(file)):
        key = _WRAPPER.sub("", ref.key)
        if key in refs:
            raise InputError(f"{ref}: is in {refs[key].file.name} too; keep one of the two")
        refs[key] = ref
    for prefix in ("", PEFT_ROOT):
        if refs and all(key.startswith(f"{prefix}module.") for key in refs):  # DataParallel, DeepSpeed
            return {prefix + key.removeprefix(f"{prefix}module."): ref for key, ref in refs.items()}
    return refs


def weight_files(path: Path, whole: str = WEIGHTS) -> list[Path]:
    """The files that hold the weights of a checkpoint, or of an adapter, as the name of its `whole` file says.

    Safetensors are preferred to pickles.

    Raises:
        InputError: there are none, or one is a link that leads out of the folder.
    """
    if path.is_file():
        own_file(path.parent, path.name)
        return [path]
    for name in (whole, _PICKLES[whole]):
        if file := own_file(path, name):
            return [file]
        if index := own_file(path, f"{name}.index.json"):
            return [own_file(path, shard) or path / shard for shard in _shard_names(index)]
    if instead := (other_folders.no_model if whole == WEIGHTS else other_folders.no_adapter)(path):
        raise InputError(instead)
    raise InputError(f"{path}: no {whole} (nor {whole}.index.json, {_PICKLES[whole]}); save the weights as safetensors")


def is_pickle(file: Path) -> bool:
    return file.suffix in (".bin", ".pt", ".pth")


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    """A pickled state dict, its tensors mapped into memory, nothing in it executed.

    Raises:
        InputError: it holds something else, or its format is older than PyTorch 1.6's and cannot be mapped.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{file}: not tensors alone, or too old; save it as safetensors: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{file}: holds more than named tensors; save the model's state_dict as safetensors")
    return state


def _shard_names(index_file: Path) -> list[str]:
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index_file}: no weight_map of tensor names to file names")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name == "..":
            raise InputError(f"{index_file}: weight_map: {name!r} is outside the checkpoint's folder")
    return sorted(set(weight_map.values()))


def _tensors_of(file: Path) -> list[TensorRef]:
    try:
        if is_pickle(file):
            return [
                TensorRef(file, key, _SAFETENSORS_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
                for key, tensor in _unpickled(file).items()
            ]
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
    with _reading_config(checkpoint.path), without_weights():
        model = checkpoint.family.build(dict(checkpoint.config)).eval()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.tie_weights()  # building on the meta device separates what the config ties
    return model


@contextmanager
def without_weights() -> Iterator[None]:
    """What is built within has its parameters on the meta device, where nothing fills them, and real buffers.

    transformers would fill them all the same, each by a dozen calls that compute nothing.
    """
    with no_init_weights(), init_empty_weights(include_buffers=False):
        yield


@contextmanager
def _reading_config(path: Path) -> Iterator[None]:
    """Within, what a model's class raises is about the folder's `config.json`."""
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise InputError(f"{path / 'config.json'}: cannot build the model: {detail}") from error


def library_names(model: PreTrainedModel) -> Callable[[str], str]:
    """For families that are a class of transformers: a checkpoint's tensor name → the name in that class's module tree.

    What the library itself does when it loads: names of transformers 4 and of other frameworks' ports become those of
    transformers 5, and a bare base model's get the prefix that the class has. LoRA tensors are renamed like the weight
    of the module that they adapt, packed integers like the weight that they are. `model` may be without weights.
    Tensors that the library would fuse, split or transpose keep their names, and so are reported as unknown.
    """
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    names: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())

    def rename(key: str) -> str:
        part = _PART.search(key)
        probe = f"{key[: part.start()]}.weight" if part else key
        renamed, _ = rename_source_key(probe, renamings, [], model.base_model_prefix, names)
        return renamed.removesuffix(".weight") + key[part.start() :] if part else renamed

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
