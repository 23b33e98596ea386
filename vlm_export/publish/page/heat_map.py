"""Errors by layer and run, a panel a dtype: how far each output of the graphs is from PyTorch's."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlm_export.verify import limits
from vlm_export.verify.report import Check, Report

LEVELS = 9  # shades: below 1e-8, then one for each power of ten
_CACHE = re.compile(r"present\.(\d+)\.(.+)")
_SHORT = ((re.compile(r"decode step (\d+)"), r"\1"), (re.compile(r"(\d+) tokens in one step"), r"\1×"))


@dataclass(frozen=True)
class Heat:
    """One output in one run: its worst error over all cases, as text, with a shade, 0 the lightest."""

    text: str
    shade: int
    title: str
    fails: bool


@dataclass(frozen=True)
class Grid:
    """A part of a panel: columns in groups of runs, and a row for each label; None where an output has no such run."""

    groups: Sequence[str]
    phases: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Heat | None]]]


@dataclass(frozen=True)
class Panel:
    """A dtype: the outputs that are no cache, and the cache by layer."""

    dtype: str
    worst: str
    outputs: Grid
    layers: Grid


def panels(report: Report) -> list[Panel]:
    """A panel for each dtype of which errors are known, in the order of the checks."""
    found: dict[str, dict[tuple[str, str], list[Check]]] = {}
    for check in report.checks:
        if check.output:
            found.setdefault(check.dtype, {}).setdefault((check.output, check.phase), []).append(check)
    return [_panel(dtype, checks) for dtype, checks in found.items()]


def _panel(dtype: str, checks: dict[tuple[str, str], list[Check]]) -> Panel:
    heats = {key: _heat(key, those) for key, those in checks.items()}
    phases = [*dict.fromkeys(phase for _, phase in heats if phase)]
    cached = {output: match for output, _ in heats if (match := _CACHE.fullmatch(output))}
    parts = [*dict.fromkeys(match[2] for match in cached.values())]
    layers = sorted({int(match[1]) for match in cached.values()})
    plain = [*dict.fromkeys(output for output, _ in heats if output not in cached)]
    every = [error for those in checks.values() for error in _errors(those)]
    return Panel(
        dtype=dtype,
        worst=_short_number(_worst(every)),
        outputs=Grid([""], [_short(phase) for phase in phases], [(name, _runs(heats, name, phases)) for name in plain]),
        layers=Grid(
            parts,
            [_short(phase) for phase in phases],
            [
                (str(layer), [heat for part in parts for heat in _runs(heats, f"present.{layer}.{part}", phases)])
                for layer in layers
            ],
        ),
    )


def _runs(heats: dict[tuple[str, str], Heat], output: str, phases: Sequence[str]) -> list[Heat | None]:
    """Of one output, each run; an encoder's one run comes first."""
    if (output, "") in heats:
        return [heats[output, ""], *(None for _ in phases[1:])]
    return [heats.get((output, phase)) for phase in phases]


def _heat(key: tuple[str, str], checks: Sequence[Check]) -> Heat:
    output, phase = key
    worst = _worst(_errors(checks))
    where = f"{output}, {phase}" if phase else output
    fails = any(check.verdict == "fail" for check in checks)
    return Heat(power_of_ten(worst), shade(worst), f"{where}: {_short_number(worst)}", fails)


def _errors(checks: Iterable[Check]) -> list[float]:
    return [check.value for check in checks if check.metric == limits.MAX_RELATIVE_ERROR]


def _worst(errors: Sequence[float]) -> float:
    """The largest; NaN is larger than any number."""
    return max(errors, key=lambda error: (math.isnan(error), error), default=math.nan)


def _short_number(error: float) -> str:
    return re.sub(r"e([+-])0", r"e\1", f"{error:.1e}").replace("e+0", "")


def power_of_ten(error: float) -> str:
    """The power of ten of an error: `−6` of 3e-6."""
    if not math.isfinite(error):
        return "NaN"
    return "0" if error == 0 else f"{math.floor(math.log10(error)):d}".replace("-", "−")


def shade(error: float) -> int:
    """How dark an error is shown, from 0 to `LEVELS` - 1."""
    if not math.isfinite(error):
        return LEVELS - 1
    return 0 if error == 0 else min(max(math.floor(math.log10(error)) + LEVELS, 0), LEVELS - 1)


def _short(phase: str) -> str:
    for pattern, short in _SHORT:
        phase = pattern.sub(short, phase)
    return "pre" if phase == "prefill" else phase
