"""Checkpoints that GPTQ or AWQ has quantized: integers, several in a 32-bit word, a scale and a zero for each group.

A linear layer `x` of such a file has `x.qweight`, `x.qzeros`, `x.scales` and, from GPTQ, `x.g_idx`, the group of every
input. A value is (integer - zero) · scale, in the scales' dtype; what is read here is what GPTQModel computes with, bit
for bit (it reads these files on a CPU too, but asks for a newer torch than ours and builds extensions of its own).
- GPTQ packs along the inputs, its zeros along the outputs. Of its two formats, `gptq` stores zeros less one, taken from
  whole words (a zero of 0 borrows from its neighbour), and `gptq_v2` as they are.
- AWQ packs integers and zeros along the outputs, each eight of them in an order of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vlm_export.errors import InputError
from vlm_export.tensors.stored import TensorRef

PARTS = ("qweight", "qzeros", "scales", "g_idx")
_WORD_BITS = 32
_BITS = {"gptq": (2, 4, 8), "awq": (4,)}
_FORMATS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the first, second, … of eight outputs lies in its word
_SCALES_DTYPES = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Settings:
    """What `quantization_config` says of all packed layers; `group_size` is -1 for one group of all inputs."""

    method: str
    bits: int
    group_size: int
    layout: str
    symmetric: bool

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str) -> Settings:
        """Read `quantization_config`; `source` is the file and key that it came from.

        Raises:
            InputError: a format or a number of bits that cannot be read, or no group size.
        """
        method = values["quant_method"]
        if method == "gptq":
            layout = str(values.get("checkpoint_format") or values.get("format") or "gptq")
        else:
            layout = str(values.get("version") or values.get("checkpoint_format") or "gemm")
        bits = values.get("bits", values.get("w_bit"))
        group_size = values.get("group_size", values.get("q_group_size"))
        if layout.lower() not in _FORMATS[method]:
            known = " and ".join(_FORMATS[method])
            raise InputError(f"{source}: {method} weights of the format {layout!r} cannot be read, only {known}")
        if bits not in _BITS[method]:
            known = ", ".join(map(str, _BITS[method]))
            raise InputError(f"{source}.bits: {method} weights of {bits!r} bits cannot be read, only of {known}")
        if not isinstance(group_size, int):
            raise InputError(f"{source}.group_size: {group_size!r} is no number")
        return cls(method, bits, group_size, layout.lower(), bool(values.get("sym", False)))


@dataclass(frozen=True)
class Packed(TensorRef):
    """A weight `[outputs, inputs]`, or the other way round where `transposed` (transformers' Conv1D)."""

    parts: Mapping[str, TensorRef]
    settings: Settings
    transposed: bool

    def load(self, rows: slice | None = None) -> torch.Tensor:
        """The weight's values, or some of its rows, in the scales' dtype; all of it is unpacked in either case."""
        groups, scales = self._groups(), self.parts["scales"].load()
        codes, zeros = self._unpacked()
        values = scales[groups] * (codes - zeros[:, : scales.shape[1]][groups])
        whole = values if self.transposed else values.T
        return (whole if rows is None else whole[rows]).contiguous()

    def _groups(self) -> torch.Tensor:
        """The group of every input."""
        if "g_idx" in self.parts:
            return self.parts["g_idx"].load().long()
        inputs = self.shape[0] if self.transposed else self.shape[1]
        size = self.settings.group_size if self.settings.group_size > 0 else inputs
        return torch.arange(inputs) // size

    def _unpacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Integers `[inputs, outputs]` and zeros `[groups, outputs]`, int16."""
        words, zeros, bits = self.parts["qweight"].load(), self.parts["qzeros"].load(), self.settings.bits
        if self.settings.method == "awq":
            return _reordered(_columns(words, bits)), _reordered(_columns(zeros, bits))
        if self.settings.layout == "gptq":
            zeros = zeros + sum(1 << shift for shift in range(0, _WORD_BITS, bits))
        return _columns(words.T, bits).T, _columns(zeros, bits)

    def rounded(self, value: torch.Tensor) -> torch.Tensor:
        """The nearest integers on the grid that GPTQ gives each group: what is left without a calibration."""
        by_input = (value if self.transposed else value.T).clone()
        groups, largest = self._groups(), 2**self.settings.bits - 1
        for group in groups.unique():
            part = by_input[groups == group]
            low, high = part.amin(0).clamp_max(0), part.amax(0).clamp_min(0)
            if self.settings.symmetric:
                high = torch.maximum(high, -low)
                low = torch.where(low < 0, -high, low)
            scale = ((high - low) / largest).clamp_min(torch.finfo().tiny)
            zero = torch.full_like(scale, (largest + 1) / 2) if self.settings.symmetric else (-low / scale).round()
            by_input[groups == group] = ((part / scale + zero).round().clamp(0, largest) - zero) * scale
        return by_input if self.transposed else by_input.T


def _columns(words: torch.Tensor, bits: int) -> torch.Tensor:
    """`[rows, words] int32` → `[rows, words · 32/bits] int16`, the lowest bits of a word first."""
    shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32)
    integers = (words[:, :, None] >> shifts) & ((1 << bits) - 1)
    return integers.to(torch.int16).reshape(len(words), -1)


def _reordered(integers: torch.Tensor) -> torch.Tensor:
    return integers.reshape(len(integers), -1, len(_AWQ_ORDER))[:, :, _AWQ_ORDER].reshape(integers.shape)


def packed_weights(
    tensors: Mapping[str, TensorRef], settings: Settings, transposed: Iterable[str], source: str
) -> dict[str, TensorRef]:
    """The tensors of a checkpoint with one weight in the place of the parts of a packed one.

    `transposed` are the modules whose weight is `[inputs, outputs]`.

    Raises:
        InputError: a part is missing, or the parts do not fit together.
    """
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    beside = {f"{module}.{part}" for module in modules for part in PARTS}
    plain = {name: ref for name, ref in tensors.items() if name not in beside}
    turned = set(transposed)
    packed = {f"{module}.weight": _weight(module, tensors, settings, module in turned, source) for module in modules}
    return plain | packed


def _weight(module: str, tensors: Mapping[str, TensorRef], settings: Settings, transposed: bool, source: str) -> Packed:
    parts = {part: tensors[f"{module}.{part}"] for part in PARTS if f"{module}.{part}" in tensors}
    missing = [part for part in PARTS[:3] if part not in parts]
    if missing:
        raise InputError(f"{parts['qweight']}: {module}.{missing[0]} is not beside it; the checkpoint is incomplete")
    words, zeros, scales = (parts[part] for part in PARTS[:3])
    outputs, per_word = scales.shape[1], _WORD_BITS // settings.bits
    inputs = parts["g_idx"].shape[0] if "g_idx" in parts else words.shape[0] * per_word
    shapes = (-(-inputs // per_word), outputs), (scales.shape[0], -(-outputs // per_word))
    if settings.method == "awq":
        inputs = words.shape[0]
        shapes = (inputs, shapes[1][1]), shapes[1]
    if (words.shape, zeros.shape) != shapes or words.dtype != "I32" or scales.dtype not in _SCALES_DTYPES:
        raise InputError(f"{words}: not integers of {settings.bits} bits in 32-bit words, as {source} says")
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    return Packed(words.file, words.key, scales.dtype, shape, parts, settings, transposed)
