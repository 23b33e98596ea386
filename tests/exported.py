"""A pico recipe taken through the pipeline, for tests that need its results."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pico
import yaml
from PIL import Image

from vlm_export import pipeline
from vlm_export.doctor.examine import examine
from vlm_export.doctor.repo_view import open_repo
from vlm_export.dtypes import DTYPES
from vlm_export.files import Work
from vlm_export.manifest import load_manifest
from vlm_export.models.pixels import PIXELS, Steps
from vlm_export.quantize.masks import LARGEST
from vlm_export.recipe import RecipeFile, load_recipe
from vlm_export.targets import Target
from vlm_export.verify import limits
from vlm_export.verify.golden_sessions import as_fed
from vlm_export.verify.report import LOADS, RUNS, SATURATION, SHAPE, SIGNATURE, Report
from vlm_export.wanted import parse

# The tokens of random weights in 8 bits decide nothing: the two best are often a rounding error apart.
TOLERANCES = [
    {"metric": metric, "dtype": dtype, "limit": limit, "reason": "random weights leave no margin between tokens"}
    for dtype in ("int8", "q8")
    for metric, limit in (("tokens_exact_rate", 0.0), ("teacher_forced_top1_agreement", 0.6))
]


@dataclass(frozen=True)
class Exported:
    """A recipe and its work folder."""

    recipe: RecipeFile
    work: Work

    def export(self, layout: str = "captioner", dtypes: Sequence[str] = ()) -> None:
        wanted = parse(dtypes, "dtypes") if dtypes else None
        pipeline.run_export(self.recipe, self.work, silent, wanted=wanted, layout=layout)

    def verify(self, *runtimes: Target, dtypes: Sequence[str] = ()) -> Report:
        return pipeline.run_verify(self.recipe, self.work, silent, runtimes=runtimes or ("ort",), dtypes=dtypes)

    def graph(self, component: str) -> Path:
        return self.work.repo / "onnx" / f"{component}.onnx"

    def check_ranges(self) -> None:
        """Every component was measured before it was made in float16."""
        manifest = load_manifest(self.work.repo)
        assert set(manifest.ranges) == {graph.component for graph in manifest.graphs}
        for found in manifest.ranges.values():
            assert 0 < found.largest < LARGEST and found.in_float32 == 0

    def check_by_doctor(self) -> None:
        """What was exported breaks no rule of the doctor's."""
        assert examine(open_repo(self.work.repo)).found == ()

    def check_every_dtype(self, layout: str, *runtimes: Target) -> None:
        """Each dtype loads and runs in these runtimes; transformers.js says what ONNX Runtime says."""
        self.export(layout, ["all"])
        self.check_by_doctor()
        report = self.verify(*runtimes)
        of_graphs = {LOADS, RUNS, SHAPE, SIGNATURE, SATURATION, limits.TOKENS_AS_ORT}
        assert not [check for check in report.failures if check.metric in of_graphs]
        metrics = {"ort": limits.TOKENS_EXACT, "node": limits.TOKENS_AS_ORT}
        for runtime in runtimes:
            said = {c.dtype for c in report.checks if (c.runtime, c.metric) == (runtime, metrics[runtime])}
            assert said | {"fp32"} == set(DTYPES)

    def copy(self, folder: Path) -> Exported:
        """The same, in a folder that a test may spoil."""
        shutil.copytree(self.recipe.path.parent, folder, dirs_exist_ok=True)
        return Exported(load_recipe(folder / self.recipe.path.name), Work(folder / "work"))


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


def prepare(
    folder: Path,
    settings: dict[str, Any] | None = None,
    change: Callable[[pico.Tensors], None] = lambda _: None,
    **recipe: Any,
) -> Exported:
    """A pico checkpoint with a recipe beside it, merged, its golden outputs recorded; nothing exported yet."""
    pico.write_checkpoint(folder / "checkpoint", settings, change=change)
    return record(folder, **recipe)


def record(folder: Path, **recipe: Any) -> Exported:
    """The same of the checkpoint that is in `checkpoint/` already."""
    if not (folder / "images").exists():
        write_images(folder / "images")
    values = {
        "name": "pico",
        "model": "checkpoint",
        "generation": {"max_new_tokens": 6},
        "hub": {"license": "apache-2.0"},
        "golden": {"images": ["images/*.png"], "prompts": ["a cat"]},
        "tolerances": TOLERANCES,
    }
    (folder / "pico.yaml").write_text(yaml.safe_dump(values | recipe))
    exported = Exported(load_recipe(folder / "pico.yaml"), Work(folder / "work"))
    pipeline.run_golden(exported.recipe, silent)
    pipeline.run_merge(exported.recipe, exported.work, silent)
    return exported


def as_fed_to(repo: Path, pixels: np.ndarray) -> np.ndarray:
    """Normalized pixels as the repo's vision graph takes them: as pictures, where it prepares those itself."""
    in_graph = load_manifest(repo).in_graph
    return as_fed({PIXELS: pixels}, Steps.of(in_graph) if in_graph else None)[PIXELS]


def failed_graphs(report: Report) -> set[str]:
    """The components that a report finds wrong by themselves, whatever that did to the captions."""
    of_captions = (limits.TOKENS_EXACT, limits.TOP1_AGREEMENT, *limits.COLLAPSE)
    return {check.component for check in report.failures if check.metric not in of_captions}


def write_images(folder: Path, count: int = 3) -> None:
    """Seeded noise at the pico tower's size."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{index}.png")
