"""Where a repo will be: the id that its card speaks of, which a push puts its own in place of."""

from __future__ import annotations

import re

from vlm_export.recipe import RecipeFile

CARD = "README.md"
HUB = "https://huggingface.co"
_TITLE = re.compile(r"^# .*$", re.MULTILINE)
_WRITTEN_FOR = re.compile(r"<!-- Card of ([\w.-]+/[\w.-]+) -->")


def draft_id(recipe: RecipeFile) -> str:
    """The id in a card that was not pushed: the recipe's, or one that nobody has.

    It is no id of a base model, which stays in the card when the repo's own id is put in.
    """
    hub = recipe.recipe.hub
    return hub.repo_id if hub.repo_id and hub.repo_id not in hub.base_model else f"your-name/{recipe.name}"


def address(repo_id: str, path: str) -> str:
    """Where a file of a repo can be fetched."""
    return f"{HUB}/{repo_id}/resolve/main/{path}"


def signature(repo_id: str) -> str:
    """The line of a card that says whose it is, and that no reader sees."""
    return f"<!-- Card of {repo_id} -->"


def readdressed(card: str, repo_id: str) -> str:
    """A card with another id of the repo in it, wherever it names its own; as it is, if it has no `signature`."""
    found = _WRITTEN_FOR.search(card)
    if found is None:
        return card
    return re.sub(rf"(?<![\w.-]){re.escape(found[1])}(?![\w-]|\.\w)", lambda _: repo_id, card)


def with_link(card: str, page: str) -> str:
    """A card that says under its title where the model can be tried."""
    link = f"[Try it in your browser]({page}): nothing is installed, and pictures stay with you."
    return _TITLE.sub(lambda title: f"{title[0]}\n\n{link}", card, count=1)
