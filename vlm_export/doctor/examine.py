"""Run every rule on a repo."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vlm_export.doctor import rules
from vlm_export.doctor.findings import Finding, Severity
from vlm_export.doctor.repo_view import RepoView


@dataclass(frozen=True)
class Rule:
    """A module of `rules/`: its name, which the report shows, and its function."""

    name: str
    check: Callable[[RepoView], Iterable[Finding]]


@dataclass(frozen=True)
class Examination:
    """What all rules found in a repo that has so many readable graphs, errors first."""

    rules: tuple[str, ...]
    graphs: int
    found: tuple[tuple[str, Finding], ...]

    def count(self, severity: Severity) -> int:
        """How many findings are of that severity."""
        return Counter(finding.severity for _, finding in self.found)[severity]

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {
            "errors": self.count(Severity.ERROR),
            "warnings": self.count(Severity.WARNING),
            "graphs": self.graphs,
            "rules": list(self.rules),
            "findings": [
                {
                    "severity": finding.severity.value,
                    "rule": rule,
                    "file": finding.file,
                    "problem": finding.problem,
                    "fix": finding.fix,
                }
                for rule, finding in self.found
            ],
        }


def find_rules() -> list[Rule]:
    """Every rule there is, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(rules.__path__))
    return [Rule(name.replace("_", "-"), importlib.import_module(f"{rules.__name__}.{name}").check) for name in names]


def examine(repo: RepoView) -> Examination:
    """Run every rule. Findings are sorted by severity, then by file; each is told once."""
    all_rules = find_rules()
    found = dict.fromkeys((rule.name, finding) for rule in all_rules for finding in rule.check(repo))
    ranks = list(Severity)
    ordered = sorted(found, key=lambda pair: (ranks.index(pair[1].severity), pair[1].file, pair[0]))
    return Examination(tuple(rule.name for rule in all_rules), len(repo.graphs), tuple(ordered))
