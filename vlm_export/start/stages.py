"""What each stage of a conversion is made of, and what it leaves: what would come out the same is not made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from vlm_export import ready
from vlm_export.files import Work
from vlm_export.fingerprint import Record
from vlm_export.manifest import MANIFEST, ONNX
from vlm_export.recipe import RecipeFile
from vlm_export.source.fetch import Sources, sources
from vlm_export.tensors.weight_files import folder_of

Stage = Literal["golden", "merge", "onnx"]
VERSIONS = ("torch", "transformers", "peft", "onnx", "onnxruntime", "onnxscript", "onnxsim", "numpy", "pillow")
_PACKAGE = Path(__file__).parents[1]
_CODE = (".py", ".json", ".mjs", ".js", ".html", ".css")
# Keys of a recipe that a stage does not heed; every other may change what comes of it.
_UNHEEDED: dict[Stage, tuple[str, ...]] = {
    "golden": ("description", "dtypes", "hub", "preprocess", "tolerances"),
    "merge": ("description", "dtypes", "generation", "golden", "hub", "layout", "preprocess", "tolerances"),
    "onnx": ("tolerances",),
}
# What `verify` writes into the repo after `onnx`.
_OF_VERIFY = (MANIFEST, "README.md", "quality.svg", "config.json")


class Stages:
    """The stages of one conversion, against the record of its work folder.

    Attributes:
        options: by stage what was asked for beside the recipe.
    """

    def __init__(self, recipe: RecipeFile, work: Work, options: dict[Stage, Any]):
        self.recipe, self.work, self.options = recipe, work, options
        self.record = Record(work.root)
        self._sources: Sources | None = None
        self._begun: dict[Stage, dict[str, Any]] = {}

    def begin(self, stage: Stage) -> str | None:
        """When the stage was done as it would be done now; None where it has to run."""
        if self.recipe.recipe.trust_remote_code:  # whose code may do anything
            return None
        self._begun[stage] = made_of = self._made_of(stage)
        return self.record.since(stage, made_of, self.record.digests(self._left(stage)))

    def done(self, stage: Stage) -> None:
        """Note that the stage was done, of what was there when it began."""
        if made_of := self._begun.get(stage):
            self.record.done(stage, made_of, self.record.digests(self._left(stage)))

    def _made_of(self, stage: Stage) -> dict[str, Any]:
        recipe = asdict(self.recipe.recipe)
        return {
            "recipe": {key: value for key, value in recipe.items() if key not in _UNHEEDED[stage]},
            "options": repr(self.options.get(stage)),
            "files": self.record.digests(self._inputs(stage)),
            "versions": {name: version(name) for name in VERSIONS},
            "code": self.record.digests(_code()),
        }

    def _inputs(self, stage: Stage) -> list[Path]:
        images = list(ready.images(self.recipe)) if stage != "merge" else []
        if stage == "onnx":
            return [self.work.merged, *images]
        self._sources = found = self._sources or sources(self.recipe)
        folders = {folder_of(path) for path in (found.model, *found.adapters, *found.beside.folders.values())}
        # Not what lies in folders below: a trainer's earlier checkpoints.
        return [*(file for folder in sorted(folders) for file in sorted(folder.iterdir()) if file.is_file()), *images]

    def _left(self, stage: Stage) -> Sequence[Path]:
        if stage == "golden":
            return [self.recipe.golden_target]
        if stage == "merge":
            return [self.work.merged]
        repo = self.work.repo
        others = [path for path in repo.glob("*") if path.is_file() and path.name not in _OF_VERIFY]
        return [repo / ONNX, *others] if (repo / ONNX).is_dir() else []


def _code() -> list[Path]:
    return [path for path in sorted(_PACKAGE.rglob("*")) if path.suffix in _CODE and "node_modules" not in path.parts]
