"""The commands of a recipe as its user would type them: what a message tells to run can be pasted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_export.files import Work
from vlm_export.recipe import LOCAL_RECIPE, RecipeFile


@dataclass(frozen=True)
class Commands:
    """A recipe's commands.

    Attributes:
        recipe: the argument that names it, after a space; nothing where a command finds it by itself.
        work: the option that names its work folder, after a space, if it has another than its own.
        repo_id: where it is pushed to.
    """

    recipe: str
    work: str
    repo_id: str

    @classmethod
    def of(cls, recipe: RecipeFile, work: Work) -> Commands:
        """Those of a recipe."""
        return cls(
            recipe=named(recipe),
            work="" if work.root == Path("build") / recipe.name else f" --work {shlex.quote(str(work.root))}",
            repo_id=recipe.recipe.hub.repo_id or f"your-name/{recipe.name}",
        )

    def golden(self) -> str:
        """What records golden outputs."""
        return f"vlm-export golden{self.recipe}"

    def merge(self) -> str:
        """What merges the adapters."""
        return f"vlm-export merge{self.recipe}{self.work}"

    def onnx(self, dtypes: Sequence[str] = ()) -> str:
        """What exports, in the recipe's dtypes or in these."""
        wanted = "".join(f" --quantize {dtype}" for dtype in dtypes)
        return f"vlm-export onnx{self.recipe}{wanted}{self.work}"

    def verify(self, options: str = "") -> str:
        """What verifies what was exported."""
        return f"vlm-export verify{self.recipe}{self.work}{options}"

    def push(self) -> str:
        """What uploads it."""
        recipe = f" --recipe{self.recipe}" if self.recipe else ""
        return f"vlm-export push {self.repo_id}{recipe}{self.work}"

    def demo(self) -> str:
        """What opens the page with it."""
        return f"vlm-export demo{self.recipe}{self.work}"


def named(recipe: RecipeFile) -> str:
    """A recipe as an argument after a space; nothing of the one in the current folder, which needs no name."""
    if recipe.is_bundled:
        return f" {recipe.name}"
    return "" if recipe.path == Path(LOCAL_RECIPE) else f" {shlex.quote(str(recipe.path))}"
