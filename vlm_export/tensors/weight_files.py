"""Which files of a folder hold weights. Nothing in them is read here."""

from __future__ import annotations

from pathlib import Path

from vlm_export.errors import InputError
from vlm_export.files import read_json
from vlm_export.own_files import own_file
from vlm_export.tensors import other_folders

WEIGHTS = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLES = {WEIGHTS: "pytorch_model.bin", ADAPTER_WEIGHTS: "adapter_model.bin"}


def folder_of(path: Path) -> Path:
    """Where a checkpoint's or adapter's settings lie: the folder itself, or that of its one file of weights."""
    return path.parent if path.is_file() else path


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
    """Whether a file of weights is a pickle, by its suffix."""
    return file.suffix in (".bin", ".pt", ".pth")


def _shard_names(index_file: Path) -> list[str]:
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index_file}: no weight_map of tensor names to file names")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name == "..":
            raise InputError(f"{index_file}: weight_map: {name!r} is outside the checkpoint's folder")
    return sorted(set(weight_map.values()))
