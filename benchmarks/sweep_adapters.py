"""A base without its LoRA, and as many adapters as wanted: the checkpoint's own LoRA, each perturbed in its own way.

python benchmarks/sweep_adapters.py CHECKPOINT FOLDER COUNT     writes FOLDER/base and FOLDER/adapters/NN
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vlm_export.files import read_json

_PERTURBED = 0.02  # of a matrix's own spread: an adapter of the same task, trained again
_PREFIX = "language_model.base_model.model."


def write_base(checkpoint: Path, folder: Path) -> None:
    """The checkpoint without LoRA, in `folder`."""
    folder.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    config = {key: value for key, value in read_json(checkpoint / "config.json").items() if not key.startswith("lora_")}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = load_file(checkpoint / "model.safetensors")
    plain = {
        name.replace(_PREFIX, "language_model.").replace(".base_layer", ""): tensor
        for name, tensor in tensors.items()
        if ".lora_" not in name
    }
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})


def write_adapter(checkpoint: Path, folder: Path, seed: int) -> None:
    """The checkpoint's LoRA as a PEFT folder, its matrices moved a little."""
    folder.mkdir(parents=True)
    config = read_json(checkpoint / "config.json")
    generator = torch.Generator().manual_seed(seed)
    tensors, targets = {}, set()
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        if ".lora_" in name:
            moved = torch.randn(tensor.shape, generator=generator) * tensor.std() * _PERTURBED
            key = name.replace(_PREFIX, "base_model.model.").replace(".default.weight", ".weight")
            tensors[key] = (tensor + moved).contiguous()
            targets.add(name.split(".lora_")[0].rpartition(".")[2])
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "r": config["lora_r"],
        "lora_alpha": config["lora_alpha"],
        "target_modules": sorted(targets),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))


def main(checkpoint: Path, folder: Path, count: int) -> None:
    write_base(checkpoint, folder / "base")
    for number in range(count):
        write_adapter(checkpoint, folder / "adapters" / f"{number:02}", number)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
