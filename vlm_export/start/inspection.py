"""`vlm-export inspect`: what a checkpoint, an adapter or an exported repo is, without reading its weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_export.contract import LayoutName
from vlm_export.dtypes import DTYPES
from vlm_export.errors import InputError
from vlm_export.families._known import layouts_of
from vlm_export.machine import available_memory, free_disk
from vlm_export.merging.adapter_kinds import refusal
from vlm_export.quantize.estimate import Estimate
from vlm_export.start import lora, sizes
from vlm_export.start.exported import Exported, exported
from vlm_export.start.headers import read_headers
from vlm_export.start.lora import Lora
from vlm_export.start.named import ADAPTER_CONFIG, CONFIG, Named, find
from vlm_export.start.parts import Part, Placed, has_tied_head, parts_of, place
from vlm_export.tensors.other_folders import no_model
from vlm_export.tensors.weight_files import ADAPTER_WEIGHTS
from vlm_export.wanted import Wanted, parse

_WEIGHTS = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
_QUANTIZATION = "quantization_config"


@dataclass(frozen=True)
class Machine:
    """What this machine can give: bytes of memory to this process, and of disk to the current folder."""

    memory_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be exported.

    Attributes:
        tensors: what is stored, by part.
        tied: whether the token table is the head too.
        layouts: those that it can be published in, the usual one first.
        quantized: how its weights are quantized; None where they are plain.
    """

    named: Named
    model_type: str
    tensors: tuple[Placed, ...]
    tied: bool
    layouts: tuple[LayoutName, ...]
    quantized: str | None

    @property
    def parts(self) -> list[Part]:
        """Its parts."""
        return parts_of(self.tensors)

    @property
    def parameters(self) -> int:
        """Of the model, without LoRA and what is not used."""
        return sum(part.parameters for part in self.parts if part.name not in ("LoRA", "not used"))

    @property
    def lora(self) -> Lora | None:
        """The LoRA inside it."""
        return lora.inside(self.named.config, self.tensors)

    @property
    def merged_bytes(self) -> int:
        """Of the plain checkpoint that `merge` writes of it."""
        return sum(part.size_bytes for part in self.parts if part.name not in ("LoRA", "not used"))

    def expected(self, layout: LayoutName, wanted: Wanted) -> Estimate | None:
        """What an export takes; None where shapes do not tell, since weights are packed.

        Raises:
            InputError: a component that is wanted is none of the layout's.
        """
        if self.quantized:
            return None
        apart = self.layouts[0] if layout == "single" else layout  # its graphs are those of the usual one
        return sizes.expected(self.tensors, apart, wanted, tied=self.tied)


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter; `refused` says why it cannot be merged, and is None where it can."""

    named: Named
    lora: Lora
    base_model: str | None
    refused: str | None


@dataclass(frozen=True)
class Repo:
    """An exported repo."""

    named: Named
    graphs: Exported


Inspected = Checkpoint | Adapter | Repo


def inspect(reference: str, notify: Callable[[str], None] = lambda line: None) -> Inspected:
    """What a user's folder or Hub repo is; `notify` hears what is fetched.

    Raises:
        InputError: there is no such folder or repo, it is none of the three, or its files cannot be read.
    """
    named = find(reference, notify)
    if (named.path / ADAPTER_CONFIG).exists() and ADAPTER_CONFIG in named.sizes_bytes and not _has_weights(named):
        return open_adapter(named)
    graphs = exported(named)
    if graphs is not None and not _has_weights(named):
        return Repo(named, graphs)
    return open_checkpoint(named)


def _has_weights(named: Named) -> bool:
    """Whether a model's weights are there, which may lie beside graphs or an adapter."""
    return any(_WEIGHTS.fullmatch(name) for name in named.sizes_bytes)


def open_checkpoint(named: Named) -> Checkpoint:
    """A model's folder or repo as a checkpoint.

    Raises:
        InputError: it is none, or of no family that is supported.
    """
    if CONFIG not in named.sizes_bytes:
        instead = no_model(named.path) if named.is_local else ""
        nothing = f"{named.reference}: no {CONFIG}, {ADAPTER_CONFIG} or onnx/: "
        raise InputError(instead or f"{nothing}neither a model, an adapter nor an exported repo")
    model_type = named.config.get("model_type")
    layouts = layouts_of(model_type, str(named.path / CONFIG), has_code="auto_map" in named.config)
    tensors = place(read_headers(named), named.config)
    tied = has_tied_head(named.config, tensors)
    return Checkpoint(named, str(model_type), tensors, tied, layouts, _quantization(named.config))


def open_adapter(named: Named) -> Adapter:
    """A PEFT folder or repo as an adapter.

    Raises:
        InputError: its settings or weights cannot be read.
    """
    settings = named.json(ADAPTER_CONFIG)
    base = settings.get("base_model_name_or_path")
    headers = read_headers(named, ADAPTER_WEIGHTS)
    return Adapter(named, lora.of_adapter(settings, headers), str(base) if base else None, refusal(settings))


def _quantization(config: Mapping[str, Any]) -> str | None:
    settings = config.get(_QUANTIZATION)
    return str(settings.get("quant_method", "an unknown method")) if isinstance(settings, Mapping) else None


def this_machine() -> Machine:
    """What there is on this machine, and on the disk of the current folder."""
    return Machine(available_memory(), free_disk(Path()))


def sizes_of(checkpoint: Checkpoint) -> dict[LayoutName, dict[str, int]]:
    """By layout and dtype, the bytes of all files; empty where shapes do not tell."""
    found: dict[LayoutName, dict[str, int]] = {}
    for layout in checkpoint.layouts:
        estimate = checkpoint.expected(layout, parse(DTYPES, "dtypes"))
        for file in estimate.files if estimate else ():
            of_layout = found.setdefault(layout, {})
            of_layout[file.dtype] = of_layout.get(file.dtype, 0) + file.size_bytes
    return found
