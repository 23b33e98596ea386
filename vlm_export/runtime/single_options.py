"""The numbers that the graph of layout single takes at a run, of a plan."""

from __future__ import annotations

import secrets

from vlm_export.contract import EARLY_STOPPING, MOST_SEED, SAMPLING_OPTIONS, SEARCH_OPTIONS, SINGLE_OPTIONS
from vlm_export.runtime.options import Options, Plan, plan, searches
from vlm_export.runtime.repo import Repo


def as_options(decided: Plan, *, searches: bool) -> list[float]:
    """A plan as the numbers of `SINGLE_OPTIONS`, and behind them of `SEARCH_OPTIONS` or `SAMPLING_OPTIONS`.

    Where tokens are drawn without a seed, there is one by chance.
    """
    values = {name: getattr(decided, name) for name in (*SINGLE_OPTIONS, *SEARCH_OPTIONS, *SAMPLING_OPTIONS)}
    values["early_stopping"] = EARLY_STOPPING.index(decided.early_stopping)
    values["temperature"] = decided.temperature if decided.do_sample else 0.0
    values["seed"] = secrets.randbelow(MOST_SEED + 1) if decided.seed is None else decided.seed
    names = (*SINGLE_OPTIONS, *(SEARCH_OPTIONS if searches else SAMPLING_OPTIONS))
    return [float(values[name]) for name in names]


def greedily(repo: Repo) -> list[float]:
    """The options with which the graph of a repo is greedy, whatever its own are."""
    if not searches(repo.generation):
        return []
    return as_options(plan(Options(num_beams=1), repo.generation, begun(repo)), searches=True)


def begun(repo: Repo) -> int:
    """How many ids a text begins with: a prefix has none."""
    return 0 if repo.has_prefix else 1
