"""What an export will take, before anything is written: the bytes of each file, disk, memory and time.

`costs.py` says what each variant comes to. Memory and time are rough: they were measured on SmolLM2-135M behind
DINOv2-small and on random weights of SmolLM2-1.7B's shape (x86-64, two cores).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_export.dtypes import FP32, Form
from vlm_export.errors import InputError

# Resident at the most, as the kernel counts it: 524 MiB once torch and transformers are there and graphs are found,
# 660 after the first trial run. A trial of other graphs than float32 unpacks the largest weight, twice in q8: 1131 MiB
# in fp16, 1126 in q4, 1454 in q8 where that weight has 384 MiB in float32.
_PROCESS_BYTES = 700 << 20
_LARGEST_TIMES = 2
# Calibration of SmolLM2-135M: float32 graphs of 599 MiB added 1006 MiB; then products of inputs, 384 MiB as computed;
# then solving for weights of 1536 inputs 94 MiB, which is five float64 matrices.
_FLOAT32_TIMES = 1.7
_SOLVE_BYTES = 40  # for each square of a weight's inputs
# Processor seconds of one core, of the same.
_SECONDS_A_WEIGHT = 30e-9  # written in any dtype
_SECONDS_A_FILE = 2.0  # its trial run
_SECONDS_A_SAMPLED_WEIGHT = 0.65e-6  # of eight images: once to record them, and once for each pass over the samples
_SECONDS_A_SOLVED_STEP = 0.5e-9  # inputs² · (inputs + outputs)
SQUARES_BYTES = 1 << 30  # of the inputs' products that calibration collects in one pass
_BESIDE_BYTES = 32_000_000  # tokenizer, settings and card


@dataclass(frozen=True)
class Solved:
    """A weight that numbers are solved for: its sizes, and the value that it multiplies."""

    component: str
    weight: str
    form: Form
    value: str
    inputs: int
    outputs: int
    blocks: int

    @property
    def scratch_bytes(self) -> int:
        """Of its numbers, scales and zero points, on disk until they are written."""
        return self.outputs * (self.inputs + 3 * self.blocks)


@dataclass(frozen=True)
class VariantCost:
    """What writing a variant takes: the bytes of its file, its weights and the largest of them, in numbers."""

    component: str
    dtype: str
    file: str
    size_bytes: int
    weights: int
    largest_weight: int
    solved: tuple[Solved, ...]


@dataclass(frozen=True)
class FileSize:
    """A file that will be written, its external data included."""

    component: str
    dtype: str
    file: str
    size_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What an export takes.

    Attributes:
        disk_bytes: of the files, of those beside the graphs, and of solved numbers until they are written.
        memory_bytes: resident at the most, if nothing is calibrated.
        calibration_memory_bytes: the same while weights are calibrated; 0 if none is.
        seconds: of one core.
    """

    files: tuple[FileSize, ...]
    disk_bytes: int
    memory_bytes: int
    calibration_memory_bytes: int
    seconds: float

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files)

    def __str__(self) -> str:
        memory = max(self.memory_bytes, self.calibration_memory_bytes)
        minutes = max(1, round(self.seconds / 60))
        return (
            f"writes {len(self.files)} file{'s' * (len(self.files) > 1)}, {_size(self.size_bytes)}; "
            f"needs {_size(memory)} of memory; about {minutes} minute{'s' * (minutes > 1)}"
        )


def estimate(costs: Sequence[VariantCost]) -> Estimate:
    """What an export of these variants takes."""
    solved = list(dict.fromkeys(each for one in costs for each in one.solved))
    files = tuple(FileSize(one.component, one.dtype, one.file, one.size_bytes) for one in costs)
    scratch = sum(each.scratch_bytes for each in solved)
    largest = max((one.largest_weight for one in costs), default=0)
    return Estimate(
        files,
        sum(file.size_bytes for file in files) + scratch + _BESIDE_BYTES,
        _PROCESS_BYTES + _LARGEST_TIMES * 4 * largest,
        _calibration_memory(costs, solved) if solved else 0,
        sum(_SECONDS_A_FILE + _SECONDS_A_WEIGHT * one.weights for one in costs) + _calibration_seconds(solved),
    )


def _calibration_memory(costs: Sequence[VariantCost], solved: Sequence[Solved]) -> int:
    graphs = sum(one.size_bytes for one in costs if one.dtype == FP32.name)
    squares = [4 * inputs**2 for inputs in _widths(solved).values()]
    together = max(min(sum(squares), SQUARES_BYTES), max(squares))
    widest = max(each.inputs for each in solved)
    return int(_PROCESS_BYTES + _FLOAT32_TIMES * graphs + together + _SOLVE_BYTES * widest**2)


def _calibration_seconds(solved: Sequence[Solved]) -> float:
    """Samples are recorded once; weights of as many bits are solved for after a pass over them, or after several."""
    passes = 0
    for bits in {each.form.bits for each in solved}:
        squares = (4 * inputs**2 for inputs in _widths([each for each in solved if each.form.bits == bits]).values())
        passes += math.ceil(sum(squares) / SQUARES_BYTES)
    weights = sum({(each.component, each.weight): each.inputs * each.outputs for each in solved}.values())
    steps = sum(each.inputs**2 * (each.inputs + each.outputs) for each in solved)
    return _SECONDS_A_SAMPLED_WEIGHT * weights * (passes + 1) + _SECONDS_A_SOLVED_STEP * steps


def _widths(solved: Sequence[Solved]) -> dict[tuple[str, str], int]:
    """Inputs of each value that weights multiply, by component and name."""
    return {(each.component, each.value): each.inputs for each in solved}


def check_disk(costs: Sequence[VariantCost], free_bytes: int, folder: Path) -> None:
    """Refuse an export that the disk cannot hold.

    Raises:
        InputError: it is larger than what is free; the error names the dtypes to leave out.
    """
    needed = estimate(costs).disk_bytes
    if needed <= free_bytes:
        return
    kept, left_out = list(costs), []
    by_dtype: dict[str, int] = {}
    for one in costs:
        by_dtype[one.dtype] = by_dtype.get(one.dtype, 0) + one.size_bytes
    for dtype in sorted(by_dtype.keys() - {FP32.name}, key=lambda name: (-by_dtype[name], name)):
        kept = [one for one in kept if one.dtype != dtype]
        left_out.append(dtype)
        if estimate(kept).disk_bytes <= free_bytes:
            remedy = f"leave out {', '.join(left_out)}, or free some"
            break
    else:
        remedy = f"{FP32.name} alone needs {_size(estimate(kept).disk_bytes)}: free some, or choose another --work"
    raise InputError(f"{folder}: needs {_size(needed)} of disk, and {_size(free_bytes)} are free: {remedy}")


def measuring_memory(costs: Sequence[VariantCost]) -> int:
    """Bytes that it takes to run the float32 graphs, to see how large their numbers become."""
    return int(_PROCESS_BYTES + _FLOAT32_TIMES * sum(one.size_bytes for one in costs if one.dtype == FP32.name))


def why_unmeasured(dtypes: Sequence[str], needed_bytes: int, available_bytes: int) -> str:
    """One line for the user on the dtypes whose numbers may pass what float16 holds, unseen."""
    reason = f"it needs {_size(needed_bytes)} of memory, and there is {_size(available_bytes)}"
    return f"{', '.join(dtypes)}: nothing is known of numbers that float16 cannot hold: {reason}; `verify` finds them"


def check_memory(expected: Estimate, available_bytes: int) -> None:
    """Refuse an export that memory cannot hold, calibrated or not.

    Raises:
        InputError: it needs more than there is.
    """
    if expected.memory_bytes > available_bytes:
        needed, free = _size(expected.memory_bytes), _size(available_bytes)
        raise InputError(f"needs {needed} of memory, and there is {free}: close other programs, or raise --memory")


def without_calibration(costs: Sequence[VariantCost]) -> list[VariantCost]:
    """The same where all numbers are the nearest."""
    return [replace(one, solved=()) for one in costs]


def why_rounded(costs: Sequence[VariantCost], available_bytes: int) -> str:
    """One line for the user on the dtypes that cannot be calibrated."""
    dtypes = ", ".join(dict.fromkeys(one.dtype for one in costs if one.solved))
    reason = too_little_to_calibrate(estimate(costs), available_bytes)
    return f"{dtypes}: weights are rounded to the nearest, not calibrated on images: {reason}"


def too_little_to_calibrate(expected: Estimate, available_bytes: int) -> str:
    """How much memory calibration needs, and how much there is."""
    needed, there = _size(expected.calibration_memory_bytes), _size(available_bytes)
    return f"calibration needs {needed} of memory, and there is {there}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
