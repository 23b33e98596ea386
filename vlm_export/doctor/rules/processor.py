"""Contract §5, §6.1, §6.2: a class that `preprocessor_config.json` names writes as many image tokens as
`processor_config.json` says.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.doctor.findings import Finding, error
from vlm_export.doctor.repo_view import PREPROCESSOR, PROCESSOR, TOKENIZER_CONFIG, RepoView, integer

# By class, the numbers that it reads in processor_config.json; those of other classes have them elsewhere.
_NUMBERS = {
    "LlavaProcessor": ("patch_size", "num_additional_image_tokens"),
    "PixtralProcessor": ("patch_size", "spatial_merge_size"),
    "Idefics3Processor": ("image_seq_len",),
    "SmolVLMProcessor": ("image_seq_len",),
    "Gemma3Processor": ("image_seq_length",),
    "Gemma3nProcessor": (),
    "Gemma4Processor": (),
    "VLChatProcessor": ("num_image_tokens",),
}
_TEXTS = {
    "LlavaProcessor": ("image_token",),
    "PixtralProcessor": ("image_token", "image_break_token", "image_end_token"),
    "VLChatProcessor": ("image_tag",),
}


def check(repo: RepoView) -> Iterator[Finding]:
    """Find a class that is not named where it is read, and a count of image tokens that would not be a number."""
    named = repo.document(PREPROCESSOR).get("processor_class")
    if repo.client and repo.client.processor and not isinstance(named, str) and repo.document(PREPROCESSOR):
        elsewhere = [file for file in (PROCESSOR, TOKENIZER_CONFIG) if "processor_class" in repo.document(file)]
        where = f"; that of {' and '.join(elsewhere)} is not read" if elsewhere else ""
        yield error(
            PREPROCESSOR,
            f"has no processor_class, so that AutoProcessor reads images alone{where}",
            f'write "processor_class": "{repo.client.processor}"',
        )
    if not isinstance(named, str) or named not in _NUMBERS:
        return
    if not repo.has(PROCESSOR):
        yield error(PROCESSOR, f"is missing, and {named} reads it", f"write it with {_keys(named)}")
        return
    settings = repo.document(PROCESSOR)
    wrong = [key for key in _NUMBERS[named] if integer(settings.get(key)) is None]
    wrong += [key for key in _TEXTS.get(named, ()) if not isinstance(settings.get(key), str)]
    for key in wrong if PROCESSOR not in repo.damaged else ():
        yield error(PROCESSOR, f"{key} is {settings.get(key)!r}: {named} would write no image tokens", f"write {key}")


def _keys(name: str) -> str:
    return ", ".join(("processor_class", *_TEXTS.get(name, ()), *_NUMBERS[name]))
