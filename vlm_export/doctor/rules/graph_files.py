"""Contract §1.3, §7, §14.6: there is a file for every graph that a client loads by default or by `config.json`."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.contract import SUFFIXES
from vlm_export.doctor.findings import Finding, error
from vlm_export.doctor.repo_view import CONFIG, DEVICES, ONNX, RepoView, split_name


def check(repo: RepoView) -> Iterator[Finding]:
    """Find the files that are missing, each with those who would load it."""
    missing: dict[str, list[str]] = {}
    for component in repo.client.graphs if repo.client else ():
        for device, (default, place) in DEVICES.items():
            file = repo.taken(component, device)
            if not repo.has(file):
                why = f"as {CONFIG} says" if repo.named_dtype(component, device) else f"by default ({default})"
                missing.setdefault(file, []).append(f"{place} loads it {why}")
    for file, loads in missing.items():
        yield error(file, f"is missing: {'; '.join(loads)}", _fix(repo, file))


def _fix(repo: RepoView, file: str) -> str:
    component, dtype = split_name(file)
    have = [other for other in SUFFIXES if repo.has(f"{ONNX}{component}{SUFFIXES[other]}.onnx")]
    if have:
        return f"export {dtype}, or name one of {', '.join(have)} in transformers.js_config.device_config of {CONFIG}"
    return f"export {component}: there is no file of it in any dtype"
