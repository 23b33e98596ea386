"""Contract §6.1, §14.9: a chat template lies inside `tokenizer_config.json`; Gemma 3's and later ones in a file."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.doctor.findings import Finding, error, warning
from vlm_export.doctor.repo_view import TOKENIZER_CONFIG, RepoView

_FILE = "chat_template.jinja"
_FROM_FILE = ("gemma3", "gemma3n", "gemma4")
# Models whose processors take a task or a text, and no conversation.
_WITHOUT = ("florence2", "paligemma", "vision-encoder-decoder", "prefix_conditioning_vlm", "moondream1")


def check(repo: RepoView) -> Iterator[Finding]:
    """Find a template that is not where it is read, or cannot be."""
    if TOKENIZER_CONFIG in repo.damaged:
        return
    template = repo.document(TOKENIZER_CONFIG).get("chat_template")
    if repo.model_type in _FROM_FILE and not repo.has(_FILE):
        yield error(_FILE, f"is missing, and the processor of {repo.model_type} reads it", "write the template there")
    elif repo.client and repo.model_type not in (*_FROM_FILE, *_WITHOUT) and not template:
        other = next((file for file in (_FILE, "chat_template.json") if repo.has(file)), None)
        if other:
            problem = f"has no chat_template; {other} is not read for {repo.model_type}"
            yield error(TOKENIZER_CONFIG, problem, f"put the text of {other} into it as chat_template")
        else:
            problem = "has no chat_template: apply_chat_template fails, and users must write prompts themselves"
            yield warning(TOKENIZER_CONFIG, problem, "put the model's template into it as chat_template")
    if "{% generation %}" in str(template):
        problem = "chat_template has {% generation %}, which transformers.js before 4.3 does not parse"
        yield warning(TOKENIZER_CONFIG, problem, "drop {% generation %} and {% endgeneration %} from it")
