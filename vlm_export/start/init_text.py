"""What `vlm-export init` prints: what was written, what later commands will miss, and the next command."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_export.commands import named
from vlm_export.recipe import RecipeFile
from vlm_export.start.draft import Draft
from vlm_export.start.figures import columns
from vlm_export.start.missing import Missing


def init_lines(draft: Draft, recipe: RecipeFile, missing: Sequence[Missing]) -> list[str]:
    """Lines for people; the last one is the next command."""
    of = f"{draft.model.model_type}, {draft.layout}, in {', '.join(draft.dtypes)}"
    lines = [f"written to {recipe.path}: {recipe.name} ({of})"]
    if missing:
        lines += ["", *columns([("command", "will miss"), *((each.command, each.problem) for each in missing)])]
    return [*lines, "", f"next: vlm-export convert{named(recipe)}"]
