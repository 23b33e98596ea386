"""Put a captioner's decoder into another order, in which it computes the same and no block of weights is what it was.

python benchmarks/permutation.py MERGED FOLDER

The weights of recipes/real-captioner come from a file of 4 bits: blocks of 32 inputs, each on a grid of 16 values. A
quantizer with the same blocks that finds those grids again looks better than it is. Three things have no order in a
decoder of Llama's kind, and are shuffled here: the values of the residual stream, the neurons of each MLP, and the
values of each head of keys and values (with the columns of the output projection that read them, in all heads of a
group). After that, a block of 32 inputs holds weights of many blocks of the file.
"""

from __future__ import annotations

import shutil
import sys
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vlm_export.atomic import atomic_folder
from vlm_export.files import read_json
from vlm_export.tensors.safetensors_writer import Entry, write_tensors

WEIGHTS = "model.safetensors"
DECODER = "language_model."
_PROJECTION = "projection.projection."
_NOT_COPIED = {WEIGHTS, "merge.json"}
# What lies along each axis of a weight of the decoder; None keeps its order.
_AXES: dict[str, tuple[str | None, ...]] = {
    "embed_tokens": (None, "hidden"),
    "norm": ("hidden",),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "q_proj": (None, "hidden"),
    "k_proj": (None, "hidden"),
    "v_proj": ("values", "hidden"),
    "o_proj": ("hidden", "attended"),
    "gate_proj": ("neurons", "hidden"),
    "up_proj": ("neurons", "hidden"),
    "down_proj": ("hidden", "neurons"),
}


def permute(merged: Path, target: Path) -> None:
    """Write `target`, a checkpoint that computes what the merged one of a captioner does.

    Raises:
        KeyError: the decoder has a weight of another name than Llama's.
    """
    text = read_json(merged / "config.json")["text_config"]
    with safe_open(merged / WEIGHTS, framework="pt") as file, atomic_folder(target) as folder:
        names = list(file.keys())
        last = max(name.removesuffix(".weight") for name in names if name.startswith(_PROJECTION) and "weight" in name)
        for path in merged.iterdir():
            if path.name not in _NOT_COPIED:
                shutil.copy(path, folder)
        entries = {}
        for name in names:
            stored = file.get_slice(name)
            make = partial(_reordered, file, name, _axes(name, last), text)
            entries[name] = Entry(stored.get_dtype(), tuple(stored.get_shape()), make)
        write_tensors(folder / WEIGHTS, entries)


def _axes(name: str, last_projection: str) -> tuple[str | None, ...]:
    """What lies along the first axes of a tensor, as far as it has another order."""
    if name.startswith(DECODER):
        return _AXES[name.split(".")[-2]]
    return ("hidden",) if name.rpartition(".")[0] == last_projection else ()


def _reordered(file: Any, name: str, axes: tuple[str | None, ...], text: Mapping[str, Any]) -> torch.Tensor:
    tensor = file.get_tensor(name)
    place = name.rpartition(".")[0].rpartition(".")[0].rpartition(".")[0]  # the layer
    for dim, axis in enumerate(axes):
        if axis is not None:
            tensor = tensor.index_select(dim, order(axis, place, text))
    return tensor


def order(axis: str, layer: str, text: Mapping[str, Any]) -> torch.Tensor:
    """Which old place comes to each new one, `int64`: of `hidden`, or of a layer's `neurons`, `values`, `attended`.

    `text` is the decoder's config. The order is always the same.
    """
    if axis == "hidden":
        return _shuffled(text["hidden_size"], axis)
    if axis == "neurons":
        return _shuffled(text["intermediate_size"], f"{layer} {axis}")
    groups, size = text["num_key_value_heads"], text["head_dim"]
    heads_each = 1 if axis == "values" else text["num_attention_heads"] // groups
    in_groups = (_shuffled(size, f"{layer} {group}") for group in range(groups))
    in_heads = (one for one in in_groups for _ in range(heads_each))
    return torch.cat([head * size + one for head, one in enumerate(in_heads)])


def _shuffled(count: int, name: str) -> torch.Tensor:
    """Seeded by the name."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


if __name__ == "__main__":
    permute(Path(sys.argv[1]), Path(sys.argv[2]))
