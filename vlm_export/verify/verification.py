"""What one verification reads, and the checks that it makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from vlm_export.manifest import Manifest
from vlm_export.models.pixels import Steps
from vlm_export.recipe import Tolerance
from vlm_export.runtime.sessions import GRAPH_ERRORS
from vlm_export.runtime.text import Text
from vlm_export.spec.family import Layout
from vlm_export.spec.graph import Component
from vlm_export.targets import Target
from vlm_export.verify import limits
from vlm_export.verify.golden import GoldenFolder
from vlm_export.verify.pixels_in_graph import PixelsInGraph
from vlm_export.verify.report import CAPTIONS, Captions, Check, FromFile, MadeOf
from vlm_export.wanted import MIXED


@dataclass
class Verification:
    """What one verification reads, and what it has seen so far.

    Attributes:
        fingerprints: of what was found of a dtype in a runtime, by both: what it depends on.
        progress: is told what is done now, how many captions have been made, and of how many.
        planned, made: captions that the verification takes, and those that there are.
        reused: those of them that an earlier verification found.
        pixels: the part of the vision graph that prepares pictures, if it does.
        generated_in_ort: each dtype's tokens in ONNX Runtime, a list for each golden image.
        fp32_scores: the float32 graphs' scores of the next token where PyTorch's tokens are forced,
            `[tokens, vocabulary] float32` for each of the first golden images.
    """

    repo: Path
    manifest: Manifest
    layout: Layout
    components: Sequence[Component]
    golden: GoldenFolder
    tolerances: tuple[Tolerance, ...]
    progress: Callable[[str, int, int], None]
    planned: int = 0
    made: int = 0
    pixels: PixelsInGraph | None = None
    checks: list[Check] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    generated_in_ort: dict[str, list[list[int]]] = field(default_factory=dict)
    fp32_scores: list[np.ndarray] = field(default_factory=list)
    captions: list[Captions] = field(default_factory=list)
    from_files: list[FromFile] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)

    @property
    def steps(self) -> Steps | None:
        """What the vision graph does to pictures, if it prepares them itself."""
        return Steps.of(self.pixels.settings) if self.pixels else None

    def made_pixels(self, pictures: np.ndarray | None) -> np.ndarray | None:
        """What the tower takes of what a client feeds; None where the client, or the graph, makes nothing of it."""
        if self.pixels is None or pictures is None:
            return pictures
        with suppress(*GRAPH_ERRORS):
            return self.pixels.made_of(pictures)
        return None

    def tell(self, what: str, captions: int = 0) -> None:
        """Tell what is done now, and that so many more captions are made."""
        self.made += captions
        self.progress(what, self.made, self.planned)

    def dtypes_of(self, name: str) -> list[str]:
        """The dtypes that a graph may have: one, or all those that a user mixed."""
        return list(self.manifest.mixed.values()) if name == MIXED else [name]

    def keep_captions(self, dtype: str, runtime: Target, made_of: MadeOf, token_ids: Sequence[Sequence[int]]) -> None:
        """Keep what was said of the golden images, for the report."""
        text = Text(self.repo)
        self.captions.append(Captions(dtype, runtime, made_of, [text.decode(ids) for ids in token_ids[:CAPTIONS]]))

    def add(
        self,
        component: str,
        dtype: str,
        runtime: Target,
        metric: str,
        value: float,
        detail: str = "",
        output: str = "",
        phase: str = "",
    ) -> bool:
        """Judge a value by its limit and keep the check. Returns whether it did not fail."""
        limit = limits.limit_for(metric, self.dtypes_of(dtype), self.tolerances, runtime)
        verdict: Literal["pass", "fail", "reported"] = "reported"
        if limit is not None:
            verdict = "pass" if limit.holds(value) else "fail"
            detail = "; ".join(part for part in (detail, limit.reason and f"limit: {limit.reason}") if part)
        bound = None if limit is None else limit.limit
        self.checks.append(Check(component, dtype, runtime, metric, value, bound, verdict, detail, output, phase))
        return verdict != "fail"

    def fail(self, component: str, dtype: str, runtime: Target, metric: str, detail: str) -> None:
        """A check that needs no number: the graph is not what it should be."""
        self.checks.append(Check(component, dtype, runtime, metric, 1.0, 0.0, "fail", detail))

    def leave_out(self, component: str, dtype: str, runtime: Target, metric: str, detail: str) -> None:
        """What cannot be checked on this machine, and why: neither a pass nor a failure."""
        self.checks.append(Check(component, dtype, runtime, metric, 0.0, None, "left-out", detail))
