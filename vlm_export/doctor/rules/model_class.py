"""Contract §1.1, §1.2, §5.1: `model_type` chooses the class, and what stands beside it must not contradict it."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.doctor.classes import ENCODER_DECODERS
from vlm_export.doctor.findings import Finding, error, warning
from vlm_export.doctor.repo_view import CONFIG, RepoView


def check(repo: RepoView) -> Iterator[Finding]:
    """Find a type that is missing or unknown, and settings by which the wrong graphs would be loaded."""
    if not repo.model_type:
        yield error(CONFIG, "has no model_type, by which transformers.js chooses a class", "write the model's type")
    elif repo.client is None:
        yield warning(
            CONFIG,
            f"model_type {repo.model_type!r} is no vision-language model of transformers.js 4.3.1",
            "write the type of a class that takes the same graphs, such as llava, or load the graphs yourself",
        )
    if repo.model_type in ENCODER_DECODERS and repo.config.get("is_encoder_decoder") is not True:
        yield error(
            CONFIG, f"is_encoder_decoder is not true, which {repo.model_type} needs", 'write "is_encoder_decoder": true'
        )
    architectures = repo.config.get("architectures")
    first = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if repo.model_type == "llava_qwen2" and first.endswith("ForConditionalGeneration"):
        yield error(
            CONFIG,
            f"architectures[0] is {first}, by which transformers.js loads the text model alone",
            'write "architectures": ["LlavaQwen2ForCausalLM"]',
        )
