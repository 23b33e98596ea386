"""Tensors on disk: which files hold them, under which keys, and where their bytes lie.

Weights are safetensors, whole or sharded; pickles (`.bin`) are read without running what they ask for. Nothing is
loaded before it is asked for.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from vlm_export.errors import InputError
from vlm_export.tensors.peft_keys import PEFT_ROOT
from vlm_export.tensors.safetensors_writer import DTYPES
from vlm_export.tensors.weight_files import WEIGHTS, is_pickle, weight_files

_SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What torch.compile, FSDP and activation checkpointing put between a module's name and its parts'.
_WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")


class Weight(Protocol):
    """A tensor that is somewhere else, or is computed when it is asked for. `dtype` is safetensors' name for it.

    `rounded` says what would be left of another value for it, were that stored in the same way.
    """

    @property
    def dtype(self) -> str:
        """The dtype that `load` gives, by safetensors' name for it, such as F32."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that `load` gives."""

    def load(self) -> torch.Tensor:
        """The tensor, read or computed at every call."""

    def rounded(self, value: torch.Tensor) -> torch.Tensor:
        """What would be left of `value`, of the same shape, were it stored as this one is."""


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a file: read with `load`, which maps it into memory."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    def load(self, rows: slice | None = None) -> torch.Tensor:
        """The tensor, or some of its rows, on the CPU."""
        if is_pickle(self.file):
            tensor = _unpickled(self.file)[self.key]
            return tensor if rows is None else tensor[rows]
        with safe_open(self.file, framework="pt") as handle:
            return handle.get_tensor(self.key) if rows is None else handle.get_slice(self.key)[rows]

    def rounded(self, value: torch.Tensor) -> torch.Tensor:
        """`value` cast to the tensor's dtype."""
        return value.to(DTYPES[self.dtype])

    def __str__(self) -> str:
        return f"{self.file.name}: {self.key}"


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
