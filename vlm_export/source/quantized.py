"""Quantized checkpoints: the values that a model computes with, and what rounding to them takes.

GPTQ's and AWQ's are read in `packed.py`. A file of bitsandbytes describes itself: 4-bit weights come with the 16 values
that a code stands for and a scale for every block, 8-bit ones with a scale for every row. Reading them back takes a few
operations of torch, one tensor at a time; the results are bitsandbytes' own, bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from vlm_export.errors import InputError
from vlm_export.source.checkpoint import Checkpoint, build_empty
from vlm_export.source.packed import Settings, packed_weights
from vlm_export.tensors.safetensors_writer import DTYPES
from vlm_export.tensors.stored import TensorRef

_SETTINGS = "quantization_config"
_STATE = ".quant_state.bitsandbytes__"
_OF_FOUR_BIT = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_DTYPE_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_INT8_MAX = 127


@dataclass(frozen=True)
class FourBit(TensorRef):
    """A weight in blocks of 4-bit codes: the value of a code times the scale of its block, in the model's dtype.

    `parts` are the tensors beside it by the end of their names, `state` what bitsandbytes says of them.
    """

    parts: Mapping[str, TensorRef]
    state: Mapping[str, Any]

    def load(self, rows: slice | None = None) -> torch.Tensor:
        """The weight's values, or some of its rows, in the model's dtype; all of it is read in either case."""
        packed = super().load().reshape(-1)
        codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: math.prod(self.shape)]
        values = self.parts[".quant_map"].load()[codes.int()]
        whole = self._blocks(values, self._scales()).reshape(self.shape).to(DTYPES[self.dtype])
        return whole if rows is None else whole[rows]

    def _scales(self) -> torch.Tensor:
        scales = self.parts[".absmax"].load()
        if "nested_blocksize" not in self.state:
            return scales
        of_scales = self.parts[".nested_absmax"].load().repeat_interleave(self.state["nested_blocksize"])
        values = self.parts[".nested_quant_map"].load()[scales.int()]
        return values * of_scales[: len(scales)] + self.state["nested_offset"]

    def _blocks(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        size = self.state["blocksize"]
        padded = F.pad(values, (0, -len(values) % size)).reshape(-1, size) * scales[:, None]
        return padded.reshape(-1)[: len(values)]

    def rounded(self, value: torch.Tensor) -> torch.Tensor:
        """The nearest codes under scales made anew, the largest magnitude of each block; scales are not rounded."""
        size = self.state["blocksize"]
        flat = value.reshape(-1)
        blocks = F.pad(flat, (0, -len(flat) % size)).reshape(-1, size)
        scales = blocks.abs().amax(1)
        values = self.parts[".quant_map"].load().sort().values
        nearest = torch.bucketize(
            blocks / scales.clamp_min(torch.finfo().tiny)[:, None], (values[1:] + values[:-1]) / 2
        )
        return self._blocks(values[nearest].reshape(-1)[: len(flat)], scales).reshape(value.shape)


@dataclass(frozen=True)
class EightBit(TensorRef):
    """A weight in 8 bits, a scale for every row."""

    scales: TensorRef

    def load(self, rows: slice | None = None) -> torch.Tensor:
        """The weight's values `[outputs, inputs] float32`, or some of its rows."""
        return super().load(rows) * self.scales.load(rows)[:, None] * (1 / _INT8_MAX)

    def rounded(self, value: torch.Tensor) -> torch.Tensor:
        """The nearest integers under scales made anew, the largest magnitude of each row over 127."""
        scales = value.abs().amax(1, keepdim=True).clamp_min(torch.finfo().tiny) / _INT8_MAX
        return (value / scales).round() * scales


def base_weights(checkpoint: Checkpoint, *, dequantized: bool) -> Checkpoint:
    """A checkpoint with plain weights: itself, or one that reads quantized weights as what they stand for.

    Raises:
        InputError: it is quantized, and nobody asked for such a base, or it cannot be read back.
    """
    settings = _find(checkpoint.config)
    if settings is None:
        return checkpoint
    source = f"{checkpoint.path / 'config.json'}: {_SETTINGS}"
    original = "set `model` in the recipe to the 16-bit model that they were made from"
    method = settings.get("quant_method")
    if method not in ("bitsandbytes", "gptq", "awq"):
        raise InputError(f"{source}: weights quantized with {method} cannot be merged into; {original}")
    if not dequantized:
        raise InputError(f"{source}: the weights are quantized; {original}, or `base: dequantized` to merge into these")
    plain = replace(checkpoint, config=_without_settings(checkpoint.config))
    if method == "bitsandbytes":
        tensors = {name: ref for name, ref in checkpoint.tensors.items() if not _is_beside(name, checkpoint.tensors)}
        return replace(
            plain, tensors={name: _read_back(name, ref, checkpoint.tensors) for name, ref in tensors.items()}
        )
    transposed = (name for name, module in build_empty(plain).named_modules() if isinstance(module, Conv1D))
    return replace(plain, tensors=packed_weights(checkpoint.tensors, Settings.of(settings, source), transposed, source))


def _find(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if isinstance(config.get(_SETTINGS), Mapping):
        return config[_SETTINGS]
    nested = (_find(value) for value in config.values() if isinstance(value, Mapping))
    return next((found for found in nested if found is not None), None)


def _without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_settings(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != _SETTINGS
    }


def _is_beside(name: str, tensors: Mapping[str, TensorRef]) -> bool:
    """Whether a tensor only says how to read another one."""
    weight = next((name.removesuffix(end) for end in _OF_FOUR_BIT if name.endswith(end)), name.partition(_STATE)[0])
    if weight != name:
        return weight in tensors
    module, _, last = name.rpartition(".")
    return last in ("SCB", "weight_format") and f"{module}.weight" in tensors


def _read_back(name: str, ref: TensorRef, tensors: Mapping[str, TensorRef]) -> TensorRef:
    states = [other for key, other in tensors.items() if key.startswith(f"{name}{_STATE}")]
    if states:
        state = json.loads(bytes(states[0].load().tolist()))
        parts = {end: tensors[f"{name}{end}"] for end in _OF_FOUR_BIT if f"{name}{end}" in tensors}
        return FourBit(ref.file, ref.key, _DTYPE_NAMES[state["dtype"]], tuple(state["shape"]), parts, state)
    scales = tensors.get(f"{name.removesuffix('weight')}SCB")
    return ref if scales is None else EightBit(ref.file, ref.key, "F32", ref.shape, scales)
