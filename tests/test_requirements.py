"""`requirements/tested.txt`: complete, pinned as `constraints.txt` says, each file by its hash, from no index."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "requirements" / "tested.txt").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def entries() -> dict[str, tuple[Requirement, list[str]]]:
    """By name: what is pinned, and the hashes of its files."""
    lines = [line for line in TEXT.replace("\\\n", "").splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        requirement, *hashes = re.split(r"\s+--hash=", line.strip())
        found[canonicalize_name(Requirement(requirement).name)] = (Requirement(requirement), hashes)
    return found


def pinned(requirement: Requirement) -> str:
    (only,) = requirement.specifier
    assert only.operator == "=="
    return only.version


def test_every_file_has_a_hash_and_no_place() -> None:
    assert len(entries()) > 80
    for requirement, hashes in entries().values():
        assert pinned(requirement) and requirement.url is None
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", one.strip()) for one in hashes), requirement
    assert not re.search(r"https?://|file:|--index|--find-links|^/", TEXT, re.MULTILINE)


def test_versions_are_those_of_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().split()
    constraints = {canonicalize_name(name): number for name, _, number in (line.partition("==") for line in lines)}
    differing = {
        name: pinned(one) for name, (one, _) in entries().items() if constraints.get(name, pinned(one)) != pinned(one)
    }
    assert not differing, "run `python scripts/requirements.py`"
    others = ("nvidia-", "cuda-", "triton", "httpx2-jsfetch")  # of systems and builds that constraints.txt is not for
    unknown = [name for name in entries() if name not in constraints and not name.startswith(others)]
    assert not unknown, "put them into constraints.txt"


def test_all_that_is_declared_is_there() -> None:
    declared = [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["dev"]]
    for requirement in map(Requirement, [*declared, *PROJECT["project"]["optional-dependencies"]["fastvlm"]]):
        found = entries().get(canonicalize_name(requirement.name))
        assert found, f"{requirement}: run `python scripts/requirements.py`"
        assert requirement.specifier.contains(pinned(found[0]))


def test_what_runs_here_is_what_is_pinned() -> None:
    """But for the part of a version that says for which processor it was built."""
    for name, (requirement, _) in entries().items():
        try:
            installed = version(name)
        except PackageNotFoundError:  # of another system
            continue
        assert Version(installed).public == pinned(requirement), name
