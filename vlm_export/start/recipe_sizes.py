"""How large a recipe's model is, as far as that can be told without asking the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlm_export.dtypes import FP32, preferred
from vlm_export.recipe import RecipeFile
from vlm_export.start.figures import number, size
from vlm_export.start.inspection import open_checkpoint
from vlm_export.start.named import find
from vlm_export.wanted import parse

# As publishers name their models: 256M, 1.5b.
_IN_A_NAME = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)
UNKNOWN = "-"


@dataclass(frozen=True)
class RecipeSize:
    """What is known; all is None where nothing is.

    Attributes:
        parameters: counted in the checkpoint, without LoRA and what is not used.
        named: what the model's name says, such as `256M`, where its checkpoint is not on this machine.
        dtype: the one that a browser takes of the recipe's.
        exported_bytes: of the graphs in that dtype.
    """

    parameters: int | None = None
    named: str | None = None
    dtype: str | None = None
    exported_bytes: int | None = None

    @property
    def model(self) -> str:
        """For people."""
        return number(self.parameters) if self.parameters else self.named or UNKNOWN

    @property
    def export(self) -> str:
        """For people."""
        return f"{size(self.exported_bytes)} in {self.dtype}" if self.exported_bytes else UNKNOWN


def size_of(recipe: RecipeFile) -> RecipeSize:
    """Counted in the checkpoint where it is on this machine, else as the names of the model and the recipe say."""
    local = recipe.local(recipe.recipe.model)
    if local is None or not local.is_dir():
        found = _IN_A_NAME.search(recipe.recipe.model.rsplit("/", 1)[-1]) or _IN_A_NAME.search(recipe.name)
        return RecipeSize(named=f"{found[1]}{found[2].upper()}" if found else None)
    checkpoint = open_checkpoint(find(str(local), lambda line: None))
    dtypes = [FP32.name, *recipe.recipe.dtypes]
    dtype = preferred("wasm", dtypes) or FP32.name
    expected = checkpoint.expected(recipe.recipe.layout, parse(recipe.recipe.dtypes, f"{recipe.path}: dtypes"))
    files = [file.size_bytes for file in expected.files if file.dtype == dtype] if expected else []
    return RecipeSize(checkpoint.parameters, None, dtype, sum(files) or None)
