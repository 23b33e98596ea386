"""Contract §6.1, §14.9: `preprocessor_config.json` is there, flat, and names a processor."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.doctor.findings import Finding, error
from vlm_export.doctor.repo_view import PREPROCESSOR, PROCESSOR, RepoView

_NESTED = "image_processor"


def check(repo: RepoView) -> Iterator[Finding]:
    """Find one that is missing, nested, or says nothing of its class."""
    nested = _NESTED in repo.document(PROCESSOR)
    if not repo.has(PREPROCESSOR):
        what = f"is missing; {PROCESSOR} has it nested, which transformers 5 alone reads" if nested else "is missing"
        fix = f"write {PROCESSOR}'s {_NESTED} as this file" if nested else "save the image processor's settings as it"
        yield error(PREPROCESSOR, what, fix)
        return
    settings = repo.document(PREPROCESSOR)
    if isinstance(settings.get(_NESTED), dict):
        yield error(PREPROCESSOR, f"has its settings nested in {_NESTED}", "move them to the top level")
    elif PREPROCESSOR not in repo.damaged and not any(
        isinstance(settings.get(key), str)
        for key in ("processor_class", "image_processor_type", "feature_extractor_type")
    ):
        fix = 'write "image_processor_type", and "processor_class" for a chat model'
        yield error(PREPROCESSOR, "names neither processor_class nor image_processor_type", fix)
