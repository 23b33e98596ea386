"""Write a safetensors file tensor by tensor: no more than one of them is in memory.

The format (https://github.com/huggingface/safetensors): the header's length as a little-endian u64, a JSON header with
dtype, shape and byte range of each tensor, then the bytes. The library itself writes only what is in memory as a whole.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """A tensor to write: `make` is called when its turn comes; the result is cast to `dtype`, once."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


def write_tensors(path: Path, entries: dict[str, Entry]) -> None:
    """Write `entries` in order, with the metadata that transformers expects of a PyTorch checkpoint."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in entries.items():
        size = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for entry in entries.values():
            tensor = entry.make().to(DTYPES[entry.dtype]).contiguous()
            assert tensor.shape == entry.shape, (tensor.shape, entry)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
