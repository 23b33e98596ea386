"""Contract §6.1, §6.4: the tokenizer's files are there and of a kind that transformers.js has."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.doctor.findings import Finding, error, warning
from vlm_export.doctor.repo_view import TOKENIZER, TOKENIZER_CONFIG, RepoView, mapping

_MODELS = ("BPE", "WordPiece", "Unigram")
_KEYS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens")


def check(repo: RepoView) -> Iterator[Finding]:
    """Find files that are missing, a model that is not supported, and what would be guessed."""
    for file in (TOKENIZER, TOKENIZER_CONFIG):
        if not repo.has(file):
            yield error(file, "is missing: no tokenizer is loaded", "save the tokenizer in its fast form")
    yield from _model(repo)
    settings = repo.document(TOKENIZER_CONFIG)
    if settings and not isinstance(settings.get("clean_up_tokenization_spaces"), bool):
        problem = "does not say clean_up_tokenization_spaces, which is then on: spaces before . and , vanish"
        yield warning(TOKENIZER_CONFIG, problem, 'write "clean_up_tokenization_spaces": false')
    if settings.get("tokenizer_class") == "TokenizersBackend":
        problem = "tokenizer_class is TokenizersBackend, which transformers 5 alone knows"
        yield warning(TOKENIZER_CONFIG, problem, 'write "tokenizer_class": "PreTrainedTokenizerFast"')


def _model(repo: RepoView) -> Iterator[Finding]:
    contents = repo.document(TOKENIZER)
    if not contents:
        return
    kind = mapping(contents.get("model")).get("type")
    if kind not in _MODELS:
        problem = f"its model is of type {kind!r}, and transformers.js has {', '.join(_MODELS)}"
        yield error(TOKENIZER, problem, "convert the tokenizer to one of these")
    absent = [key for key in _KEYS if key not in contents]
    if absent:
        yield error(TOKENIZER, f"has no {', '.join(absent)}", "write them, as null where there is nothing")
