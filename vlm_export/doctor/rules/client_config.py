"""Contract §7: a dtype that `transformers.js_config` misspells is, without a word, the device's default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm_export.contract import SUFFIXES
from vlm_export.doctor.findings import Finding, error, warning
from vlm_export.doctor.repo_view import CLIENT_CONFIG, CONFIG, RepoView, mapping


def check(repo: RepoView) -> Iterator[Finding]:
    """Find names that are no dtype, no graph of the class or no settings at all."""
    if CLIENT_CONFIG in repo.config and not isinstance(repo.config[CLIENT_CONFIG], dict):
        yield error(CONFIG, f"{CLIENT_CONFIG} is no object", "write it as an object, or drop it")
    yield from _dtypes(repo, CLIENT_CONFIG, repo.client_config.get("dtype"))
    for device, settings in mapping(repo.client_config.get("device_config")).items():
        yield from _dtypes(repo, f"{CLIENT_CONFIG}.device_config.{device}", mapping(settings).get("dtype"))


def _dtypes(repo: RepoView, place: str, dtype: Any) -> Iterator[Finding]:
    named = dtype if isinstance(dtype, dict) else {} if dtype is None else {"": dtype}
    for component, one in named.items():
        where = f"{place}.dtype{f'.{component}' if component else ''}"
        if one != "auto" and (not isinstance(one, str) or one not in SUFFIXES):
            yield error(CONFIG, f"{where} is {one!r}, which is no dtype", f"write one of {', '.join(SUFFIXES)}")
        if component and repo.client and component not in repo.client.graphs:
            problem = f"{where} is about no graph of {repo.model_type}"
            yield warning(CONFIG, problem, f"name one of {', '.join(repo.client.graphs)}, or drop it")
