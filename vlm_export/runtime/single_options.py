"""The numbers that the graph of layout single takes at a run, of a plan."""

from __future__ import annotations

from vlm_export.contract import EARLY_STOPPING, SEARCH_OPTIONS, SINGLE_OPTIONS
from vlm_export.runtime.options import Options, Plan, plan, searches
from vlm_export.runtime.repo import Repo


def as_options(decided: Plan, *, searches: bool) -> list[float]:
    """A plan as the numbers of `SINGLE_OPTIONS`, and behind them, where the graph searches, of `SEARCH_OPTIONS`."""
    made = [float(getattr(decided, name)) for name in SINGLE_OPTIONS]
    if not searches:
        return made
    early = float(EARLY_STOPPING.index(decided.early_stopping))
    return [*made, *(early if name == "early_stopping" else float(getattr(decided, name)) for name in SEARCH_OPTIONS)]


def greedily(repo: Repo) -> list[float]:
    """The options with which the graph of a repo is greedy, whatever its own are."""
    if not searches(repo.generation):
        return []
    return as_options(plan(Options(num_beams=1), repo.generation, begun(repo)), searches=True)


def begun(repo: Repo) -> int:
    """How many ids a text begins with: a prefix has none."""
    return 0 if repo.has_prefix else 1
