"""Which weights of a decoder get 8 bits and which 4: bytes are spent where fewer of them would cost most.

What 4 bits of a weight cost is measured: the float32 decoder runs on sample texts with the one weight replaced by what
its numbers stand for, and the distributions of the next token are compared with its own (Kullback-Leibler divergence in
nats). Small costs add up, so that the sum over the weights left in 4 bits predicts what all of them cost together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import yaml

from vlm_export.documents import check_document
from vlm_export.dtypes import DTYPES, PACKED_4, PACKED_8
from vlm_export.errors import InputError
from vlm_export.files import text_of
from vlm_export.quantize.calibration import Progress, Run, Solver, spread
from vlm_export.quantize.numbers import Quantized, Solution, unpacked
from vlm_export.quantize.probe import Probe
from vlm_export.quantize.variants import Source, Variant
from vlm_export.wanted import PLANNED, Goal

FILE = "quantization.yaml"  # in a repo
_OF_A_WEIGHT = 64  # bytes of a weight in a file beside its data and its name, at most
_OF_A_FILE = 32 << 10  # bytes of all else: what is declared, and small constants
_TEXTS = 3  # sample texts that a weight's cost is measured on
_FORMS = {4: PACKED_4, 8: PACKED_8}
_HEADER = """\
# The bits of each weight of a decoder. Edit `bits` (4 or 8) and replay it with `vlm-export onnx --plan FILE`.
# `cost` is what 4 bits of the weight add to the divergence of the next token, in nats; `bytes_saved` what they save.
"""


@dataclass(frozen=True)
class PlannedWeight:
    """A weight: its bits, what 4 of them cost in nats, and how many bytes they save beside 8."""

    bits: int
    cost: float = 0.0
    bytes_saved: int = 0


@dataclass(frozen=True)
class Plan:
    """The bits of a decoder's weights, by name in the graph.

    Attributes:
        bytes: of the decoder's file.
        kl: divergence of the next token on the sample texts, in nats, as it is predicted.
    """

    component: str
    bytes: int
    kl: float
    weights: dict[str, PlannedWeight] = field(default_factory=dict)
    schema: int = 1

    def variant(self, source: Source) -> Variant:
        """The decoder with these bits.

        Raises:
            InputError: a weight of the plan is none of the decoder's that 4 bits are for.
        """
        plain = Variant(source, DTYPES[PLANNED])
        known = {str(quantized.weight.name) for _, quantized in plain.to_solve()}
        if unknown := next((name for name in self.weights if name not in known), None):
            kept = "; table and head have 8 bits" if unknown in plain.forms else ""
            raise InputError(f"plan: weights: {source.name} has no matrix {unknown!r} for 4 bits{kept}: remove it")
        return replace(plain, chosen={name: _FORMS[weight.bits] for name, weight in self.weights.items()})


def choose(source: Source, solver: Solver, goal: Goal, progress: Progress = lambda what, done, total: None) -> Plan:
    """The plan for a decoder: 8 bits where those save most nats a byte, until the goal is reached.

    Raises:
        InputError: no plan reaches the goal; the error says what is the least.
    """
    plain = Variant(source, DTYPES[PLANNED])
    costs = dict(_costs(plain, solver, progress))
    saved = {str(quantized.weight.name): _saved(quantized) for _, quantized in plain.to_solve()}
    size = _size(plain)
    eight: set[str] = set()
    order = sorted(costs, key=lambda name: costs[name] / saved[name], reverse=True)
    for name in order:
        if goal.kl is not None and _rest(costs, eight) <= goal.kl:
            break
        if goal.bytes is None or size + saved[name] <= goal.bytes:
            eight.add(name)
            size += saved[name]
    if goal.bytes is not None and size > goal.bytes:
        raise InputError(f"--budget: {source.name} has {size / 1e6:.3g} MB even in 4 bits: allow that much")
    return Plan(
        component=source.name,
        bytes=size,
        kl=round(_rest(costs, eight), 6),
        weights={name: PlannedWeight(8 if name in eight else 4, round(costs[name], 6), saved[name]) for name in costs},
    )


def _rest(costs: Mapping[str, float], eight: set[str]) -> float:
    return sum(cost for name, cost in costs.items() if name not in eight)


def _costs(plain: Variant, solver: Solver, progress: Progress) -> Iterator[tuple[str, float]]:
    """What 4 bits of each weight cost, in nats a token."""
    solutions = solver.solutions(plain)
    texts = spread([run for run in solver.samples[plain.source.name] if run.is_text], _TEXTS)
    probe = Probe(plain.source.model)
    expected = [_log_probabilities(probe, run) for run in texts]
    weights = [quantized for _, quantized in plain.to_solve()]
    for done, quantized in enumerate(weights):
        name = str(quantized.weight.name)
        progress("what 4 bits cost", done, len(weights))
        replaced = {name: _as_floats(quantized, solutions[name])}
        found = [_log_probabilities(probe, run, replaced) for run in texts]
        yield name, float(np.mean([_divergence(own, other) for own, other in zip(expected, found, strict=True)]))


def _log_probabilities(probe: Probe, run: Run, weights: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
    """`[positions, vocabulary] float32`, of the next token after each position of a text."""
    [logits] = probe.run(run.feeds, ["logits"], weights)
    shifted = logits[0] - logits[0].max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """Of the found distributions from those that are expected, in nats: the mean over all positions."""
    return float((np.exp(expected) * (expected - found)).sum(axis=-1).mean())


def _as_floats(quantized: Quantized, solution: Solution) -> np.ndarray:
    """The weight `[inputs, outputs]` that its numbers stand for."""
    of_blocks = solution.scales, solution.zero_points
    by_input = [np.repeat(each, quantized.share, axis=1)[:, : quantized.inputs] for each in of_blocks]
    return np.ascontiguousarray(unpacked(solution.numbers, *by_input).T)


def _saved(quantized: Quantized) -> int:
    """Bytes by which 4 bits of a weight are fewer than 8; the zero points come on top of the 4."""
    numbers = quantized.outputs * quantized.blocks * quantized.share // 2
    return numbers - quantized.outputs * -(-quantized.blocks // 2)


def _size(variant: Variant) -> int:
    """Bytes of a variant's file."""
    model = variant.make()
    tensors = [value.const_value for value in model.graph.initializers.values()]
    weights = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, ir.LazyTensor))
    names = sum(len(str(tensor.name)) + _OF_A_WEIGHT for tensor in tensors if isinstance(tensor, ir.LazyTensor))
    nodes = sum(ir.to_proto(node).ByteSize() for node in model.graph)
    return weights + names + nodes + _OF_A_FILE


def save(plan: Plan, path: Path) -> None:
    """Write a plan as YAML that a user can edit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_HEADER + yaml.safe_dump(asdict(plan), sort_keys=False, width=1000), encoding="utf-8")


def load(path: Path) -> Plan:
    """Read a plan.

    Raises:
        InputError: it is not there, or is no plan.
    """
    try:
        values = yaml.safe_load(text_of(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a plan: {' '.join(str(error).split())}") from error
    plan = check_document(values, Plan, str(path), "make one with `vlm-export onnx --quantize auto`")
    wrong = next((name for name, weight in plan.weights.items() if weight.bits not in _FORMS), None)
    if wrong is not None:
        raise InputError(f"{path}: weights.{wrong}.bits: {plan.weights[wrong].bits}: give 4 or 8")
    return plan
