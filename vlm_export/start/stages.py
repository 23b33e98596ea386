"""What each stage of a conversion is made of, and what it leaves: what would come out the same is not made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

from vlm_export import ready
from vlm_export.errors import InputError
from vlm_export.files import Work
from vlm_export.fingerprint import Record
from vlm_export.manifest import MANIFEST, ONNX, load_manifest
from vlm_export.quantize.plan import Plan
from vlm_export.recipe import RecipeFile
from vlm_export.source.fetch import Sources, sources
from vlm_export.tensors.weight_files import folder_of
from vlm_export.wanted import Wanted

Stage = Literal["golden", "merge", "onnx"]
Made = TypeVar("Made")
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


@dataclass(frozen=True)
class Options:
    """What was asked for beside the recipe: `base` of `merge`, the rest of `onnx`; None leaves it to the recipe."""

    base: str | None = None
    wanted: Wanted | None = None
    layout: str | None = None
    plan: Plan | None = None
    memory_bytes: int | None = None

    def of(self, stage: Stage) -> str:
        """Those that a stage heeds, as text."""
        if stage == "golden":
            return ""
        return repr(self.base if stage == "merge" else (self.wanted, self.layout, self.plan, self.memory_bytes))


class Stages:
    """The stages of one conversion, against the record of its work folder, in which nobody else is at work."""

    def __init__(self, recipe: RecipeFile, work: Work, options: Options):
        self.recipe, self.work, self.options = recipe, work, options
        self.record = Record(work.root)
        self._sources: Sources | None = None
        self._begun: dict[Stage, dict[str, Any]] = {}

    def run(self, stage: Stage, do: Callable[[], Made], notify: Callable[[str], None], *, again: bool) -> Made | None:
        """Run a stage, unless its result is there and would come out the same, which `notify` is told, and not `again`.

        Returns what it made; None where it did not run.
        """
        since = self.begin(stage)
        if since is not None and not again:
            notify(f"{stage}: nothing changed since {since}; skipped")
            return None
        made = do()
        self.done(stage)
        return made

    def begin(self, stage: Stage) -> str | None:
        """When the stage was done as it would be done now; None where it has to run."""
        if self.recipe.recipe.trust_remote_code:  # whose code may do anything
            return None
        self._begun[stage] = made_of = self._made_of(stage)
        if stage == "onnx" and self._lacked_memory():
            return None
        return self.record.since(stage, made_of, self.record.digests(self._left(stage)))

    def done(self, stage: Stage) -> None:
        """Note that the stage was done, of what was there when it began."""
        if made_of := self._begun.get(stage):
            self.record.done(stage, made_of, self.record.digests(self._left(stage)))

    def _made_of(self, stage: Stage) -> dict[str, Any]:
        recipe = asdict(self.recipe.recipe)
        return {
            "recipe": {key: value for key, value in recipe.items() if key not in _UNHEEDED[stage]},
            "options": self.options.of(stage),
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

    def _lacked_memory(self) -> bool:
        """Whether weights were rounded that would have been calibrated, had there been more memory."""
        with suppress(InputError):
            return any(graph.rounded for graph in load_manifest(self.work.repo).graphs)
        return False

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
