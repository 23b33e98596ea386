"""The tensors of a checkpoint or an adapter by name, type and shape: of safetensors, the headers alone are read."""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_export.errors import InputError
from vlm_export.start.named import Named
from vlm_export.tensors.weight_files import WEIGHTS, is_pickle, weight_files

_LONGEST_HEADER_BYTES = 100_000_000  # that safetensors itself reads
_SHARD = r"-\d+-of-\d+"
# Bytes of a number, by safetensors' name of its type; what is not here is of packed integers, 1.
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class Header:
    """A tensor as its file's header has it; `dtype` is safetensors' name, such as BF16."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """What it takes in its file."""
        return self.parameters * _BYTES.get(self.dtype, 1)


def read_headers(named: Named, whole: str = WEIGHTS) -> tuple[Header, ...]:
    """Every tensor of a checkpoint, or of an adapter, as the name of its `whole` file says.

    Pickles of this machine are opened with torch, which maps them; those of the Hub are not fetched.

    Raises:
        InputError: there are no weights, or none whose header can be read.
    """
    if named.is_local:
        return tuple(header for file in weight_files(named.path, whole) for header in _of_file(file))
    return tuple(header for name in _files_of_the_hub(named, whole) for header in _of_the_hub(named, name))


def _of_file(file: Path) -> list[Header]:
    if is_pickle(file):
        from vlm_export.tensors.stored import stored_tensors

        return [Header(key, ref.dtype, ref.shape) for key, ref in stored_tensors(file).items()]
    try:
        return _headers(_header_of(file))
    except (KeyError, TypeError) as error:
        raise InputError(f"{file}: not a readable safetensors file: a tensor without dtype or shape") from error


def _header_of(file: Path) -> dict[str, Any]:
    """The JSON at the beginning of a safetensors file, behind its length in 8 bytes."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > _LONGEST_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            values = json.loads(opened.read(length))
    except FileNotFoundError:
        raise InputError(f"{file}: the index names this shard, and it is not there") from None
    except (OSError, ValueError, struct.error, RecursionError) as error:
        raise InputError(f"{file}: not a readable safetensors file: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{file}: not a readable safetensors file: its header is a {type(values).__name__}")
    return values


def _headers(values: dict[str, Any]) -> list[Header]:
    """Raises KeyError or TypeError for a tensor that lacks something."""
    return [
        Header(key, str(value["dtype"]), tuple(map(int, value["shape"])))
        for key, value in values.items()
        if key != "__metadata__"
    ]


def _files_of_the_hub(named: Named, whole: str) -> list[str]:
    """The files of weights of a repo; safetensors alone, since a pickle has no header.

    Raises:
        InputError: there are none.
    """
    stem, _, suffix = whole.rpartition(".")
    pattern = re.compile(rf"{re.escape(stem)}({_SHARD})?\.{suffix}")
    found = sorted(name for name in named.sizes_bytes if pattern.fullmatch(name))
    if not found:
        raise InputError(f"{named.reference}: no {whole}; download it and name the folder, if it has weights at all")
    return found


def _of_the_hub(named: Named, name: str) -> list[Header]:
    from vlm_export import hub

    cached = named.path / name
    if cached.exists():
        return _of_file(cached)
    tensors = hub.tensors_of(named.reference, name, revision=str(named.commit))
    return [Header(key, dtype, shape) for key, (dtype, shape) in tensors.items()]
