"""ONNX Runtime sessions that are fed a golden's arrays, whoever prepares the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vlm_export.models.pixels import PIXELS, Steps
from vlm_export.runtime.sessions import Arrays, Cache, DecoderRun, Inputs, Sessions


class GoldenSessions(Sessions):
    """Sessions that feed a graph which prepares pictures itself a picture of which it makes the golden's pixels.

    `last` is the graph that was run last: an error of ONNX Runtime does not say.
    """

    def __init__(self, folder: Path, suffix: str | Mapping[str, str], steps: Steps | None):
        super().__init__(folder, suffix)
        self.steps = steps
        self.last = ""

    def run(self, component: str, feeds: Inputs) -> Arrays:
        """As of `Sessions`."""
        self.last = component
        return super().run(component, as_fed(feeds, self.steps))

    def decode(self, component: str, feeds: Inputs, cache: Cache) -> DecoderRun:
        """As of `Sessions`."""
        self.last = component
        return super().decode(component, feeds, cache)


def as_fed(inputs: Inputs, steps: Steps | None) -> Arrays:
    """A golden's inputs as a graph is fed them that carries out these steps."""
    if steps is None or PIXELS not in inputs:
        return dict(inputs)
    return {**inputs, PIXELS: steps.undone(inputs[PIXELS])}
