"""`make audit`: what is known, what is not, and never a pass of what nobody was asked about."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "audit.py"


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # where dataclasses look their module up
        patch.setitem(__import__("sys").modules, "audit", module)
        spec.loader.exec_module(module)
    return module


BUG = {"id": "PYSEC-1", "fix_versions": ["2.0"], "aliases": [], "description": "…"}
FINE = {"name": "a", "version": "1.0", "vulns": []}


@pytest.mark.parametrize(
    ("packages", "said", "status"),
    [
        ([FINE], "f: nothing known of 1 packages", 0),
        ([FINE, FINE | {"vulns": [BUG]}], "f: a 1.0: PYSEC-1: mended in 2.0", 1),
        ([FINE | {"vulns": [BUG | {"fix_versions": []}]}], "mended in no version yet", 1),
        ([FINE, {"name": "b", "skip_reason": "not found"}], "f: cannot ask: 1 of 2 packages: not found", 2),
        ([FINE | {"vulns": [BUG]}, {"name": "b", "skip_reason": "not found"}], "PYSEC-1", 1),
        ([], "cannot ask: no package in it", 2),
    ],
)
def test_what_pip_audit_says(packages: list[object], said: str, status: int, audit: ModuleType) -> None:
    answer = audit.read_pip_audit("f", json.dumps({"dependencies": packages, "fixes": []}), "")
    assert said in str(answer) and audit.status([answer]) == status


@pytest.mark.parametrize(
    ("report", "said", "status"),
    [
        ({"vulnerabilities": {}}, "f: nothing known of 7 packages", 0),
        ({"vulnerabilities": {"a": {"severity": "high", "via": [{"title": "It breaks"}]}}}, "f: a: high: It breaks", 1),
        ({"vulnerabilities": {"b": {"severity": "low", "via": ["a"]}}}, "f: b: low: by a", 1),
        ({"message": "405 Method Not Allowed", "statusCode": 405}, "f: cannot ask: 405 Method Not Allowed", 2),
        ({"error": {"code": "ENOTFOUND"}}, "f: cannot ask: ", 2),
    ],
)
def test_what_npm_says(report: dict[str, object], said: str, status: int, audit: ModuleType) -> None:
    answer = audit.read_npm_audit("f", json.dumps(report), "", packages=7)
    assert said in str(answer) and audit.status([answer]) == status


def test_an_answer_that_is_none(audit: ModuleType) -> None:
    assert str(audit.read_pip_audit("f", "", "x\nNo module named pip_audit")) == (
        "f: cannot ask: No module named pip_audit"
    )
    assert audit.read_npm_audit("f", "<html>", "", packages=7).unasked
    assert audit.status([audit.Answer("f", 3), audit.Answer("g", unasked="no")]) == 2


def test_all_lock_files_are_asked_about(audit: ModuleType) -> None:
    found = {path.parent.name for path in audit.locks()}
    assert {"node", "browser", "bundlers", "js"} <= found
